"""Floating point in which no size matters: full products, exact powers of two, safe norms.

The library is equivariant in scale: what it computes from cA is what it computes from A, scaled,
for every c for which both fit into the dtype. Squares of entries do not fit, so norms and residuals
are taken of numbers that were divided by a power of two, which rounds nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Inexact, Int

try:
    from jax import enable_x64
except ImportError:  # in older versions of jax
    from jax.experimental import enable_x64  # pyright: ignore[reportAttributeAccessIssue]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_OF_ZERO = -(1 << 20)  # the exponent of zero: far below any other, and sums of it fit an int32


def full_precision(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return `fn` with products in full float32 (accelerators round to bfloat16 or TF32)."""

    @functools.wraps(fn)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return wrapped


def keeping(dtype: DTypeLike) -> AbstractContextManager[object]:
    """Return a context in which JAX's x64 is on if a dtype needs it, and off if not.

    Only the current thread is changed. Results should leave the context as NumPy arrays.

    Args:
        dtype: of what is computed.

    Examples:
        >>> with keeping("float64"):
        ...     jnp.ones(1, "float64").dtype
        dtype('float64')
    """
    return enable_x64(jnp.dtype(dtype) in (jnp.dtype("float64"), jnp.dtype("complex128")))


def at_least_float32(x: Array) -> Array:
    """Return x in float32, or as it is if its dtype is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.jit, static_argnames=("axis", "keepdims"), inline=True)
def exponent(
    x: Inexact[Array, "*n"], axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> Int[Array, "*k"]:
    """Return the integer e with 2^e ≤ max|x| < 2^(e+1), of complex x for its parts.

    Zero has a very small exponent, and NaN and Inf have the exponent 0.

    Args:
        x: float32, float64, or complex numbers of these.
        axis: the maximum is taken over it; over all axes by default.
        keepdims: as in NumPy.

    Examples:
        >>> exponent(jnp.array([3.0, -9.0]))
        Array(3, dtype=int32)
    """
    x = lax.stop_gradient(x)
    # The modulus of a complex number can overflow where its parts do not.
    sizes = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)
    largest = jnp.max(sizes, axis=axis, keepdims=keepdims, initial=0)
    info = jnp.finfo(largest.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    biased = lax.bitcast_convert_type(largest, integer) >> info.nmant
    unbiased = biased - (info.maxexp - 1)
    known = jnp.where(unbiased == info.maxexp, 0, unbiased)
    return jnp.where(biased == 0, _OF_ZERO, known).astype(jnp.int32)


@functools.partial(jax.jit, inline=True)
def shift(x: Inexact[Array, "*n"], n: Int[Array, "*k"] | int) -> Inexact[Array, "*n"]:
    """Return x · 2^n, without rounding unless the result leaves the range of normal numbers.

    Args:
        x: float32 or float64.
        n: integers that broadcast against x.

    Examples:
        >>> shift(jnp.array(3.0), -1)
        Array(1.5, dtype=float32)
    """
    info = jnp.finfo(x.dtype)
    low, high = info.minexp, info.maxexp - 1
    # 2^-n of a normal number need not be normal: two factors, of which the second may be 0.
    first = jnp.clip(n, low, high)
    second = jnp.clip(n - first, low - 1, high)
    return x * _power(first, info.dtype) * _power(second, info.dtype)


def _power(n: Array, dtype: jnp.dtype) -> Array:
    """2^n of an exponent in range; 0 of the one below the range."""
    info = jnp.finfo(dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    biased = jnp.asarray(n + (info.maxexp - 1), integer)
    return lax.bitcast_convert_type(biased << info.nmant, dtype)


@functools.partial(jax.jit, static_argnames="axis", inline=True)
def normalized(
    x: Inexact[Array, "*n"], axis: int | tuple[int, ...] | None = None
) -> tuple[Inexact[Array, "*n"], Int[Array, "*k"]]:
    """Return x · 2^(−e) and e, with 1 ≤ max|x| · 2^(−e) < 2; of x = 0 e is 0.

    So derivatives at 0 stay in range.

    Args:
        x: float32 or float64.
        axis: the maximum is taken over it, and kept as an axis of length 1 of e.
    """
    e = exponent(x, axis, keepdims=axis is not None)
    e = jnp.where(e == _OF_ZERO, 0, e)
    return shift(x, -e), e


def abs_squared(x: Inexact[Array, "*n"]) -> Float[Array, "*n"]:
    """Return |x|² of each entry."""
    return x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x**2


def root(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Return √x, whose derivative at 0 is taken as 0."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def clipped(x: Float[Array, "*n"], low: ArrayLike, high: ArrayLike) -> Float[Array, "*n"]:
    """Return x, or the bound that it is beyond; NaN stays NaN.

    The derivative of `jnp.clip`, of maxima and minima compares results with operands. Where XLA
    computes an operand twice, rounded differently, it finds neither and gives 0; this does not.

    Args:
        x: an array of floats.
        low: the lower bound.
        high: the upper bound, not below `low`.

    Examples:
        >>> clipped(jnp.array([-1.0, 0.5, 2.0]), 0, 1)
        Array([0. , 0.5, 1. ], dtype=float32)
    """
    return jnp.where(x < low, low, jnp.where(x > high, high, x)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="axis", inline=True)
def norm(x: ArrayLike, axis: int | tuple[int, ...] | None = None) -> Float[Array, "*n"]:
    """Return the Euclidean (Frobenius) norm, finite and not 0 wherever its value can be so.

    Its derivative at 0 is taken as 0.

    Args:
        x: an array of floats.
        axis: the norm is taken over it; over all axes by default.

    Examples:
        >>> norm(jnp.array([3e-30, 4e-30]))
        Array(5.e-30, dtype=float32)
    """
    x = jnp.asarray(x)
    scaled, e = normalized(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis)
    total = jnp.sum(abs_squared(scaled), axis=axis)
    return shift(root(total), e if axis is None else jnp.squeeze(e, axis))


def tree_norm(tree: object) -> Float[Array, ""]:
    """Return the norm of all leaves of `tree` together."""
    return norm(jnp.stack([norm(leaf) for leaf in jax.tree.leaves(tree)]))
