"""From the projection on a Krylov space to the factorization that is returned."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Inexact

from nyscaled.lowrank.orthogonal import adjoint
from nyscaled.lowrank.result import Deviations, LowRank, Status, with_fixed_signs
from nyscaled.numerics import full_precision, norm
from nyscaled.typing import Scalar


@functools.partial(jax.jit, static_argnames=("rank", "passes", "whole_range"))
@full_precision
def truncate(
    left: Inexact[Array, "m k"],
    triples: tuple[Inexact[Array, "k j"] | None, Float[Array, " j"], Inexact[Array, "j i"]],
    right: Inexact[Array, "n i"],
    error: Scalar | float,
    rank: int,
    passes: int,
    tol: Scalar | float | None = None,
    deviations: Deviations | None = None,
    whole_range: bool = False,
) -> LowRank:
    """Return the best factorization of this rank of a projection QQᴴA = Q U diag(s) Vᴴ Pᴴ.

    Its error is that of the projection and, orthogonal to it, the singular values that are cut.

    Args:
        left: Q, orthonormal columns.
        triples: U, s and Vᴴ, as from `core_svd`. None stands for the U of a Q whose first columns
            are the left singular vectors.
        right: P, orthonormal columns.
        error: an estimate of ‖A − QQᴴA‖_F.
        rank: how many singular values are kept.
        passes: how many products were made.
        tol: the relative error that was asked for; None if it was the rank.
        deviations: the jackknife estimates, if they were asked for.
        whole_range: whether the range of Q is known to be that of A to rounding. Then the error is
            rounding too, and does not decide on the status.
    """
    u, s, vh = triples
    cut = rounding(max(left.shape[0], right.shape[0]), s.dtype)
    live = ~(s[:rank] <= cut * s[0])  # NaN shows
    whole = norm(jnp.append(s, error))
    tail = jnp.concatenate([jnp.where(live, 0, s[:rank]), s[rank:]])
    left_out = norm(jnp.append(tail, error))
    otherwise = Status.RANK_REACHED if tol is None else Status.MAX_RANK
    rest = norm(tail) if whole_range else left_out
    status = jnp.where(rest <= cut * whole, Status.EXACT, otherwise)
    if tol is not None:
        status = jnp.where(left_out <= tol * whole, Status.CONVERGED, status)
    left, right = with_fixed_signs(
        jnp.where(live, left if u is None else left @ u[:, :rank], 0),
        jnp.where(live, right @ adjoint(vh[:rank]), 0),
    )
    finite = jnp.isfinite(whole) & jnp.all(jnp.isfinite(left)) & jnp.all(jnp.isfinite(right))
    return LowRank(
        left,
        jnp.where(live, s[:rank], 0),
        right,
        left_out,
        whole,
        jnp.sum(live),
        jnp.asarray(passes),
        jnp.where(finite, status, Status.NON_FINITE),
        deviations,
    )


def rounding(m: int, dtype: DTypeLike) -> float:
    """Return the relative error of products, below which factors are the matrix to rounding.

    Products of 3,000 × 3,000 Gaussian matrices of low rank have up to 7·eps in float32 and 12·eps
    in float64 (OpenBLAS and XLA on a CPU); it grows like √m where sums are made in sequence.

    Args:
        m: the larger side of the matrix.
        dtype: of the factors.
    """
    return (16 + m**0.5 / 4) * float(jnp.finfo(dtype).eps)


def is_enough(error: float, whole: float, tol: float, m: int, dtype: DTypeLike) -> bool:
    """Return whether a basis that leaves out `error` suffices for the tolerance; True for NaN.

    It may leave out half of the tolerance, and the cut of singular values uses the rest.

    Args:
        error: an estimate of ‖A − QQᴴA‖_F.
        whole: an estimate of ‖A‖_F.
        tol: relative, in Frobenius norms.
        m: the larger side of the matrix.
        dtype: of the factors.
    """
    return not error > max(0.5 * tol, rounding(m, dtype)) * whole


def smallest_rank(singular_values: ArrayLike, error: float, tol: float) -> int:
    """Return the smallest rank whose error is at most `tol` times the norm, or the largest rank.

    Args:
        singular_values: of the projection, falling.
        error: an estimate of what the projection leaves out.
        tol: relative, in Frobenius norms.
    """
    parts = np.append(np.asarray(singular_values, np.float64), error)
    tails = np.sqrt(np.cumsum(parts[::-1] ** 2)[::-1])  # of rank 0, 1, …
    return min(int(np.sum(tails > tol * tails[0])), len(parts) - 1)
