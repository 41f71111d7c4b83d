"""Factorizations of matrices that are read, in which a pass over A gives both products.

A pass that reads blocks of rows makes A x and, at once, Aᴴ(A x). So the Krylov space grows on the
right side, from [AᴴAΩ, (AᴴA)²Ω, …], one block per pass in place of one per two passes. The last
pass gives the images A P of the basis, and A is projected onto it from the right: A P Pᴴ.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Key

from nyscaled.lowrank import estimate
from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.host import HostMatrix
from nyscaled.lowrank.krylov import Projection
from nyscaled.lowrank.orthogonal import adjoint, extend, inner
from nyscaled.lowrank.products import random_block, random_scale
from nyscaled.lowrank.result import Deviations, LowRank
from nyscaled.lowrank.truncate import is_enough, rounding, smallest_rank, truncate
from nyscaled.numerics import full_precision, keeping, norm
from nyscaled.typing import Scalar

_Wide = Inexact[np.ndarray, "_ _"]  # in double precision

PROBES = 16
WIDTH = 64  # columns of a block for a tolerance: passes cost more than columns


@runtime_checkable
class StreamedMatrix(HostMatrix, Protocol):
    """A `HostMatrix` that makes both products in one pass, such as `RowBlocks`."""

    def times_both(
        self, x: Inexact[np.ndarray, "n k"], /, columns: int | None = None
    ) -> tuple[Inexact[np.ndarray, "m k"], Inexact[np.ndarray, "n j"]]:
        """Return A x, and Aᴴ A x for the first columns of x."""
        ...


class _Pass:
    """The passes that were made, and what they gave on the device."""

    def __init__(self, a: StreamedMatrix) -> None:
        self.a, self.count = a, 0

    def both(
        self, x: Inexact[Array, "n k"], columns: int | None = None
    ) -> tuple[Inexact[Array, "m k"], _Wide]:
        self.count += 1
        image, gram = self.a.times_both(np.asarray(x), columns)
        return jnp.asarray(image), gram

    def image(self, x: Inexact[Array, "n k"]) -> Inexact[Array, "m k"]:
        self.count += 1
        return jnp.asarray(self.a.times(np.asarray(x)))

    def adjoint_image(self, y: Inexact[Array, "m k"]) -> Inexact[Array, "n k"]:
        self.count += 1
        return jnp.asarray(self.a.adjoint_times(np.asarray(y)))


def of_rank(
    a: StreamedMatrix, key: Key[Array, ""], rank: int, width: int, passes: int, jackknife: bool
) -> LowRank:
    """Return a factorization of this rank, from this many passes; from two if A has this rank.

    Args:
        a: A (m, n).
        key: PRNG key.
        rank: the number of singular values.
        width: columns of a block.
        passes: how often A is read, at least 2.
        jackknife: whether deviations are estimated.
    """
    limit = min(a.shape)
    width = limit if width * (passes - 1) >= limit else width
    run, block, probes = _start(a, key, width)
    image, start = run.both(jnp.concatenate([block, probes], axis=1), width)
    probed = image[:, width:]
    if (passes > 2 or width == len(image)) and not jackknife:
        left, exact = _range(image[:, :width], probed)
        if bool(exact):
            (left, core, right), error = _from_left(run, left, probed)
            triples = core_svd(core)
            return truncate(left, triples, right, error, rank, run.count, whole_range=True)
        del left
    del image  # arrays with m rows are what takes memory
    newest = right = _grown(None, start, a.dtype)
    images: list[Array] = []
    while run.count < passes - 1 and right.shape[1] < limit:
        image, gram = run.both(newest)
        images.append(image)
        newest = _grown(right, gram, a.dtype)
        right = jnp.concatenate([right, newest], axis=1)
    images.append(run.image(newest))
    together = jnp.concatenate(images, axis=1)
    images.clear()
    projection = _projection(together, right)
    del together
    triples = core_svd(projection.core)
    deviations = None
    if jackknife:
        u, s, vh = triples
        moved = estimate.jackknife(
            adjoint(projection.core),
            (adjoint(vh), s, adjoint(u)),
            jnp.asarray((_wide(right[:, :width]).conj().T @ _scaled(start)).astype(a.dtype)),
            rank,
        )
        deviations = Deviations(moved.right, moved.left)
    error = _left_out(projection, probes, probed)
    left, _, right = projection
    return truncate(left, triples, right, error, rank, run.count, deviations=deviations)


def of_tolerance(a: StreamedMatrix, key: Key[Array, ""], tol: float, max_rank: int) -> LowRank:
    """Return a factorization whose estimated error is at most tol·‖A‖_F, or of rank `max_rank`.

    Args:
        a: A (m, n).
        key: PRNG key.
        tol: relative, in Frobenius norms.
        max_rank: at most min(m, n).
    """
    m, n = a.shape
    limit = min(m, n)
    run, block, probes = _start(a, key, min(WIDTH, limit))
    image, gram = run.both(jnp.concatenate([block, probes], axis=1), block.shape[1])
    probed = image[:, block.shape[1] :]
    newest = right = _grown(None, gram, a.dtype)
    images = jnp.zeros((m, 0), image.dtype)
    while True:
        image, gram = run.both(newest)
        images = jnp.concatenate([images, image], axis=1)
        projection = _projection(images, right)
        triples = core_svd(projection.core)
        error = float(_left_out(projection, probes, probed))
        whole = float(norm(jnp.append(triples[1], error)))
        count = right.shape[1]
        enough = is_enough(error, whole, tol, max(m, n), image.dtype)
        if enough or count >= min(limit, max_rank + WIDTH):
            break
        newest = _grown(right, gram[:, : limit - count], a.dtype)
        right = jnp.concatenate([right, newest], axis=1)
    if count == m < n and not enough:
        # AᴴAx has lost directions of small singular values to rounding; the left has all.
        projection, error = _from_left(run, projection.left, probed)
        triples = core_svd(projection.core)
        error = float(error)
    rank = max(1, min(smallest_rank(triples[1], error, tol), max_rank))
    left, _, right = projection
    return truncate(left, triples, right, error, rank, run.count, tol)


def _start(
    a: StreamedMatrix, key: Key[Array, ""], width: int
) -> tuple[_Pass, Inexact[Array, "n b"], Inexact[Array, "n s"]]:
    block_key, probe_key = jax.random.split(key)
    block = random_block(block_key, a.shape[1], width, a.dtype)
    return _Pass(a), block, random_block(probe_key, a.shape[1], PROBES, a.dtype)


def _grown(right: Inexact[Array, "n k"] | None, gram: _Wide, dtype: np.dtype) -> Array:
    """An orthonormal block that, with the basis, spans the basis and AᴴAx.

    AᴴA squares the singular values, so what is left of them is taken apart in double precision.
    """
    gram = _scaled(gram)
    with keeping(gram.dtype):
        basis = None if right is None else jnp.asarray(_wide(right))
        block = np.asarray(extend(basis, jnp.asarray(gram)))
    return extend(right, jnp.asarray(block.astype(dtype)))


def _scaled(gram: _Wide) -> _Wide:
    """Columns divided by their size: only what they span matters."""
    size = np.max(np.abs(gram), axis=0)
    return gram / np.where(size == 0, 1, size)


def _wide(x: Inexact[Array, "n k"]) -> _Wide:
    values = np.asarray(x)
    return values.astype(np.result_type(values, np.float64))


@jax.jit
@full_precision
def _range(
    images: Inexact[Array, "m k"], probed: Inexact[Array, "m s"]
) -> tuple[Inexact[Array, "m k"], Array]:
    """An orthonormal basis of the images, and whether A has no other range that probes see."""
    left = extend(None, images)
    missing, whole = estimate.left_out(left, probed)
    return left, missing <= rounding(len(images), images.dtype) * whole


def _from_left(
    run: _Pass, left: Inexact[Array, "m k"], probed: Inexact[Array, "m s"]
) -> tuple[Projection, Scalar]:
    """QQᴴA = Q C Pᴴ of a basis Q, by one more pass, and an estimate of ‖A − QQᴴA‖_F."""
    product = run.adjoint_image(left)
    right = extend(None, product)
    error = estimate.probed_error(left, probed, random_scale(len(right)))
    return Projection(left, adjoint(product) @ right, right), error


@jax.jit
@full_precision
def _projection(images: Inexact[Array, "m k"], right: Inexact[Array, "n k"]) -> Projection:
    """A P Pᴴ = Q C Pᴴ, of which the images A P are known."""
    left = extend(None, images)
    return Projection(left, inner(left, images), right)


@jax.jit
@full_precision
def _left_out(
    projection: Projection, probes: Inexact[Array, "n s"], images: Inexact[Array, "m s"]
) -> Scalar:
    left, core, right = projection
    remainder = images - left @ (core @ inner(right, probes))
    return norm(remainder) / (random_scale(len(right)) * probes.shape[1] ** 0.5)
