"""What A may be, one door for all functions that take it, and its products.

| what is given                                        | what becomes of it                        |
|------------------------------------------------------|-------------------------------------------|
| an array of JAX or NumPy, rows of numbers, a         | a dense JAX array                         |
| DataFrame, anything else that NumPy reads            |                                           |
| `scipy.sparse`, every format, matrix or array        | BCOO, duplicates summed                   |
| `jax.experimental.sparse`: BCOO, BCSR, COO, CSR, CSC | BCOO                                      |
| `Operator`                                           | itself                                    |
| a pytree with `shape`, `dtype`, `T` and `@`          | itself, once both products were traced    |
| operators of SciPy or NumPy, masked arrays, …        | ValueError, which names it                |

Entries are float32 or float64 (float64 becomes float32 where JAX's x64 is off); other dtypes are a
ValueError, unless the function that reads the matrix names them. What is converted is copied once,
outside of jit: per stored entry, BCOO takes its value and two indices of 4 bytes. On a CPU a
product of BCOO with 20 columns takes about 7 times that of SciPy's CSR (10⁶ entries of a
20000 × 10000 matrix).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import sparse
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array

from nyscaled.numerics import full_precision
from nyscaled.operators import COLUMNS, Operator, require_traced
from nyscaled.typing import Factors, LinearMap

FLOATING = (jnp.float32, jnp.float64)  # the dtypes that iterations take by default

_P = ParamSpec("_P")
_R = TypeVar("_R")

_EXPECTED = (
    "expected a dense array, a sparse matrix of SciPy or jax.experimental.sparse, or a "
    "nyscaled.linalg.Operator of JAX functions"
)
_INDEX = jnp.int32  # of BCOO, also where x64 is on


def require_floating(name: str, array: Any, dtypes: Sequence[DTypeLike] = FLOATING) -> None:
    """Raise ValueError unless the dtype of `array` is one of these.

    Args:
        name: what errors call the array.
        array: anything with a dtype.
        dtypes: by default float32 and float64 (the r×r work needs no less).
    """
    if array.dtype not in dtypes:
        *names, last = (jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(
            f"{name} has dtype {array.dtype}; expected {', '.join(names)} or {last} "
            "(convert it with .astype)"
        )


def as_matrix(name: str, a: Any, dtypes: Sequence[DTypeLike] = FLOATING) -> Any:
    """Return `a` as a dense JAX array, a BCOO or an operator, by the table of this module.

    Args:
        name: what errors call it.
        a: a matrix (m, n).
        dtypes: the dtypes that it may have; float32 and float64 by default.

    Raises:
        ValueError: on what is not a matrix of these dtypes.

    Examples:
        >>> import scipy.sparse
        >>> as_matrix("A", scipy.sparse.eye_array(3, dtype="float32"))
        BCOO(float32[3, 3], nse=3)
    """
    if isinstance(a, sparse.JAXSparse):
        _require_matrix(name, a, dtypes)
        return _from_jax(a)
    if is_scipy(a):
        _require_matrix(name, a, dtypes)
        return _from_scipy(name, a)
    if not _is_operator(a):
        a = as_array(name, a, _EXPECTED)
    elif not isinstance(a, Operator):
        _require_products(name, a, dtypes)
    _require_matrix(name, a, dtypes)
    return a


def as_array(name: str, a: Any, expected: str = "expected a dense array of numbers") -> Array:
    """Return `a` as a dense JAX array.

    Args:
        name: what errors call it.
        a: an array of any shape and dtype.
        expected: the end of errors.

    Raises:
        ValueError: on a sparse matrix, an operator, and what JAX or NumPy do not read as numbers.
    """
    if isinstance(a, jax.Array):
        return a
    if isinstance(a, sparse.JAXSparse) or is_scipy(a) or _is_operator(a):
        raise ValueError(f"{name} is a {type(a).__name__}; {expected}")
    # NumPy reads more than JAX does: tensors, DataFrames. But it drops masks without a word.
    by_numpy = hasattr(a, "__array__") and not hasattr(a, "__jax_array__") and not np.ma.isMA(a)
    try:
        array = np.asarray(a) if by_numpy else a
        if isinstance(array, np.ndarray):  # JAX takes only the byte order of the machine
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
        return jnp.asarray(array)
    except Exception as error:  # what the object's own conversion raises
        dtype = f" of dtype {a.dtype}" if hasattr(a, "dtype") else ""
        raise ValueError(f"{name} is a {type(a).__name__}{dtype}; {expected}") from error


def as_factors(factors: Any) -> Factors:
    """Return a pair of factors as dense JAX arrays; ValueError on what is none."""
    if not isinstance(factors, tuple) or len(factors) != 2:
        got = "an array" if isinstance(factors, jax.Array) else f"a {type(factors).__name__}"
        raise ValueError(f"factors are {got}; expected nyscaled.Factors(left, right)")
    return Factors(as_array("left", factors[0]), as_array("right", factors[1]))


def as_dense(name: str, x: Any) -> Array:
    """Return `x` as a dense matrix of float32 or float64; ValueError on what is none."""
    x = as_array(name, x)
    _require_matrix(name, x)
    return x


def reads(**readers: Callable[[str, Any], Any]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that reads arguments by `as_matrix`, `as_dense` or `as_array` first.

    Examples:
        >>> @reads(a=as_matrix)
        ... def rows(a):
        ...     return a.shape[0]
        >>> rows([[1.0, 2.0]])
        1
    """

    def decorate(fn: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            for name, reader in readers.items():
                label = name.upper() if len(name) == 1 else name
                bound.arguments[name] = reader(label, bound.arguments[name])
            return fn(*bound.args, **bound.kwargs)

        return wrapped

    return decorate


def transpose_times(a: Any, x: Array) -> Array:
    """Return Aᵀ @ x for a thin x, without a transposed copy of a dense A.

    XLA's CPU compiler copies A for `a.T @ x`, which takes longer than the product. Contracting the
    rows of both, with x first, reads A as it lies. In float64 it takes a quarter less time if x is
    transposed before; in float32 more.

    Args:
        a: A (m, n): dense, sparse or an operator.
        x: (m, k).

    Returns:
        (n, k).

    Examples:
        >>> transpose_times(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))
        Array([[3.],
               [6.]], dtype=float32)
    """
    if not isinstance(a, jax.Array):
        return a.T @ x
    if x.dtype == jnp.float64:
        product = lax.optimization_barrier(x.T) @ a
    else:
        product = lax.dot_general(x, a, (((0,), (0,)), ((), ())))
    return lax.optimization_barrier(product).T  # or XLA would turn it into (a.T @ x) again


def _require_matrix(name: str, a: Any, dtypes: Sequence[DTypeLike] = FLOATING) -> None:
    if len(a.shape) != 2:
        raise ValueError(f"{name} has shape {tuple(a.shape)}; expected a matrix, (m, n)")
    require_floating(name, a, dtypes)


def is_scipy(a: object) -> bool:
    """Return whether `a` is a sparse matrix or array of SciPy, which is not imported for that."""
    # Who has such a matrix has imported the module, and nobody else needs it.
    scipy_sparse = sys.modules.get("scipy.sparse")
    return scipy_sparse is not None and scipy_sparse.issparse(a)


def _is_operator(a: Any) -> bool:
    arrays = hasattr(a, "__array__") or hasattr(a, "__jax_array__")
    return not arrays and isinstance(a, LinearMap)


def _from_scipy(name: str, a: Any) -> sparse.BCOO:
    if max(a.shape) > jnp.iinfo(_INDEX).max:
        raise ValueError(
            f"{name} has shape {a.shape}; expected sides that fit in {_INDEX.__name__}"
        )
    rows = a.tocsr()
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    entries = rows.tocoo()
    indices = jnp.asarray(np.stack([entries.row, entries.col], axis=1), _INDEX)
    data = jnp.asarray(entries.data)
    return sparse.BCOO((data, indices), shape=a.shape, indices_sorted=True, unique_indices=True)


def _from_jax(a: Any) -> Any:
    if isinstance(a, sparse.COO):
        return sparse.BCOO((a.data, jnp.stack([a.row, a.col], axis=1)), shape=a.shape)
    if isinstance(a, sparse.CSC):
        return _from_jax(sparse.CSR((a.data, a.indices, a.indptr), shape=a.shape[::-1])).T
    if isinstance(a, sparse.CSR):
        a = sparse.BCSR((a.data, a.indices, a.indptr), shape=a.shape)
    a = a.to_bcoo() if isinstance(a, sparse.BCSR) else a
    if a.n_batch or a.n_dense:  # of which JAX has no transpose
        return sparse.bcoo_update_layout(a, n_batch=0, n_dense=0)
    return a


def _require_products(name: str, a: Any, dtypes: Sequence[DTypeLike]) -> None:
    """Raise ValueError unless JAX can trace A @ x and Aᵀ @ y, with the shapes and dtype of A."""
    _require_matrix(name, a, dtypes)
    m, n = a.shape
    try:
        if jax.tree_util.all_leaves([a]):
            raise ValueError("it is not a pytree of JAX arrays, so its products cannot be compiled")
        for product, (rows, columns) in ((_times, (m, n)), (_transposed_times, (n, m))):
            thin = jax.ShapeDtypeStruct((columns, COLUMNS), a.dtype)
            require_traced("its product", product, (a, thin), (rows, COLUMNS), a.dtype)
    except ValueError as error:
        raise ValueError(f"{name} is a {type(a).__name__}, and {error}; {_EXPECTED}") from error


def _times(a: Any, x: Array) -> Any:
    return a @ x


def _transposed_times(a: Any, y: Array) -> Any:
    return a.T @ y


def symmetric_part(a: LinearMap) -> LinearMap:
    """Return (A + Aᵀ)/2 of a square A; known by its products, unless A is dense.

    Examples:
        >>> symmetric_part(jnp.array([[0.0, 2.0], [0.0, 1.0]]))
        Array([[0., 1.],
               [1., 1.]], dtype=float32)
    """
    if a.shape[0] != a.shape[1]:
        raise ValueError(f"the matrix has shape {tuple(a.shape)}; expected a square one")
    if isinstance(a, jax.Array):
        return (a + a.T) / 2
    product = Partial(_symmetric_product, a)
    return Operator(product, product, (a.shape[0], a.shape[1]), a.dtype)


@full_precision
def _symmetric_product(a: LinearMap, x: Array) -> Array:
    return (a @ x + transpose_times(a, x)) / 2
