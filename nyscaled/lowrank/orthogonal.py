"""Orthonormal bases that grow, by products and r × r factorizations only."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from nyscaled.lapack import inverse_cholesky
from nyscaled.matrices import transpose_times
from nyscaled.numerics import abs_squared, full_precision, normalized

_MOST_PASSES = 7
_MOST_GROWTH = 4  # of rounding along the basis, which adds up over blocks, without a second pass


def adjoint(x: Inexact[Array, "m n"]) -> Inexact[Array, "n m"]:
    """Return Xᴴ."""
    return x.conj().T


def inner(x: Inexact[Array, "m k"], y: Inexact[Array, "m b"]) -> Inexact[Array, "k b"]:
    """Return XᴴY of tall matrices, without a transposed copy of X.

    Args:
        x: X.
        y: Y.
    """
    if jnp.iscomplexobj(y):
        return transpose_times(x, y.conj()).conj()
    return transpose_times(x, y)


@jax.jit
@full_precision
def extend(
    basis: Inexact[Array, "m k"] | None, block: Inexact[Array, "m b"]
) -> Inexact[Array, "m b"]:
    """Return an orthonormal block that, with the basis, spans the basis and the given block.

    Passes of Cholesky QR, of which each first takes away the part along the basis. One pass is
    enough for a block of which most columns keep most of their length, and are far from dependent.
    For others there are more passes, until that holds. These are shifted by the usual rounding
    error of the Gram matrix, and divide the condition number by √(2b·eps)⁻¹ each: one for most
    blocks, three where it is 1/eps. Long sums of numbers of one sign have larger errors; where the
    Cholesky factorization fails, the shift grows. The last pass is not shifted. Directions that are
    rounding are kept: with them, what the block spans is right to rounding. Columns that depend on
    others even so become exactly zero. There are no derivatives in reverse mode;
    `linalg.orthonormalize` has them, for real blocks of full rank without a basis.

    Args:
        basis: orthonormal columns, or zero columns, (m, k). None stands for k = 0.
        block: any thin matrix (m, b).

    References:
        Fukaya et al., Shifted Cholesky QR for computing the QR factorization of ill-conditioned
        matrices, SIAM J. Sci. Comput. 42, 2020.

    Examples:
        >>> q = extend(jnp.eye(3)[:, :1], jnp.array([[1.0], [3.0], [4.0]]))
        >>> bool(jnp.allclose(q[:, 0], jnp.array([0.0, 0.6, 0.8]), atol=1e-6))
        True
    """
    width = block.shape[1]
    eps = float(jnp.finfo(block.dtype).eps)
    # With unit columns the Gram matrix usually carries a rounding error of about width·eps.
    ridge = 2 * width * eps
    nothing = jnp.zeros((), jnp.finfo(block.dtype).dtype)

    def outside(block: Array) -> _Remainder:
        along = nothing
        if basis is not None:
            parts = inner(basis, block)
            block = block - basis @ parts
            along = jnp.sum(abs_squared(parts), axis=0)
        gram = inner(block, block)
        inverse, both = reciprocal_norms(gram, 0)
        scaled = gram * both
        dead = jnp.diag((inverse == 0).astype(gram.dtype))
        root = inverse_cholesky(scaled + dead)
        # 1/d² of each column, where d is its distance from the span of the others.
        good = jnp.max(jnp.sum(abs_squared(root), axis=1)) < 4
        if basis is not None:
            # Rounding along the basis is about eps times this in units of the result.
            kept = jnp.abs(inverse) * jnp.sqrt(along + jnp.diagonal(gram).real)
            good &= jnp.max(kept @ jnp.abs(root)) < _MOST_GROWTH
        return _Remainder(block, gram, inverse[:, None] * root, good)

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        return ~state[1] & (state[2] < _MOST_PASSES)

    def one_pass(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        block, _, i, least = state
        block, gram, root, good = outside(block)
        root, shift = lax.cond(
            good, lambda: (root, nothing + 1), lambda: _inverse_root(gram, least, ridge)
        )
        # The columns of the first two passes may be rounding; later on they are unit vectors, and
        # one of which only 16·eps is left has this norm after the pass. What the last pass has is
        # kept.
        least = jnp.where((i < 1) | (i + 2 >= _MOST_PASSES), 0, 16 * eps / jnp.sqrt(shift))
        return block @ root, good, i + 1, least

    # One loop, of which the body is compiled once: blocks that need one pass leave it after one.
    start = (normalized(block, axis=0)[0], jnp.asarray(False), jnp.asarray(0), nothing)
    return lax.while_loop(unfinished, one_pass, start)[0]


class _Remainder(NamedTuple):
    """What is left of a block, its Gram matrix G, T with TᴴGT = I, and whether T is good enough."""

    block: Inexact[Array, "m b"]
    gram: Inexact[Array, "b b"]
    root: Inexact[Array, "b b"]
    good: Bool[Array, ""]


def reciprocal_norms(
    gram: Inexact[Array, "b b"], least: Float[Array, ""] | float
) -> tuple[Inexact[Array, " b"], Inexact[Array, "b b"]]:
    """Return 1/‖x_j‖, or 0 if the norm is at most `least`, and the products of two of them.

    Args:
        gram: XᴴX.
        least: the largest norm that counts as zero.
    """
    size = jnp.sqrt(jnp.diagonal(gram).real)
    dead = size <= least
    inverse = jnp.where(dead, 0, 1 / jnp.where(dead, 1, size)).astype(gram.dtype)
    return inverse, inverse[:, None] * inverse


def _inverse_root(
    gram: Inexact[Array, "b b"], least: Float[Array, ""] | float, ridge: Float[Array, ""] | float
) -> tuple[Inexact[Array, "b b"], Float[Array, ""]]:
    """T with Tᴴ(G + shift·diag(G))T = I, zero columns where the norm is at most `least`; the shift.

    The shift is `ridge`, or a larger one if G is indefinite by its rounding error.
    """
    inverse, both = reciprocal_norms(gram, least)
    scaled = gram * both
    off_diagonal = scaled - jnp.diag(jnp.diagonal(scaled))

    def root(shift: Float[Array, ""]) -> Array:
        diagonal = jnp.where(inverse == 0, 1, 1 + shift).astype(gram.dtype)
        return inverse_cholesky(off_diagonal + jnp.diag(diagonal))

    def failed(state: tuple[Array, Array, Array]) -> Array:
        found, shift, _ = state
        return ~jnp.all(jnp.isfinite(found)) & jnp.all(jnp.isfinite(scaled)) & (shift < 1)

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        shift = state[2]
        larger = jnp.maximum(16 * shift, float(jnp.finfo(gram.dtype).eps))
        return root(shift), shift, larger

    first = jnp.asarray(ridge, gram.real.dtype)
    start = (jnp.full_like(gram, jnp.nan), jnp.zeros_like(first), first)
    found, shift, _ = lax.while_loop(failed, attempt, start)
    return inverse[:, None] * found, shift
