"""What `nys.factorize` takes, one door: matrices that JAX traces, and matrices of the host.

A matrix of the host is known by products on NumPy arrays, which are made outside of compiled code.

| what is given                                       | what becomes of it                         |
|-----------------------------------------------------|--------------------------------------------|
| all that `nyscaled.matrices.as_matrix` takes, also  | an array, a BCOO or an `Operator`,         |
| in half precision or complex                        | in its own dtype                           |
| sparse matrices of SciPy and JAX                    | `SparseMatrix` on a CPU, BCOO elsewhere    |
|                                                     | and under jit                              |
| linear operators of lineax                          | `Operator`                                 |
| operators of SciPy and PyLops, and other objects    | `HostOperator`                             |
| that have `matmat` and `rmatmat`                    |                                            |
| memory maps, h5py datasets, zarr arrays             | `RowBlocks`                                |
| anything with `times` and `adjoint_times`           | itself                                     |

On a CPU XLA multiplies a BCOO about ten times slower than SciPy multiplies the same CSR. So a
sparse matrix whose entries are known is multiplied by SciPy there, by one copy for both sides:
columns of the transpose are rows, and a second copy by columns makes neither product faster. Two
threads do not make them faster either, because such products wait for memory.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jax.tree_util import Partial
from jaxtyping import Array, Inexact

from nyscaled.lowrank.host_arrays import (
    HOST_DTYPES,
    HostArray,
    all_finite,
    require_host,
    require_outside_of_jit,
)
from nyscaled.lowrank.host_operator import HostOperator
from nyscaled.matrices import Operator, as_matrix, is_scipy, require_floating
from nyscaled.typing import LinearMap, MatrixLike
from nyscaled.validation import is_concrete

DTYPES = (jnp.bfloat16, jnp.float16, *HOST_DTYPES)


@runtime_checkable
class HostMatrix(Protocol):
    """A matrix known by its products with NumPy arrays, which JAX does not trace."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def times(self, x: Inexact[np.ndarray, "n k"], /) -> Inexact[np.ndarray, "m k"]:
        """Return A x."""
        ...

    def adjoint_times(self, y: Inexact[np.ndarray, "m k"], /) -> Inexact[np.ndarray, "n k"]:
        """Return Aᴴ y, of the conjugate transpose."""
        ...


@runtime_checkable
class _Products(Protocol):
    """What linear operators of SciPy and PyLops have in common."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def matmat(self, x: HostArray, /) -> HostArray: ...

    def rmatmat(self, y: HostArray, /) -> HostArray: ...


def as_input(name: str, a: MatrixLike) -> LinearMap | HostMatrix:
    """Return `a` as a matrix that JAX traces, or as a `HostMatrix`, by the table of this module.

    Args:
        name: what errors call it.
        a: a matrix (m, n).

    Raises:
        ValueError: on what is neither, on dtypes other than floats and complex numbers, and on a
            matrix of the host under jit.

    Examples:
        >>> import scipy.sparse
        >>> a = as_input("A", scipy.sparse.eye_array(3, dtype="float32"))
        >>> a.times(np.ones((3, 1), np.float32)).T
        array([[1., 1., 1.]], dtype=float32)
    """
    a = _as_input(name, a)
    if isinstance(a, HostMatrix):
        require_outside_of_jit(f"{name}, a {type(a).__name__},")
    return a


def _as_input(name: str, a: MatrixLike) -> LinearMap | HostMatrix:
    if _is_stored(a):
        from nyscaled.lowrank.stream import RowBlocks  # it imports this file

        return RowBlocks(a)
    if isinstance(a, Operator | jax.Array | np.ndarray):
        return as_matrix(name, a, DTYPES)
    if isinstance(a, HostMatrix):
        require_host(name, a.shape, a.dtype)
        return a
    if isinstance(a, sparse.JAXSparse) or is_scipy(a):
        return _sparse(name, a)
    lineax = sys.modules.get("lineax")  # who has such an operator has imported the module
    if lineax is not None and isinstance(a, lineax.AbstractLinearOperator):
        return _from_lineax(name, a)
    if isinstance(a, _Products) and jax.tree_util.all_leaves([a]):
        return HostOperator(a.matmat, a.rmatmat, a.shape, a.dtype, name=name)
    return as_matrix(name, a, DTYPES)


class SparseMatrix:
    """A sparse matrix whose products SciPy makes on the host; its rows are stored once.

    Args:
        rows: the matrix in CSR.
    """

    def __init__(self, rows: MatrixLike) -> None:
        self.rows = rows
        self.shape = tuple(map(int, rows.shape))
        self.dtype = np.dtype(rows.dtype)

    def times(self, x: Inexact[np.ndarray, "n k"], /) -> Inexact[np.ndarray, "m k"]:
        """Return A x."""
        return self.rows @ np.asarray(x, self.dtype)

    def adjoint_times(self, y: Inexact[np.ndarray, "m k"], /) -> Inexact[np.ndarray, "n k"]:
        """Return Aᴴ y."""
        y = np.asarray(y, self.dtype)
        if np.iscomplexobj(y):
            return (self.rows.T @ y.conj()).conj()
        return self.rows.T @ y


def _is_stored(a: object) -> bool:
    """Whether `a` lies in a file, and may be larger than memory."""
    classes = (("numpy", "memmap"), ("h5py", "Dataset"), ("zarr", "Array"))
    modules = ((sys.modules.get(module), name) for module, name in classes)
    return any(
        module is not None and isinstance(a, getattr(module, name)) for module, name in modules
    )


def _sparse(name: str, a: MatrixLike) -> LinearMap | HostMatrix:
    """SciPy's form on a CPU; BCOO on accelerators, which multiply it faster than the host can.

    The entries of a JAX matrix under jit are not known, and half precision is unknown to SciPy.
    """
    import scipy.sparse

    if is_scipy(a):
        if jax.default_backend() != "cpu" or not is_concrete(np.empty(1)):
            return as_matrix(name, a, DTYPES)
        require_host(name, a.shape, a.dtype)
        rows = scipy.sparse.csr_array(a)
    else:
        a = as_matrix(name, a, DTYPES)
        if not is_concrete(a) or a.dtype not in HOST_DTYPES or not _on_one_cpu(a.data):
            return a
        indices, entries = np.asarray(a.indices), np.asarray(a.data)
        if np.any(indices < 0):
            raise ValueError(f"{name} has negative indices; expected those of rows and columns")
        inside = (indices < a.shape).all(axis=1)  # BCOO pads with indices beyond the matrix
        i, j = indices[inside].T
        rows = scipy.sparse.csr_array((entries[inside], (i, j)), shape=a.shape)
    rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
    if not all_finite(rows.data):
        raise ValueError(f"{name} has NaN or Inf entries; expected finite ones")
    return SparseMatrix(rows)


def _on_one_cpu(array: Array) -> bool:
    return [device.platform for device in array.devices()] == ["cpu"]


@dataclasses.dataclass(frozen=True)
class _LineaxProduct:
    """x ↦ A x of a lineax operator, which is given its arrays: operators alike share a compilation.

    Args:
        operator: the structure of the operator.
        constants: its leaves that are not arrays, and None for arrays.
    """

    operator: Hashable
    constants: tuple[object, ...]

    def __call__(self, arrays: Sequence[Array | None], x: Array) -> Array:
        leaves = [c if a is None else a for a, c in zip(arrays, self.constants, strict=True)]
        operator = jax.tree_util.tree_unflatten(self.operator, leaves)
        return jax.vmap(operator.mv, in_axes=1, out_axes=1)(x)


def _from_lineax(name: str, a: MatrixLike) -> Operator:
    given, result = a.in_structure(), a.out_structure()
    for structure in (given, result):
        if not isinstance(structure, jax.ShapeDtypeStruct) or len(structure.shape) != 1:
            raise ValueError(
                f"{name} is a {type(a).__name__} of {structure}; expected one from vectors to "
                "vectors (ravel its arguments and results)"
            )
    require_floating(name, result, HOST_DTYPES)
    products: list[Partial] = []
    for operator in (a, a.T):
        leaves, structure = jax.tree_util.tree_flatten(operator)
        known = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        arrays = [leaf if k else None for leaf, k in zip(leaves, known, strict=True)]
        constants = tuple(None if k else leaf for leaf, k in zip(leaves, known, strict=True))
        products.append(Partial(_LineaxProduct(structure, constants), arrays))
    matmat, rmatmat = products
    return Operator(matmat, rmatmat, (result.shape[0], given.shape[0]), result.dtype)
