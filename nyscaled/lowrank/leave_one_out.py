"""What a Nyström approximation from a block Krylov space would be without one of its vectors.

Let the basis Q span K = [Ω, AΩ, …, A^(p−1)Ω], and let F = AQ(QᴴAQ)^(−1/2), so that Â = FFᴴ.
Leaving out ω_j removes its group ω_j, Aω_j, …, A^(p−1)ω_j. With K = QR and G = QᴴAQ, the rest of
the space is the orthogonal complement in range(Q) of the columns P_j of Q⁻ᵀ-coordinates R⁻ᴴE_j of
that group. So Â⁽ʲ⁾ = F(I − C_jC_jᴴ)Fᴴ with C_j = orth(G^(−1/2)P_j): a downdate of rank p.
Because ω_j lies in range(Q), (A − Â)ω_j = 0, and (A − Â⁽ʲ⁾)ω_j = F C_jC_jᴴFᴴω_j needs no product
with A. For p = 1 this is the estimator of Epperly and Tropp; the groups are what block Krylov
spaces add to it.

R is upper triangular, because each block of Q is orthonormalized column by column. A column whose
diagonal entry is rounding has no direction of its own. It is left out of the space, which makes
the estimate larger where that matters.

References:
    Epperly and Tropp, Efficient error and variance estimation for randomized matrix computations,
    SIAM J. Sci. Comput. 46, 2024.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from nyscaled.lapack import inverse_cholesky, inverse_upper
from nyscaled.lowrank.jacobi import eigh_of_positive
from nyscaled.lowrank.orthogonal import adjoint
from nyscaled.numerics import abs_squared
from nyscaled.typing import Scalar

_ROUNDING = 32  # eps times this, of a unit column, is rounding


class Replicates(NamedTuple):
    """Â⁽ʲ⁾ = Y T (I − C_jC_jᴴ) TᴴYᴴ, j = 1, …, s, for Y = AQ."""

    root: Inexact[Array, "k k"]
    """T, with TᴴGT = I on the columns that are kept, and 0 on others."""
    removed: Inexact[Array, "p s k"]
    """C_j, its columns along the first axis; orthonormal, or zero."""
    coordinates: Inexact[Array, "k s"]
    """TᴴYᴴΩ."""


def replicates(
    gram: Inexact[Array, "k k"], start: Inexact[Array, "s s"], ridge: Scalar
) -> Replicates:
    """Return the replicates of a Nyström approximation.

    Args:
        gram: G = QᴴAQ + `ridge` I, whose first s columns belong to Ω.
        start: the upper triangular R₀ of Ω = Q₀R₀.
        ridge: the shift that makes G positive definite.
    """
    k, s = gram.shape[0], start.shape[0]
    block = jnp.concatenate([start, jnp.zeros((k - s, s), gram.dtype)])
    first, krylov = block, []
    for _ in range(k // s):
        block = block / jnp.linalg.norm(block, axis=0)
        krylov.append(block)
        block = gram @ block
    upper = jnp.triu(jnp.concatenate(krylov, axis=1))
    live = jnp.abs(jnp.diagonal(upper)) > _ROUNDING * float(jnp.finfo(gram.dtype).eps)
    both = live & live[:, None]
    dead = jnp.diag(jnp.where(live, 0, 1).astype(gram.dtype))
    inverse = jnp.where(both, inverse_upper(jnp.where(both, upper, 0) + dead), 0)
    root = jnp.where(both, inverse_cholesky(jnp.where(both, gram, 0) + ridge * dead), 0)
    removed: list[Array] = []
    for group in (inverse @ root).conj().reshape(k // s, s, k):
        vector = _unit(group)
        for _ in range(2):
            for other in removed:
                vector = vector - other * jnp.sum(other.conj() * vector, axis=1, keepdims=True)
            vector = _unit(vector)
        removed.append(vector)
    return Replicates(root, jnp.stack(removed), adjoint(root) @ (gram @ first))


def _unit(rows: Inexact[Array, "s k"]) -> Inexact[Array, "s k"]:
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    rows = rows / jnp.where(largest > 0, largest, 1)
    size = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(size > 0, size, 1)


def error(parts: Replicates, image: Inexact[Array, "m k"]) -> Scalar:
    """Return the root of the mean of ‖(A − Â⁽ʲ⁾)ω_j‖², an estimate of ‖A − Â‖_F.

    Args:
        parts: the replicates.
        image: Y = AQ, shifted.
    """
    weights = jnp.einsum("psk,ks->ps", parts.removed.conj(), parts.coordinates)
    columns = image @ (parts.root @ jnp.einsum("psk,ps->ks", parts.removed, weights))
    return jnp.sqrt(jnp.sum(abs_squared(columns)) / columns.shape[1])


def deviations(parts: Replicates, square: Inexact[Array, "k k"], rank: int) -> Float[Array, " r"]:
    """Return the jackknife estimates of √E‖P − EP‖_F² for P = uuᴴ of each leading eigenvector u.

    Args:
        parts: the replicates.
        square: YᴴY.
        rank: the number of vectors.
    """
    values, turn = eigh_of_positive(adjoint(parts.root) @ square @ parts.root)
    half = jnp.sqrt(jnp.maximum(values, 0))[:, None] * adjoint(turn)  # of Y T = U half

    def leading(removed: Inexact[Array, "p k"]) -> Inexact[Array, "r k"]:
        kept = half - (half @ removed.T) @ removed.conj()
        return eigh_of_positive(kept @ adjoint(kept))[1].T[::-1][:rank]

    vectors = jax.lax.map(leading, jnp.swapaxes(parts.removed, 0, 1))
    cosines = jnp.einsum("jrk,lrk->rjl", vectors, vectors.conj())
    # Σⱼ‖Pⱼ − mean of P‖² = s − ΣΣ|uⱼᴴuₗ|²/s
    return jnp.sqrt(jnp.sum(jnp.maximum(1 - abs_squared(cosines), 0), axis=(1, 2)) / len(vectors))
