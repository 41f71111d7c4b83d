"""Orthonormal bases that grow, by products and r × r factorizations only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from nyscaled.lapack import inverse_cholesky
from nyscaled.numerics import abs_squared, full_precision, normalized, shift


def adjoint(x: Inexact[Array, "m n"]) -> Inexact[Array, "n m"]:
    """Return Xᴴ."""
    return x.conj().T


@jax.jit
@full_precision
def extend(
    basis: Inexact[Array, "m k"] | None, block: Inexact[Array, "m b"]
) -> Inexact[Array, "m b"]:
    """Return an orthonormal block that, with the basis, spans the basis and the given block.

    Three passes of Cholesky QR, of which each first takes away the part along the basis. The first
    two are shifted by the rounding error of the Gram matrix, and divide the condition number by
    √(2b·eps)⁻¹ each. So blocks whose condition number is up to 1/(16·eps) become orthonormal to
    rounding. Columns of which less than that is left become exactly zero: they are rounding.

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
    eye = jnp.eye(width, dtype=block.dtype)
    eps = float(jnp.finfo(block.dtype).eps)
    # With unit columns the Gram matrix carries a rounding error of about width·eps.
    floor = 2 * width * eps
    lost = 16 * eps
    block = _unit(block, 0.0)
    for ridge, least in ((floor, lost), (floor, lost / floor**0.5), (0.0, 0.0)):
        if basis is not None:
            block = block - basis @ (adjoint(basis) @ block)
        block = _unit(block, least)
        dead = jnp.diag(jnp.all(block == 0, axis=0).astype(block.dtype))
        block = block @ inverse_cholesky(adjoint(block) @ block + dead + ridge * eye)
    return block


def _unit(block: Inexact[Array, "m b"], least: float) -> Inexact[Array, "m b"]:
    """The columns divided by their norms; those whose norm is at most `least` become zero."""
    scaled, e = normalized(block, axis=0)
    size = jnp.sqrt(jnp.sum(abs_squared(scaled), axis=0))
    small = (size == 0) | (shift(size, e[0]) <= least)
    return jnp.where(small, 0, scaled / jnp.where(size == 0, 1, size))
