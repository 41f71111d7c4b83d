"""Arrays of the host: the dtypes, shapes and arguments that products of NumPy take."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Inexact

from nyscaled.matrices import require_floating
from nyscaled.operators import as_shape
from nyscaled.typing import MatrixLike
from nyscaled.validation import is_concrete

HOST_DTYPES = (jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)  # which SciPy multiplies

HostArray = Inexact[np.ndarray, "_ _"]


def as_dtype(name: str, dtype: DTypeLike | None) -> np.dtype:
    """Return `dtype` in the byte order of the machine; ValueError on what is none.

    Args:
        name: what errors call it.
        dtype: what a user passed.
    """
    try:
        if dtype is None:  # which NumPy takes for float64
            raise TypeError
        return np.dtype(dtype).newbyteorder("=")
    except Exception:  # of many classes
        raise ValueError(f"{name} is {dtype!r}; expected a dtype, such as np.float32") from None


def as_argument(product: str, x: MatrixLike, rows: int, dtype: np.dtype) -> HostArray:
    """Return the thin matrix that a product is made with, in its dtype.

    Args:
        product: what errors call the product.
        x: what it is made with.
        rows: how many rows it must have.
        dtype: of the product.

    Raises:
        ValueError: on a traced array, another number of rows, and a dtype that would lose
            imaginary parts.
    """
    require_outside_of_jit(f"the argument of {product}", x)
    x = np.asarray(x)
    if x.ndim != 2 or len(x) != rows or not np.can_cast(x.dtype, dtype, "same_kind"):
        raise ValueError(
            f"the argument of {product} has shape {x.shape} and dtype {x.dtype}; expected "
            f"({rows}, k) for {dtype}"
        )
    return np.asarray(x, dtype)


def require_host(name: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Raise ValueError unless the host multiplies matrices of this shape and dtype.

    Args:
        name: what errors call the matrix.
        shape: its shape.
        dtype: its dtype.
    """
    as_shape(name, shape)
    require_floating(name, jax.ShapeDtypeStruct((), dtype), HOST_DTYPES)


def require_outside_of_jit(name: str, *values: object) -> None:
    """Raise ValueError where JAX traces: NumPy multiplies known numbers only.

    Args:
        name: what errors call the matrix.
        *values: what must be known besides.
    """
    if not is_concrete((np.empty(1), *values)):
        raise ValueError(
            f"{name} is multiplied by NumPy and is traced by JAX; expected a call outside of jit, "
            "vmap and grad (or a dense array, a BCOO or a nyscaled.linalg.Operator)"
        )


def all_finite(array: np.ndarray) -> bool:
    """Return whether an array has neither NaN nor Inf."""
    with np.errstate(over="ignore", invalid="ignore"):  # a sum is cheaper, and can overflow
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())
