"""A factorization of a given error: the Krylov space grows block by block, until it is enough."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int, Key

from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.estimate import probed_error
from nyscaled.lowrank.growing import PROBES, WIDTH, Growing, placed, with_fresh, with_room
from nyscaled.lowrank.host import HostMatrix
from nyscaled.lowrank.orthogonal import extend, inner
from nyscaled.lowrank.products import (
    compiled,
    products_of,
    random_block,
    random_scale,
    working_dtype,
)
from nyscaled.lowrank.result import LowRank
from nyscaled.lowrank.truncate import is_enough, smallest_rank, truncate
from nyscaled.numerics import full_precision, norm
from nyscaled.typing import LinearMap, Scalar


def adaptive(a: LinearMap | HostMatrix, key: Key[Array, ""], tol: float, max_rank: int) -> LowRank:
    """Return a factorization whose estimated error is at most tol·‖A‖_F, or of rank `max_rank`.

    Args:
        a: A (m, n), whose entries are known.
        key: PRNG key.
        tol: relative, in Frobenius norms.
        max_rank: at most min(m, n).
    """
    transposed = a.shape[0] < a.shape[1]  # the random block belongs to the shorter side
    m, n = max(a.shape), min(a.shape)
    dtype = working_dtype(a)
    products = products_of(a) if isinstance(a, HostMatrix) else compiled(a)
    if transposed:
        products = products.adjoint
    block_key, probe_key, *keys = jax.random.split(key, 2 + -(-n // WIDTH))
    block = random_block(block_key, n, min(WIDTH, n), dtype)
    probes = random_block(probe_key, n, PROBES, dtype)
    images = products.times(jnp.concatenate([block, probes], axis=1))
    images, probed = jnp.split(images, [block.shape[1]], axis=1)

    basis, count, passes = None, 0, 1
    while True:
        width = images.shape[1]
        if basis is not None:
            basis = with_room(basis, min(n, count + width))
        block = extend(None if basis is None else basis.left, images)
        basis = _with_block(
            basis, block, products.adjoint_times(block), keys[count // WIDTH], count
        )
        count, passes = count + width, passes + 1
        error, whole = map(float, _measure(basis, probed))
        enough = is_enough(error, whole, tol, m, dtype)
        # The last directions of a Krylov space are not yet good ones: it gets more than the rank.
        if enough or count >= min(n, max_rank + 2 * WIDTH):
            break
        newest = basis.right[:, count - width : count]
        images, passes = products.times(newest[:, : n - count]), passes + 1

    left, core, right = basis.left[:, :count], basis.core[:count, :count], basis.right[:, :count]
    if count == n and not enough:
        # The right basis is complete, and the left one has directions that are only rounding.
        images = products.times(right)
        left, passes = extend(None, images), passes + -(-n // WIDTH)
        core = inner(left, images)
        error = float(norm(images - left @ core))
    triples = core_svd(core)
    rank = max(1, min(smallest_rank(triples[1], error, tol), max_rank))
    result = truncate(left, triples, right, error, rank, passes, tol)
    return result.adjoint if transposed else result


@functools.partial(jax.jit, donate_argnums=0)
@full_precision
def _with_block(
    basis: Growing | None,
    block: Inexact[Array, "m b"],
    image: Inexact[Array, "n b"],
    key: Key[Array, ""],
    count: Int[Array, ""] | int,
) -> Growing:
    """The basis with the block Q_new from column `count` on, of which Aᴴ Q_new is known.

    The first block is the basis, so that on a mesh the basis is split as products with A are.
    """
    old_left, old_core, old_right = (None, None, None) if basis is None else basis

    columns = extend(old_right, image)
    columns = with_fresh(placed(old_right, columns, count), columns, key)
    right = placed(old_right, columns, count)
    core = placed(old_core, inner(image, right), count, axis=0)
    return Growing(placed(old_left, block, count), core, right)


@jax.jit
@full_precision
def _measure(basis: Growing, probed: Inexact[Array, "m s"]) -> tuple[Scalar, Scalar]:
    """Estimates of ‖A − QQᴴA‖_F and ‖A‖_F."""
    error = probed_error(basis.left, probed, random_scale(basis.right.shape[0]))
    return error, norm(jnp.append(norm(basis.core), error))
