"""Eigenpairs of a positive semidefinite matrix, as many as a given error takes.

The Krylov space [Ω, AΩ, A²Ω, …] grows by one product for each block. Random columns that it does
not depend on measure the error of the Nyström approximation, until it is small enough.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Int, Key

from nyscaled.lapack import inverse_cholesky
from nyscaled.linalg import default_rcond
from nyscaled.lowrank.growing import PROBES, WIDTH, Growing, placed, with_fresh, with_room
from nyscaled.lowrank.host import HostMatrix
from nyscaled.lowrank.orthogonal import adjoint, extend, inner
from nyscaled.lowrank.products import (
    Product,
    entry_rounding,
    random_block,
    random_scale,
    working_dtype,
)
from nyscaled.lowrank.psd_compression import Compression, compress, ridge, truncate
from nyscaled.lowrank.psd_result import PSDApproximation
from nyscaled.lowrank.result import Status
from nyscaled.lowrank.truncate import is_enough, rounding
from nyscaled.numerics import full_precision, norm, normalized, shift
from nyscaled.typing import LinearMap, Scalar


def of_tolerance(
    a: LinearMap | HostMatrix, times: Product, key: Key[Array, ""], tol: float, max_rank: int
) -> PSDApproximation:
    """Return eigenpairs whose estimated error is at most tol·‖A‖_F, or `max_rank` of them.

    Args:
        a: A (m, m), whose entries are known.
        times: x ↦ A x.
        key: PRNG key.
        tol: relative, in Frobenius norms.
        max_rank: at most m.
    """
    m, dtype, inexact = a.shape[0], working_dtype(a), entry_rounding(a)
    block_key, probe_key, *keys = jax.random.split(key, 2 + -(-m // WIDTH))
    block = extend(None, random_block(block_key, m, min(WIDTH, m), dtype))
    probes = random_block(probe_key, m, PROBES, dtype)
    images, e = normalized(times(jnp.concatenate([block, probes], axis=1)))
    image, probed = jnp.split(images, [block.shape[1]], axis=1)
    # A smaller tolerance than this may be out of reach of products and of eigenpairs.
    least = 4 * rounding(m, dtype) + max(default_rcond(m, dtype), inexact)

    space, count, passes = None, 0, 1
    while True:
        width = block.shape[1]
        if space is not None:
            space = with_room(space, min(m, count + width))
        space = _with_block(space, block, image, count)
        count += width
        error, whole = map(float, _measure(space, probes, probed, count, inexact))
        enough = is_enough(error, whole, max(tol, least), m, dtype)
        # The last directions of a Krylov space are not yet good ones: it gets more than the rank.
        if enough or count >= min(m, max_rank + 4 * WIDTH):
            break
        block = _next(space.left, image[:, : m - count], keys[count // WIDTH])
        image, passes = shift(times(block), -e), passes + 1

    compression = compress(space.left[:, :count], space.right[:, :count], inexact)
    nu = float(compression.ridge)
    errors = _errors(compression, error := math.hypot(error, nu))
    live = int(np.sum(np.asarray(compression.values) > 2 * nu))
    rank = max(1, min(int(np.sum(errors > tol * whole)), max_rank, live))
    status = Status.MAX_RANK
    if errors[rank] <= tol * whole:
        status = Status.CONVERGED
    elif errors[rank] <= least * whole:
        status = Status.EXACT
    return truncate(
        compression, jnp.asarray(error, compression.values.dtype), rank, passes, status, e
    )


@functools.partial(jax.jit, donate_argnums=0)
@full_precision
def _with_block(
    space: Growing | None,
    block: Inexact[Array, "m b"],
    image: Inexact[Array, "m b"],
    count: Int[Array, ""] | int,
) -> Growing:
    """Q, QᴴAQ and AQ with a block of Q from column `count` on, and its image."""
    left, core, right = (None, None, None) if space is None else space
    left = placed(left, block, count)
    columns = inner(left, image)
    core = placed(placed(core, columns, count), adjoint(columns), count, axis=0)
    return Growing(left, core, placed(right, image, count))


@jax.jit
@full_precision
def _next(
    basis: Inexact[Array, "m capacity"],
    image: Inexact[Array, "m b"],
    key: Key[Array, ""],
) -> Inexact[Array, "m b"]:
    """The block after this one; a complete space has fewer columns left than a block."""
    block = extend(basis, image)
    return with_fresh(jnp.concatenate([basis, block], axis=1), block, key)


@functools.partial(jax.jit, static_argnames="inexact")
@full_precision
def _measure(
    space: Growing,
    probes: Inexact[Array, "m s"],
    probed: Inexact[Array, "m s"],
    count: Int[Array, ""] | int,
    inexact: float,
) -> tuple[Scalar, Scalar]:
    """Estimates of ‖A − Â‖_F, which is unbiased in its square, and of ‖A‖_F, which is a bound.

    Â = FFᴴ − νQQᴴ, so that A − Â vanishes on range(Q), also where ν is not small beside A − Â.
    """
    basis, gram, image = space
    nu = ridge(gram, len(basis), inexact)
    live = jnp.arange(len(gram)) < count
    gram = (gram + adjoint(gram)) / 2 + jnp.diag(jnp.where(live, nu, 1).astype(gram.dtype))
    factor = (image + nu * basis) @ inverse_cholesky(gram)
    known = factor @ inner(factor, probes) - nu * (basis @ inner(basis, probes))
    deviation = random_scale(len(basis)) * probes.shape[1] ** 0.5
    error = norm(probed - known) / deviation
    return error, norm(jnp.append(norm(image), error))


def _errors(compression: Compression, error: float) -> np.ndarray:
    """The estimated errors of rank 0, 1, …, as `truncate` has them."""
    _, nu, _, _, values, _, outside = compression
    values = np.maximum(np.asarray(values, np.float64) - float(nu), 0)
    squares = np.abs(np.asarray(outside)).astype(np.float64) ** 2
    tails = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0)
    corners = np.cumsum(np.cumsum(squares[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    norms = np.append(np.sqrt(np.diagonal(corners)), 0)
    return np.sqrt(error**2 + tails + 2 * error * norms)
