"""What `nys.factorize` and `nys.nystrom` take: matrices that JAX traces, and those of the host.

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
columns of the transpose are rows, and a second copy by columns makes neither product faster.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jax.tree_util import Partial
from jaxtyping import Array, Inexact, Key

from nyscaled.lowrank.host_arrays import (
    HOST_DTYPES,
    HostArray,
    all_finite,
    require_host,
    require_outside_of_jit,
)
from nyscaled.lowrank.host_operator import HostOperator
from nyscaled.matrices import as_matrix, is_scipy, require_floating
from nyscaled.operators import Operator
from nyscaled.typing import LinearMap, MatrixLike
from nyscaled.validation import is_concrete

if TYPE_CHECKING:
    from scipy.sparse import csc_array, csr_array

DTYPES = (jnp.bfloat16, jnp.float16, *HOST_DTYPES)

_THREADS = 4
_LARGE = 2**18  # entries; a product of fewer takes about as long as starting threads


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


def as_input(name: str, a: MatrixLike, key: Key[Array, ""] | None = None) -> LinearMap | HostMatrix:
    """Return `a` as a matrix that JAX traces, or as a `HostMatrix`, by the table of this module.

    Args:
        name: what errors call it.
        a: a matrix (m, n).
        key: what random columns are made of. If it is traced, the products are traced too.

    Raises:
        ValueError: on what is neither, on dtypes other than floats and complex numbers, and on a
            matrix of the host under jit, or with a traced key.

    Examples:
        >>> import scipy.sparse
        >>> a = as_input("A", scipy.sparse.eye_array(3, dtype="float32"))
        >>> a.times(np.ones((3, 1), np.float32)).T
        array([[1., 1., 1.]], dtype=float32)
    """
    a = _as_input(name, a, is_concrete((np.empty(1), key)))
    if isinstance(a, HostMatrix):
        require_outside_of_jit(f"{name}, a {type(a).__name__},", key)
    return a


def _as_input(name: str, a: MatrixLike, on_host: bool) -> LinearMap | HostMatrix:
    if _is_stored(a):
        from nyscaled.lowrank.stream import RowBlocks  # it imports this file

        return RowBlocks(a)
    if isinstance(a, Operator | jax.Array | np.ndarray):
        return as_matrix(name, a, DTYPES)
    if isinstance(a, HostMatrix):
        require_host(name, a.shape, a.dtype)
        return a
    if isinstance(a, sparse.JAXSparse) or is_scipy(a):
        return _sparse(name, a, on_host)
    lineax = sys.modules.get("lineax")  # who has such an operator has imported the module
    if lineax is not None and isinstance(a, lineax.AbstractLinearOperator):
        return _from_lineax(name, a)
    if isinstance(a, _Products) and jax.tree_util.all_leaves([a]):
        return HostOperator(a.matmat, a.rmatmat, a.shape, a.dtype, name=name)
    return as_matrix(name, a, DTYPES)


class SparseMatrix:
    """A sparse matrix whose products SciPy makes on the host; its rows are stored once.

    SciPy multiplies on one thread and lets others run. So a large matrix is cut into blocks of rows
    with about as many entries, whose products are made at the same time. How it is cut does not
    depend on the machine, and so the results do not.

    Args:
        rows: the matrix in CSR.
    """

    def __init__(self, rows: MatrixLike) -> None:
        self.shape = tuple(map(int, rows.shape))
        self.dtype = np.dtype(rows.dtype)
        # Indices of eight bytes are twice as much to read, in each product.
        index = np.int32 if max(rows.nnz, *self.shape) < 2**31 else np.int64
        pointers, indices = (x.astype(index, copy=False) for x in (rows.indptr, rows.indices))
        count = _THREADS if rows.nnz >= _LARGE else 1
        ends = np.searchsorted(pointers, np.linspace(0, rows.nnz, count + 1)[1:-1])
        bounds = [0, *map(int, ends), self.shape[0]]
        self.blocks = [
            _Block.of(rows.data, indices, pointers[i : j + 1], slice(i, j), self.shape[1])
            for i, j in itertools.pairwise(bounds)
            if i < j
        ]

    def times(self, x: Inexact[np.ndarray, "n k"], /) -> Inexact[np.ndarray, "m k"]:
        """Return A x."""
        x = np.asarray(x, self.dtype)
        return np.concatenate(_at_once(lambda block: block.matrix @ x, self.blocks))

    def adjoint_times(self, y: Inexact[np.ndarray, "m k"], /) -> Inexact[np.ndarray, "n k"]:
        """Return Aᴴ y."""
        y = np.asarray(y, self.dtype)
        if np.iscomplexobj(y):
            return self._transpose_times(y.conj()).conj()
        return self._transpose_times(y)

    def _transpose_times(self, y: Inexact[np.ndarray, "m k"]) -> Inexact[np.ndarray, "n k"]:
        first, *others = _at_once(lambda block: block.transpose @ y[block.rows], self.blocks)
        for other in others:
            first += other
        return first


class _Block(NamedTuple):
    """Rows of a sparse matrix, whose entries are not copied."""

    rows: slice
    matrix: csr_array
    transpose: csc_array

    @classmethod
    def of(
        cls, data: np.ndarray, indices: np.ndarray, pointers: np.ndarray, rows: slice, width: int
    ) -> _Block:
        """These rows of a matrix in CSR, and the `pointers` to where they begin and end."""
        import scipy.sparse

        own, shape = slice(pointers[0], pointers[-1]), (len(pointers) - 1, width)
        matrix = scipy.sparse.csr_array(shape, dtype=data.dtype)
        transpose = scipy.sparse.csc_array(shape[::-1], dtype=data.dtype)
        for block in (matrix, transpose):
            # Given to a constructor, parts of arrays would be copied.
            block.data, block.indices = data[own], indices[own]
            block.indptr = pointers - pointers[0]
        return cls(rows, matrix, transpose)


def _at_once(
    product: Callable[[_Block], np.ndarray], blocks: Sequence[_Block]
) -> Sequence[np.ndarray]:
    if len(blocks) == 1:
        return [product(blocks[0])]
    with ThreadPoolExecutor(len(blocks)) as threads:
        return list(threads.map(product, blocks))


def _is_stored(a: object) -> bool:
    """Whether `a` lies in a file, and may be larger than memory."""
    classes = (("numpy", "memmap"), ("h5py", "Dataset"), ("zarr", "Array"))
    modules = ((sys.modules.get(module), name) for module, name in classes)
    return any(
        module is not None and isinstance(a, getattr(module, name)) for module, name in modules
    )


def _sparse(name: str, a: MatrixLike, on_host: bool) -> LinearMap | HostMatrix:
    """SciPy's form on a CPU; BCOO on accelerators, which multiply it faster than the host can.

    It is multiplied on the host only where JAX traces neither it nor the key. Half precision is
    unknown to SciPy.
    """
    import scipy.sparse

    if is_scipy(a):
        if jax.default_backend() != "cpu" or not on_host:
            return as_matrix(name, a, DTYPES)
        require_host(name, a.shape, a.dtype)
        rows = scipy.sparse.csr_array(a)
    else:
        a = as_matrix(name, a, DTYPES)
        known = on_host and is_concrete(a)
        if not known or a.dtype not in HOST_DTYPES or not _on_one_cpu(a.data):
            return a
        indices, entries = np.asarray(a.indices), np.asarray(a.data)
        if np.any(indices < 0):
            raise ValueError(f"{name} has negative indices; expected those of rows and columns")
        inside = (indices < a.shape).all(axis=1)  # BCOO pads with indices beyond the matrix
        i, j = indices[inside].T
        rows = scipy.sparse.csr_array((entries[inside], (i, j)), shape=a.shape)
    rows.data = rows.data.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
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
