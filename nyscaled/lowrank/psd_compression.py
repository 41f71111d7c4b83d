"""The Nyström approximation that a subspace gives, and its best part of a given rank.

The approximation is that of A + νI, less νI. Rounding of QᴴAQ is at most ν, so that the Cholesky
factor is real.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from nyscaled.lapack import inverse_cholesky
from nyscaled.linalg import default_rcond
from nyscaled.lowrank.jacobi import eigh_of_positive
from nyscaled.lowrank.orthogonal import adjoint, extend, inner
from nyscaled.lowrank.psd_result import PSDApproximation
from nyscaled.lowrank.result import Status, with_fixed_signs
from nyscaled.numerics import full_precision, norm, shift
from nyscaled.typing import Scalar


class Compression(NamedTuple):
    """FFᴴ for F = (A + νI)Q T and TᴴGT = I, and the eigenpairs of FᴴF."""

    gram: Inexact[Array, "k k"]
    """G = QᴴAQ + νI."""
    ridge: Scalar
    """ν."""
    root: Inexact[Array, "k k"]
    """T; NaN where G is not positive definite."""
    factor: Inexact[Array, "m k"]
    """F."""
    values: Float[Array, " k"]
    """Falling eigenvalues of FᴴF."""
    turn: Inexact[Array, "k k"]
    """Its eigenvectors."""
    outside: Inexact[Array, "k k"]
    """The part of FFᴴ outside of range(Q), in these coordinates."""


def ridge(gram: Inexact[Array, "k k"], m: int, rounding: float) -> Scalar:
    """Return ν for a matrix with m rows.

    Args:
        gram: QᴴAQ.
        m: the number of rows of A.
        rounding: the relative rounding error of the entries of A, if it is more than that of sums.
    """
    nu = max(default_rcond(m, gram.dtype), rounding) * norm(gram)
    return jnp.where(nu == 0, 1, nu)


@functools.partial(jax.jit, static_argnames="rounding")
@full_precision
def compress(
    basis: Inexact[Array, "m k"], image: Inexact[Array, "m k"], rounding: float
) -> Compression:
    """Return what an orthonormal basis gives.

    Args:
        basis: Q.
        image: AQ.
        rounding: as for `ridge`.
    """
    gram = inner(basis, image)
    gram = (gram + adjoint(gram)) / 2
    nu = ridge(gram, len(basis), rounding)
    gram = gram + nu * jnp.eye(len(gram), dtype=gram.dtype)
    root = inverse_cholesky(gram)
    factor = (image + nu * basis) @ root
    square = inner(factor, factor)
    rising, turn = eigh_of_positive(square)
    turn = turn[:, ::-1]
    inside = gram @ root
    outside = adjoint(turn) @ (square - adjoint(inside) @ inside) @ turn
    return Compression(gram, nu, root, factor, rising[::-1], turn, outside)


@functools.partial(jax.jit, static_argnames="rank")
@full_precision
def truncate(
    compression: Compression,
    error: Scalar,
    rank: int,
    passes: Int[Array, ""] | int,
    status: Int[Array, ""] | int,
    exponent: Int[Array, ""],
    deviations: Float[Array, " r"] | None = None,
) -> PSDApproximation:
    """Return the best approximation of this rank.

    Args:
        compression: what the basis gives for A·2^(−e).
        error: an estimate of the error of all of it, by the same power of two.
        rank: how many eigenpairs are kept.
        passes: how many products were made.
        status: how the search for the basis ended.
        exponent: e.
        deviations: the jackknife estimates, if they were asked for.
    """
    gram, nu, root, factor, values, turn, outside = compression
    live = values[:rank] > 2 * nu
    vectors = jnp.where(live, extend(None, factor @ turn[:, :rank]), 0)
    # A − Â and the part that is cut are positive semidefinite, and A − Â vanishes on range(Q). So
    # their inner product is at most ‖A − Â‖ times the norm of what is cut outside of range(Q).
    cut = jnp.sum(jnp.maximum(values[rank:] - nu, 0) ** 2)
    estimate = jnp.sqrt(error**2 + cut + 2 * error * norm(outside[rank:, rank:]))
    finite = jnp.all(jnp.isfinite(gram))
    bad = jnp.where(finite, int(Status.INDEFINITE), int(Status.NON_FINITE))
    return PSDApproximation(
        vectors=with_fixed_signs(vectors, vectors)[0],
        eigenvalues=shift(jnp.where(live, values[:rank] - nu, 0), exponent),
        error_estimate=shift(estimate, exponent),
        numerical_rank=jnp.sum(live),
        passes=jnp.asarray(passes),
        status=jnp.where(jnp.all(jnp.isfinite(root)), jnp.asarray(status), bad),
        deviations=deviations,
    )
