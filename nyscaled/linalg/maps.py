"""Norms of A and of residuals LRᵀ − A, for A in every form that problems take."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from nyscaled.matrices import as_dense, as_matrix, reads, transpose_times
from nyscaled.numerics import exponent, full_precision, norm, normalized, root, shift
from nyscaled.typing import MatrixLike, Scalar

_BLOCK = 512  # rows of a residual held at once


@reads(a=as_matrix, left=as_dense, right=as_dense)
def residual(a: MatrixLike, left: Float[Array, "m r"], right: Float[Array, "n r"]) -> Scalar:
    """Return ‖L Rᵀ − A‖_F; see `squared_residual`.

    Args:
        a: A (m, n), in any form that problems take.
        left: L (m, r).
        right: R (n, r).

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> residual(4 * jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)))
        Array(3., dtype=float32)
    """
    total, e = _residual(a, left, right)
    return shift(root(total), e)


@reads(a=as_matrix, left=as_dense, right=as_dense)
def squared_residual(
    a: MatrixLike, left: Float[Array, "m r"], right: Float[Array, "n r"]
) -> Scalar:
    """Return ‖L Rᵀ − A‖_F², by blocks of entries: O(512·(m + n)) memory and no cancellation.

    The expansion ‖A‖² − 2⟨A, LRᵀ⟩ + ‖LRᵀ‖² would lose every residual under √eps·‖A‖. An operator
    is read through products with blocks of the identity.

    Args:
        a: A (m, n), in any form that problems take.
        left: L (m, r).
        right: R (n, r).

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> x = jnp.ones((2, 1))
        >>> squared_residual(jnp.ones((2, 2)), x, x)
        Array(0., dtype=float32)
    """
    total, e = _residual(a, left, right)
    return shift(shift(total, e), e)


@jax.jit
@full_precision
def _residual(
    a: MatrixLike, left: Float[Array, "m r"], right: Float[Array, "n r"]
) -> tuple[Scalar, Int[Array, ""]]:
    """s and e of ‖LRᵀ − A‖_F² = s · 4^e, whose square of a block is scaled by its largest entry."""
    m, n = a.shape
    expected = (m, left.shape[-1]), (n, left.shape[-1])
    if (left.shape, right.shape) != expected:
        raise ValueError(
            f"left and right have shapes {left.shape} and {right.shape}; "
            f"expected ({m}, r) and ({n}, r) for A {(m, n)}"
        )
    dense = isinstance(a, jax.Array)
    size = m if dense else n
    block = min(_BLOCK, size)
    e_product = exponent(left) + exponent(right)
    left, right = normalized(left)[0], normalized(right)[0]

    @jax.checkpoint
    def squared(start: Array) -> tuple[Scalar, Array]:
        rows = start + jnp.arange(block)
        if dense:
            part = lax.dynamic_slice_in_dim(left, start, block)
            product, known = part @ right.T, lax.dynamic_slice_in_dim(a, start, block)
        else:
            part = lax.dynamic_slice_in_dim(right, start, block)
            known = (a @ jax.nn.one_hot(rows, n, dtype=left.dtype, axis=0)).T
            product = part @ left.T
        e = jnp.maximum(e_product, exponent(known))
        difference = shift(product, e_product - e) - shift(known, -e)
        # The last block is moved up to fit; the rows that it repeats do not count again.
        fresh = rows >= block * ((start + block - 1) // block)
        difference, e_rest = normalized(jnp.where(fresh[:, None], difference, 0))
        return jnp.sum(difference**2), e + e_rest

    def add(i: Any, sums: tuple[Scalar, Array]) -> tuple[Scalar, Array]:
        (total, e), (more, e_more) = sums, squared(jnp.minimum(i * block, size - block))
        # Zero goes with any exponent, and with that of the others; it has second derivatives.
        common = jnp.where(total == 0, e_more, jnp.where(more == 0, e, jnp.maximum(e, e_more)))
        common = jnp.where((total == 0) & (more == 0), jnp.maximum(e, e_more), common)
        total, more = shift(total, 2 * (e - common)), shift(more, 2 * (e_more - common))
        return total + more, common

    zero = jnp.zeros((), left.dtype)
    return lax.fori_loop(0, -(-size // block), add, (zero, exponent(zero)))


@reads(a=as_matrix)
@functools.partial(jax.jit, static_argnames="num_steps")
@full_precision
def spectral_norm(a: MatrixLike, key: Key[Array, ""] | None = None, num_steps: int = 50) -> Scalar:
    """Return ‖A‖ by power iteration on AᵀA: a lower bound, tight to about 1 % or better.

    Args:
        a: a matrix or operator (m, n).
        key: for the starting vector; `jax.random.key(0)` by default.
        num_steps: pairs of products with A and Aᵀ.

    Examples:
        >>> f"{float(spectral_norm(jnp.diag(jnp.array([2.0, 1.0])))):.2f}"
        '2.00'
    """
    key = jax.random.key(0) if key is None else key

    def unit(v: Array) -> Array:
        size = norm(v)
        return v / jnp.where(size > 0, size, 1)

    def body(_: Any, v: Array) -> Array:
        return transpose_times(a, unit(a @ unit(v)))

    start = jax.random.normal(key, (a.shape[1], 1), a.dtype)
    return norm(lax.fori_loop(0, num_steps, body, start))


@reads(a=as_matrix)
@full_precision
def probed_norm(a: MatrixLike) -> Scalar:
    """Return ‖A‖_F to within a factor of about 2, by a product with four random vectors.

    Args:
        a: A (m, n), in any form that problems take.

    Examples:
        >>> bool(5 < probed_norm(jnp.eye(100)) < 20)
        True
    """
    probe = jax.random.normal(jax.random.key(0), (a.shape[1], 4), a.dtype)
    return norm(a @ probe) / 2
