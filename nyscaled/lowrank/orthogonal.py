"""Orthonormal bases that grow, by products and r × r factorizations only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from nyscaled.lapack import inverse_cholesky
from nyscaled.numerics import abs_squared, full_precision, normalized


def adjoint(x: Inexact[Array, "m n"]) -> Inexact[Array, "n m"]:
    """Return Xᴴ."""
    return x.conj().T


@jax.jit
@full_precision
def extend(
    basis: Inexact[Array, "m k"] | None, block: Inexact[Array, "m b"]
) -> Inexact[Array, "m b"]:
    """Return an orthonormal block that, with the basis, spans the basis and the given block.

    Passes of Cholesky QR, of which each first takes away the part along the basis. Passes are
    shifted by the rounding error of the Gram matrix, and divide the condition number by
    √(2b·eps)⁻¹, until it is small; that takes one for most blocks and two where it is up to
    1/(16·eps). A last one is not shifted. Columns of which less than that is left are rounding, and
    become exactly zero.

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
    # With unit columns the Gram matrix carries a rounding error of about width·eps.
    ridge = 2 * width * eps
    lost = 16 * eps

    def outside(block: Array) -> tuple[Array, Array]:
        """What is left of the block, and its Gram matrix."""
        if basis is not None:
            block = block - basis @ (adjoint(basis) @ block)
        return block, adjoint(block) @ block

    block, _ = normalized(block, axis=0)
    least = lost * jnp.sqrt(jnp.sum(abs_squared(block), axis=0))
    block, gram = outside(block)
    block, gram = outside(block @ _inverse_root(gram, least, ridge))

    def ill_conditioned(state: tuple[Array, Array]) -> Array:
        gram = state[1]
        return jnp.max(jnp.abs(gram - jnp.diag(jnp.diagonal(gram)))) > 0.1 / width

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        block, gram = state
        return outside(block @ _inverse_root(gram, lost / ridge**0.5, ridge))

    block, gram = lax.while_loop(ill_conditioned, again, (block, gram))
    return block @ _inverse_root(gram, lost / ridge**0.5, 0.0)


def _inverse_root(
    gram: Inexact[Array, "b b"], least: Float[Array, " b"] | float, ridge: float
) -> Inexact[Array, "b b"]:
    """T with Tᴴ(G + ridge·diag(G))T = I, and zero columns where the norm is at most `least`."""
    size = jnp.sqrt(jnp.diagonal(gram).real)
    dead = size <= least
    inverse = jnp.where(dead, 0, 1 / jnp.where(dead, 1, size)).astype(gram.dtype)
    scaled = inverse[:, None] * gram * inverse
    diagonal = jnp.where(dead, 1, 1 + ridge).astype(gram.dtype)
    off_diagonal = scaled - jnp.diag(jnp.diagonal(scaled))
    return inverse[:, None] * inverse_cholesky(off_diagonal + jnp.diag(diagonal))
