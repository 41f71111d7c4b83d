"""Estimates of errors and variances of a factorization, from what was computed for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from nyscaled.lapack import inverse_upper
from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.one_sided import RowSpace
from nyscaled.lowrank.orthogonal import adjoint, extend, inner
from nyscaled.lowrank.result import Deviations
from nyscaled.numerics import full_precision, norm, shift
from nyscaled.typing import Scalar


@jax.jit
@full_precision
def left_out(basis: Inexact[Array, "m k"], images: Inexact[Array, "m s"]) -> tuple[Scalar, Scalar]:
    """Return ‖Y − QQᴴY‖_F and ‖Y‖_F.

    Args:
        basis: Q, orthonormal columns.
        images: Y.
    """
    return norm(images - basis @ inner(basis, images)), norm(images)


def probed_error(
    basis: Inexact[Array, "m k"], images: Inexact[Array, "m s"], deviation: float
) -> Scalar:
    """Return an estimate of ‖A − QQᴴA‖_F from images AG of Gaussian probes G (n, s).

    The square of the estimate is unbiased if the basis Q does not depend on the probes. It is a sum
    of independent multiples of χ²_s / s. So it is below a quarter of the squared error with a
    probability of at most P(χ²_s ≤ s/4), which is 2 % for s = 8: that of a remainder of rank one.

    Args:
        basis: Q, orthonormal columns.
        images: AG.
        deviation: the standard deviation of the entries of G.
    """
    return left_out(basis, images)[0] / (deviation * images.shape[1] ** 0.5)


@functools.partial(jax.jit, static_argnums=3)
@full_precision
def probed_remainder(
    space: RowSpace, draws: Inexact[Array, "n s"], images: Inexact[Array, "m s"], deviation: float
) -> Scalar:
    """Return an estimate of ‖A − A P Pᴴ‖_F as `probed_error` does, without a basis of A P.

    Args:
        space: P, and its images.
        draws: G.
        images: AG.
        deviation: the standard deviation of the entries of G.
    """
    parts = shift(inner(space.right, draws), space.exponents.T)
    return norm(images - space.images @ parts) / (deviation * images.shape[1] ** 0.5)


def leave_one_out_error(
    basis: Inexact[Array, "m b"], images: Inexact[Array, "m b"], deviation: float
) -> Scalar:
    """Return an estimate of ‖A − QQᴴA‖_F from AΩ, whose range Q spans.

    Column j of AΩ, without its part in the span of the other columns, is a probe of the error
    that the others leave. Its norm is 1/‖R⁻ᴴe_j‖ for AΩ = QR. The mean of the squares is the
    expected squared error of a sketch of one column less.

    Args:
        basis: Q, from `extend`, which makes R upper triangular.
        images: AΩ for a Gaussian Ω.
        deviation: the standard deviation of the entries of Ω.

    References:
        Epperly and Tropp, Efficient error and variance estimation for randomized matrix
        computations, SIAM J. Sci. Comput. 46, 2024.
    """
    size = norm(images, axis=0)
    scaled = images / jnp.where(size == 0, 1, size)
    solved = norm(inverse_upper(inner(basis, scaled)), axis=1)
    distances = size / jnp.where(jnp.isfinite(solved), solved, jnp.inf)
    return norm(distances) / (deviation * images.shape[1] ** 0.5)


def jackknife(
    core: Inexact[Array, "k j"],
    triples: tuple[Inexact[Array, "k i"], Float[Array, " i"], Inexact[Array, "i j"]],
    start: Inexact[Array, "b b"],
    rank: int,
) -> Deviations:
    """Return the jackknife estimates of how far singular vectors would move under another Ω.

    The factorization is repeated without each column of Ω, inside the Krylov space that is known:
    A acts there as the core C, so nothing of size m or n is touched. The sum of squares over the
    replicates about their mean is, in expectation, at least the variance of the method with one
    column less.

    Args:
        core: C of the projection QQᴴA = Q C Pᴴ.
        triples: its SVD, as from `core_svd`.
        start: the coordinates of AΩ in the first block of Q.
        rank: how many singular vectors are looked at.

    Raises:
        ValueError: if C has no more than `rank` rows, so that a replicate has too few vectors.

    References:
        Epperly and Tropp, Efficient error and variance estimation for randomized matrix
        computations, SIAM J. Sci. Comput. 46, 2024.
    """
    u, _, vh = triples
    width = start.shape[1]
    if len(core) <= rank:
        raise ValueError(
            f"jackknife is True for rank {rank} of {len(core)} columns; expected a rank below "
            f"{len(core)}: it leaves out one column at a time"
        )
    others = (jnp.arange(width)[:, None] + 1 + jnp.arange(width - 1)) % width
    padded = jnp.pad(start, ((0, core.shape[0] - width), (0, 0)))

    def replicate(columns: Array) -> tuple[Array, Array]:
        block = basis = extend(None, padded[:, columns])
        for done in range(width, len(core), width):
            block = block[:, : len(core) - done]  # the last block may be narrower
            block = extend(basis, core @ (adjoint(core) @ block))
            basis = jnp.concatenate([basis, block], axis=1)
        left, _, right = core_svd(adjoint(basis) @ core)
        return (basis @ left)[:, :rank], adjoint(right)[:, :rank]

    lefts, rights = lax.map(replicate, others)

    def deviation(vectors: Array, reference: Array) -> Array:
        inner = jnp.einsum("jki,ki->ji", vectors, reference.conj())
        size = jnp.abs(inner)
        phase = jnp.where(size == 0, 1, inner.conj() / jnp.where(size == 0, 1, size))
        aligned = vectors * phase[:, None]
        return 2**0.5 * norm(aligned - aligned.mean(axis=0), axis=(0, 1))

    return Deviations(deviation(lefts, u[:, :rank]), deviation(rights, adjoint(vh)[:, :rank]))
