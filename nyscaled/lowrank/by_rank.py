"""A factorization of a given rank, from a block Krylov space with a given number of products."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Key

from nyscaled.lowrank import derivative, estimate
from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.host import HostMatrix
from nyscaled.lowrank.jacobi import QUIET
from nyscaled.lowrank.krylov import Sketch, project, sketch
from nyscaled.lowrank.one_sided import row_space, svd_of_images
from nyscaled.lowrank.orthogonal import adjoint, extend, inner
from nyscaled.lowrank.products import (
    Products,
    products_of,
    random_block,
    random_scale,
    working_dtype,
)
from nyscaled.lowrank.result import Deviations, LowRank
from nyscaled.lowrank.truncate import rounding, truncate
from nyscaled.numerics import full_precision
from nyscaled.typing import LinearMap
from nyscaled.validation import is_concrete

PROBES = 8  # columns that measure the error


class _Plan(NamedTuple):
    """What is known before any product; hashable."""

    rank: int
    width: int  # of a block
    dimensions: int  # of the Krylov space
    one_sided: bool  # whether A is projected onto the shorter side, by an odd number of products
    probes: int
    transposed: bool  # whether Aᴴ is factorized: the random block belongs to the shorter side
    jackknife: bool


def of_rank(
    a: LinearMap | HostMatrix,
    key: Key[Array, ""],
    rank: int,
    width: int,
    passes: int,
    jackknife: bool,
) -> LowRank:
    """Return a factorization of this rank.

    Args:
        a: A (m, n).
        key: PRNG key.
        rank: the number of singular values.
        width: columns of a block.
        passes: how many products are made, unless A has this rank.
        jackknife: whether deviations are estimated.
    """
    transposed = a.shape[0] < a.shape[1]
    blocks, one_sided, n = passes // 2, passes % 2 == 1, min(a.shape)
    dimensions = blocks * width
    if dimensions >= n:  # the space would be complete: n columns at once take fewer products
        width, dimensions, one_sided = n, n, False
    elif blocks > 1 and QUIET < dimensions <= QUIET + width // 2:
        dimensions = QUIET  # less than the last products give, for a faster core
    # Leaving one column out of a complete space says nothing of the space.
    probes = PROBES if passes > 2 or width == n else 0
    plan = _Plan(rank, width, dimensions, one_sided, probes, transposed, jackknife)
    if isinstance(a, HostMatrix):
        first, exact = _begin(a, key, plan)
        return _end(a, first, plan, bool(exact))
    if is_concrete((a, key)):
        # Two programs, since one with a conditional would copy A into its branches on a CPU.
        first, exact = _begin_compiled(a, key, plan)
        return _end_compiled(a, first, plan, bool(exact))
    return _differentiable(a, key, plan)


def _products(a: LinearMap | HostMatrix, plan: _Plan) -> Products:
    return products_of(a).adjoint if plan.transposed else products_of(a)


def _begin(
    a: LinearMap | HostMatrix, key: Key[Array, ""], plan: _Plan
) -> tuple[Sketch, Bool[Array, ""]]:
    """The first block, and whether its range is that of A to rounding."""
    m, n, dtype = max(a.shape), min(a.shape), working_dtype(a)
    start_key, probe_key = jax.random.split(key)
    start = random_block(start_key, n, plan.width, dtype)
    probes = random_block(probe_key, n, plan.probes, dtype)
    first = sketch(_products(a, plan), start, probes)
    if plan.dimensions == plan.width or not plan.probes:
        return first, jnp.asarray(False)
    missing, whole = estimate.left_out(first.basis, first.probes)
    return first, missing <= rounding(m, dtype) * whole


def _end(a: LinearMap | HostMatrix, first: Sketch, plan: _Plan, exact: bool) -> LowRank:
    """The factorization; if `exact`, by one more product, and the probes help to span the range."""
    if plan.one_sided and not exact:
        return _one_sided(a, first, plan)
    dimensions, scale = plan.dimensions, random_scale(min(a.shape))
    block = first.basis
    if exact:
        dimensions = 0
        more = extend(first.basis, first.probes)
        first = first._replace(
            basis=jnp.concatenate([first.basis, more], axis=1),
            images=jnp.concatenate([first.images, first.probes], axis=1),
        )
    left, core, right = project(_products(a, plan), first, dimensions)
    triples = core_svd(core)
    if plan.probes:
        # An exact basis has the probes in it, which measure what the first block leaves out.
        error = estimate.probed_error(block if exact else left, first.probes, scale)
    else:
        error = estimate.leave_one_out_error(first.basis, first.images, scale)
    deviations = None
    if plan.jackknife:
        start = inner(first.basis, first.images)
        deviations = estimate.jackknife(core, triples, start, plan.rank)
    passes = 2 * -(-left.shape[1] // first.basis.shape[1])
    result = truncate(
        *(left, triples, right, error, plan.rank, passes), deviations=deviations, whole_range=exact
    )
    return result.adjoint if plan.transposed else result


def _one_sided(a: LinearMap | HostMatrix, first: Sketch, plan: _Plan) -> LowRank:
    """The factorization of A projected onto the shorter side."""
    space = row_space(_products(a, plan), first.basis, plan.dimensions)
    vectors, values, vh = svd_of_images(space.images, space.exponents, plan.rank)
    error = estimate.probed_remainder(space, first.draws, first.probes, random_scale(min(a.shape)))
    deviations = None
    if plan.jackknife:
        # In the coordinates of all left singular vectors A P is diag(values) Vᴴ.
        moved = estimate.jackknife(
            adjoint(vh) * values,
            (adjoint(vh), values, jnp.eye(len(vh), dtype=vh.dtype)),
            inner(space.right[:, : plan.width], space.coimages) @ inner(first.basis, first.images),
            plan.rank,
        )
        deviations = Deviations(moved.right, moved.left)
    passes = 1 + 2 * -(-plan.dimensions // plan.width)
    triples = (None, values, vh)
    result = truncate(
        vectors, triples, space.right, error, plan.rank, passes, deviations=deviations
    )
    return result.adjoint if plan.transposed else result


_begin_compiled = functools.partial(jax.jit, static_argnums=2)(full_precision(_begin))
_end_compiled = functools.partial(jax.jit, static_argnums=(2, 3))(full_precision(_end))


@functools.partial(jax.jit, static_argnums=2)
@full_precision
def _differentiable(a: LinearMap, key: Key[Array, ""], plan: _Plan) -> LowRank:
    constant = lax.stop_gradient(a)
    first, exact = _begin(constant, key, plan)
    if plan.dimensions == plan.width or not plan.probes:
        result = _end(constant, first, plan, False)
    else:
        result = lax.cond(
            exact,
            lambda: _end(constant, first, plan, True),
            lambda: _end(constant, first, plan, False),
        )
    triples = derivative.triples(a, result.left, result.singular_values, result.right)
    names = ("left", "singular_values", "right")
    return dataclasses.replace(result, **dict(zip(names, triples, strict=True)))
