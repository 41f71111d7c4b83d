"""The one rank decision of a run: what every fused step does with its start."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nyscaled import linalg
from nyscaled.matrices import transpose_times
from nyscaled.typing import Factors


class Cut(NamedTuple):
    """A start in rotated coordinates, X = factors · rotationᵀ, with its noise exactly zero.

    Attributes:
        factors: as the start, an array or `Factors`; columns that were cut are zero.
        rotation: (r, r), orthogonal; the identity if nothing was cut.
        indefinite: whether A is seen to be no PSD matrix (symmetric problems only).
        singular: singular values of the start, zero where cut; of a pair, of its stacked factors
            divided by their norms.
        form: for a symmetric problem UᵀAU, U the left singular vectors that go with `singular`,
            zero where cut; None for a pair.
    """

    factors: Any
    rotation: Float[Array, "r r"]
    indefinite: Bool[Array, ""]
    singular: Float[Array, " r"]
    form: Float[Array, "r r"] | None


@linalg.full_precision
def cut_rank(problem: Any, params: Any, enabled: Any = True) -> Cut:
    """Checks the factors and, if `enabled`, cuts their numerical rank, once and for all.

    Under (26) and (35) the row space of the factors never changes: X_t = X̃_t Vᵀ with X̃_t an
    iterate of full column rank. A direction is cut when its singular value in X_0 *and* its image
    under A are both within √m·eps of the largest: then neither tells it from zero.

    Raises:
        ValueError: if the factors do not fit the problem.
    """
    params = problem.check(params)
    factors = params if isinstance(params, Factors) else (params,)
    dtype, r = factors[0].dtype, factors[0].shape[1]
    sizes = [jnp.linalg.norm(f) for f in factors]
    scaled = [f / jnp.where(s > 0, s, 1) for f, s in zip(factors, sizes, strict=True)]
    u, singular, vt = jnp.linalg.svd(jnp.concatenate(scaled), full_matrices=False)
    # One Newton-Schulz step: LAPACK's V is orthogonal to several eps only, and XXᵀ shows it.
    v = vt.T @ (1.5 * jnp.eye(r, dtype=dtype) - 0.5 * vt @ vt.T)
    tol = linalg.default_rcond(max(problem.shape), dtype)
    noise = singular <= tol * singular[0]
    indefinite, form = jnp.zeros((), bool), None
    parts = jnp.split(u, [factors[0].shape[0]]) if len(factors) == 2 else [u]
    maps = [transpose_times, operator.matmul] if len(factors) == 2 else [operator.matmul]
    for part, size, times in zip(parts, sizes, maps, strict=True):
        lengths = jnp.linalg.norm(part, axis=0)
        directions = part / jnp.where(lengths > 0, lengths, 1)
        image = times(problem.a, directions)
        reach = jnp.linalg.norm(image, axis=0)
        noise &= (reach <= tol * jnp.max(reach)) | (size == 0)
        if len(factors) == 1:
            form = directions.T @ image
            form = (form + form.T) / 2
            values = jnp.linalg.eigvalsh(form)
            indefinite = values[0] < -10 * tol * jnp.max(jnp.abs(values))
            singular = size * singular
    noise &= jnp.asarray(enabled)
    cut = jnp.any(noise)
    rotation = jnp.where(cut, v, jnp.eye(r, dtype=dtype))
    rotated = tuple(jnp.where(cut, jnp.where(noise, 0, f @ v), f) for f in factors)
    rotated = Factors(*rotated) if len(factors) == 2 else rotated[0]
    if form is not None:
        form = jnp.where(noise[:, None] | noise, 0, form)
    return Cut(rotated, rotation, indefinite, jnp.where(noise, 0, singular), form)
