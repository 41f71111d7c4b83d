"""What `nys.factorize` takes, one door: matrices that JAX traces, and matrices of the host.

A matrix of the host is known by products on NumPy arrays, which are made outside of compiled code.

| what is given                                       | what becomes of it                         |
|-----------------------------------------------------|--------------------------------------------|
| all that `nyscaled.matrices.as_matrix` takes, also  | an array, a BCOO or an `Operator`,         |
| in half precision or complex                        | in its own dtype                           |
| sparse matrices of SciPy and JAX                    | `SparseMatrix` on a CPU, BCOO elsewhere    |
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
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact

from nyscaled.matrices import Operator, as_matrix, is_scipy, require_floating
from nyscaled.typing import LinearMap, MatrixLike
from nyscaled.validation import is_concrete

HOST_DTYPES = (jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)  # which SciPy multiplies
DTYPES = (jnp.bfloat16, jnp.float16, *HOST_DTYPES)

HostArray = Inexact[np.ndarray, "_ _"]
Product = Callable[[HostArray], HostArray]


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
        ValueError: on what is neither, and on dtypes other than floats and complex numbers.

    Examples:
        >>> import scipy.sparse
        >>> a = as_input("A", scipy.sparse.eye_array(3, dtype="float32"))
        >>> a.times(np.ones((3, 1), np.float32)).T
        array([[1., 1., 1.]], dtype=float32)
    """
    if _is_stored(a):
        from nyscaled.lowrank.stream import RowBlocks  # it imports this file

        return RowBlocks(a)
    if isinstance(a, Operator | jax.Array | np.ndarray):
        return as_matrix(name, a, DTYPES)
    if isinstance(a, HostMatrix):
        _require_host(name, a.shape, a.dtype)
        return a
    if isinstance(a, sparse.JAXSparse) or is_scipy(a):
        return _sparse(name, a)
    lineax = sys.modules.get("lineax")  # who has such an operator has imported the module
    if lineax is not None and isinstance(a, lineax.AbstractLinearOperator):
        return _from_lineax(name, a)
    if isinstance(a, _Products) and jax.tree_util.all_leaves([a]):
        return HostOperator(a.matmat, a.rmatmat, a.shape, a.dtype, name=name)
    return as_matrix(name, a, DTYPES)


class HostOperator:
    """A matrix known only by its products, which are functions of NumPy arrays.

    For functions of JAX use `nyscaled.linalg.Operator`, which is compiled. Results are checked:
    their shape and dtype, NaN and Inf, and once, for random vectors u and w, whether
    ⟨y u, A x w⟩ = ⟨Aᴴ y u, x w⟩ of blocks x and y that were multiplied anyhow.

    Args:
        times: x ↦ A x, (n, k) → (m, k).
        adjoint_times: y ↦ Aᴴ y, (m, k) → (n, k): of the conjugate transpose if A is complex.
        shape: (m, n).
        dtype: of the products: float32, float64, complex64 or complex128.
        name: what errors call the matrix.

    Raises:
        ValueError: on a wrong shape or dtype; its products raise it where a check fails.

    Examples:
        >>> d = np.array([[1.0], [2.0]], np.float32)
        >>> a = HostOperator(lambda x: d * x, lambda y: d * y, shape=(2, 2), dtype=np.float32)
        >>> a.times(np.ones((2, 1), np.float32)).T
        array([[1., 2.]], dtype=float32)
    """

    def __init__(
        self,
        times: Product,
        adjoint_times: Product,
        shape: Sequence[int],
        dtype: DTypeLike,
        name: str = "the operator",
    ) -> None:
        for label, fn in (("times", times), ("adjoint_times", adjoint_times)):
            if not callable(fn):
                raise ValueError(f"{label} is a {type(fn).__name__}; expected a function of NumPy")
        self.shape = tuple(map(int, shape))
        self.dtype = np.dtype(dtype)
        self._name = name
        _require_host(name, self.shape, self.dtype)
        self._products = times, adjoint_times
        self._sample: tuple[int, _Sample] | None = None
        self._agree = False

    def times(self, x: Inexact[np.ndarray, "n k"], /) -> Inexact[np.ndarray, "m k"]:
        """Return A x."""
        return self._product(0, x)

    def adjoint_times(self, y: Inexact[np.ndarray, "m k"], /) -> Inexact[np.ndarray, "n k"]:
        """Return Aᴴ y."""
        return self._product(1, y)

    def _product(self, side: int, x: HostArray) -> HostArray:
        label = f"{self._name}'s product " + ("A x", "Aᴴ y")[side]
        x = np.asarray(x, self.dtype)
        try:
            image = self._products[side](x)
        except Exception as error:  # what somebody else's function raises
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{label} failed ({reason}); expected a NumPy array") from error
        if not isinstance(image, np.ndarray):
            raise ValueError(f"{label} is a {type(image).__name__}; expected a NumPy array")
        shape = (self.shape[side], x.shape[1])
        if (image.shape, image.dtype) != (shape, self.dtype):
            got = f"{image.shape} {image.dtype}"
            raise ValueError(f"{label} is {got}; expected {shape} {self.dtype}")
        if not all_finite(image):
            raise ValueError(f"{label} has NaN or Inf entries; expected finite ones")
        if not self._agree:
            self._compare(side, _Sample.of(x, image))
        return image

    def _compare(self, side: int, sample: _Sample) -> None:
        """Raise ValueError unless this product agrees with the last one from the other side."""
        other, self._sample = self._sample, (side, sample)
        if other is None or other[0] == side:
            return
        self._agree = True
        x, y = (sample, other[1]) if side == 0 else (other[1], sample)
        forms = x.gain * np.vdot(y.unit, x.image), y.gain * np.vdot(y.image, x.unit)
        tolerance = float(np.finfo(self.dtype).eps) ** 0.5
        if abs(forms[0] - forms[1]) > tolerance * max(x.gain, y.gain):
            raise ValueError(
                f"{self._name}'s products disagree: ⟨y, A x⟩ is {forms[0]:.6g} and ⟨Aᴴ y, x⟩ is "
                f"{forms[1]:.6g} for unit vectors; expected equal numbers (adjoint_times, or "
                "rmatmat, must multiply by the conjugate transpose of A)"
            )


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A vector and its image, both scaled to norm 1, and by what the product lengthened it."""

    unit: np.ndarray
    image: np.ndarray
    gain: float

    @staticmethod
    def of(x: HostArray, image: HostArray) -> _Sample:
        """Return a random combination of columns and of their images."""
        k = x.shape[1]
        weights = (np.random.default_rng(k).uniform(0.5, 1, k) / k).astype(x.dtype)
        (unit, length), (image, stretched) = _unit(x @ weights), _unit(image @ weights)
        return _Sample(unit, image, stretched / length if length else 0.0)


def _unit(v: np.ndarray) -> tuple[np.ndarray, float]:
    """Return v/‖v‖ in double precision, and ‖v‖; no square overflows."""
    wide = v.astype(np.result_type(v, np.float64))
    largest = float(np.max(np.abs(wide)))
    scaled = wide / (largest or 1.0)
    length = float(np.linalg.norm(scaled))
    return scaled / (length or 1.0), largest * length


def all_finite(array: np.ndarray) -> bool:
    """Return whether an array has neither NaN nor Inf."""
    with np.errstate(over="ignore", invalid="ignore"):  # a sum is cheaper, and can overflow
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


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
        if jax.default_backend() != "cpu":
            return as_matrix(name, a, DTYPES)
        _require_host(name, a.shape, a.dtype)
        rows = scipy.sparse.csr_array(a)
    else:
        a = as_matrix(name, a, DTYPES)
        if not is_concrete(a) or a.dtype not in HOST_DTYPES or not _on_one_cpu(a.data):
            return a
        indices, entries = np.asarray(a.indices), np.asarray(a.data)
        inside = (indices < a.shape).all(axis=1)  # BCOO pads with indices beyond the matrix
        i, j = indices[inside].T
        rows = scipy.sparse.csr_array((entries[inside], (i, j)), shape=a.shape)
    rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
    if not all_finite(rows.data):
        raise ValueError(f"{name} has NaN or Inf entries; expected finite ones")
    return SparseMatrix(rows)


def _on_one_cpu(array: Array) -> bool:
    return [device.platform for device in array.devices()] == ["cpu"]


def _require_host(name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name} has shape {tuple(shape)}; expected a matrix, (m, n)")
    require_floating(name, jax.ShapeDtypeStruct((), dtype), HOST_DTYPES)


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
