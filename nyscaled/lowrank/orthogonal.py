"""Orthonormal bases that grow, by products and r × r factorizations only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from nyscaled.lapack import inverse_cholesky
from nyscaled.matrices import transpose_times
from nyscaled.numerics import full_precision, normalized

_MOST_PASSES = 6


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

    Passes of Cholesky QR, of which each first takes away the part along the basis. They are shifted
    by the usual rounding error of the Gram matrix, and divide the condition number by √(2b·eps)⁻¹
    each, until it is small: one pass for most blocks, three where it is 1/eps. Long sums of numbers
    of one sign have larger errors; where the Cholesky factorization fails, the shift grows. A last
    pass is not shifted. Directions that are rounding are kept: with them, what the block spans is
    right to rounding. Columns that depend on others even so become exactly zero. There are no
    derivatives in reverse mode; `linalg.orthonormalize` has them, for real blocks of full rank
    without a basis.

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

    def outside(block: Array) -> tuple[Array, Array]:
        """What is left of the block, and its Gram matrix."""
        if basis is not None:
            block = block - basis @ inner(basis, block)
        return block, inner(block, block)

    def dependent(gram: Array) -> Array:
        scaled = gram * _reciprocal_norms(gram, 0)[1]
        return jnp.max(jnp.abs(scaled - jnp.diag(jnp.diagonal(scaled)))) > 0.1 / width

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        return dependent(state[1]) & (state[2] < _MOST_PASSES)

    def again(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        block, gram, i, least = state
        root, shift = _inverse_root(gram, least, ridge)
        # The columns of the first two passes may be rounding; later on they are unit vectors, and
        # one of which only 16·eps is left has this norm after the pass.
        least = jnp.where(i < 1, 0, 16 * eps / jnp.sqrt(shift))
        return *outside(block @ root), i + 1, least

    block, gram = outside(normalized(block, axis=0)[0])
    nothing = jnp.zeros((), gram.real.dtype)
    start = again((block, gram, jnp.asarray(0), nothing))
    block, gram, _, _ = lax.while_loop(unfinished, again, start)
    return block @ _inverse_root(gram, 0, jnp.where(dependent(gram), ridge, 0))[0]


def _reciprocal_norms(
    gram: Inexact[Array, "b b"], least: Float[Array, ""] | float
) -> tuple[Inexact[Array, " b"], Inexact[Array, "b b"]]:
    """1/‖x_j‖, or 0 if the norm is at most `least`, and the products of two of them."""
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
    inverse, both = _reciprocal_norms(gram, least)
    scaled = gram * both
    off_diagonal = scaled - jnp.diag(jnp.diagonal(scaled))

    def root(shift: Float[Array, ""]) -> Array:
        diagonal = jnp.where(inverse == 0, 1, 1 + shift).astype(gram.dtype)
        return inverse_cholesky(off_diagonal + jnp.diag(diagonal))

    def failed(state: tuple[Array, Array]) -> Array:
        found, shift = state
        return ~jnp.all(jnp.isfinite(found)) & jnp.all(jnp.isfinite(scaled)) & (shift < 1)

    def larger(state: tuple[Array, Array]) -> tuple[Array, Array]:
        shift = jnp.maximum(16 * state[1], float(jnp.finfo(gram.dtype).eps))
        return root(shift), shift

    shift = jnp.asarray(ridge, gram.real.dtype)
    found, shift = lax.while_loop(failed, larger, (root(shift), shift))
    return inverse[:, None] * found, shift
