"""The one rank decision of a run: what every fused step does with its start."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from nyscaled import linalg
from nyscaled.lapack import eigh, svd
from nyscaled.matrices import transpose_times
from nyscaled.numerics import norm
from nyscaled.typing import Factors


class Cut(NamedTuple):
    """A start in rotated coordinates, X = factors · rotationᵀ, with its noise exactly zero.

    Attributes:
        factors: as the start, an array or `Factors`; columns that were cut are zero.
        rotation: (r, r), orthogonal; the identity if nothing was cut.
        indefinite: whether A is seen to be no PSD matrix (symmetric problems only).
    """

    factors: Any
    rotation: Float[Array, "r r"]
    indefinite: Bool[Array, ""]


@linalg.full_precision
def cut_rank(problem: Any, params: Any, enabled: Any = True) -> Cut:
    """Checks the factors and, if `enabled`, cuts their numerical rank, once and for all.

    Under (26) and (35) the row space of the factors never changes: X_t = X̃_t Vᵀ with X̃_t an
    iterate of full column rank. A direction is cut when its singular value in X_0 is within √m·eps
    of the largest *and* its image under A is within what rounding leaves there: then neither
    tells it from zero.

    The decision is a constant to derivatives, and the frame V moves as the start does; see
    `linalg.moving_frame`.

    Raises:
        ValueError: if the factors do not fit the problem.
    """
    params = problem.check(params)
    factors = params if isinstance(params, Factors) else (params,)
    dtype, r = factors[0].dtype, factors[0].shape[1]
    sizes = [norm(f) for f in factors]
    stacked = jnp.concatenate(
        [f / jnp.where(s > 0, s, 1) for f, s in zip(factors, sizes, strict=True)]
    )
    u, singular, vt = svd(lax.stop_gradient(stacked))
    # One Newton-Schulz step: LAPACK's V is orthogonal to several eps only, and XXᵀ shows it.
    v = vt.T @ (1.5 * jnp.eye(r, dtype=dtype) - 0.5 * vt @ vt.T)
    tol = linalg.default_rcond(max(problem.shape), dtype)
    noise = below = singular <= tol * singular[0]
    indefinite = jnp.zeros((), bool)
    parts = jnp.split(u, [factors[0].shape[0]]) if len(factors) == 2 else [u]
    maps = [transpose_times, operator.matmul] if len(factors) == 2 else [operator.matmul]
    for part, size, times in zip(parts, sizes, maps, strict=True):
        lengths = norm(part, axis=0)
        directions = part / jnp.where(lengths > 0, lengths, 1)
        image = lax.stop_gradient(times(problem.a, directions))
        reach = norm(image, axis=0)
        reach = reach / jnp.where(jnp.max(reach) > 0, jnp.max(reach), 1)
        # Rounding turns the singular vectors of noise towards the i-th of X_0 by eps·σ_1/σ_i.
        leak = jnp.where(below, 0, singular[0] / jnp.where(below, 1, singular) * reach)
        limit = tol + float(jnp.finfo(dtype).eps) * norm(leak)
        noise &= (reach <= limit) | (size == 0)
        if len(factors) == 1:
            values, _ = eigh(directions.T @ image)
            indefinite = values[0] < -10 * tol * jnp.max(jnp.abs(values))
    noise &= jnp.asarray(enabled)
    cut = jnp.any(noise)
    inverse = jnp.where(noise, 0, u / jnp.where(noise | (singular == 0), 1, singular)).T
    v = linalg.moving_frame(stacked, v, inverse, ~noise)
    rotation = jnp.where(cut, v, jnp.eye(r, dtype=dtype))
    rotated = tuple(jnp.where(cut, jnp.where(noise, 0, f @ v), f) for f in factors)
    return Cut(Factors(*rotated) if len(factors) == 2 else rotated[0], rotation, indefinite)
