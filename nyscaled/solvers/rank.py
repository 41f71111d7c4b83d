"""The one rank decision of a run: what every fused step does with its start."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from nyscaled import linalg
from nyscaled.lapack import eigh, qr, svd
from nyscaled.matrices import transpose_times
from nyscaled.numerics import full_precision, norm
from nyscaled.typing import Params, Problem


class Cut(NamedTuple):
    """A start in rotated coordinates, X = factors · rotationᵀ, with its noise exactly zero.

    Attributes:
        factors: as the start, an array or `Factors`; columns that were cut are zero.
        rotation: (r, r), orthogonal; the identity if nothing was cut.
        indefinite: whether A is not PSD on the range of the start (symmetric problems only).
    """

    factors: Params
    rotation: Float[Array, "r r"]
    indefinite: Bool[Array, ""]


@full_precision
def cut_rank(problem: Problem, params: Params, enabled: bool | Array = True) -> Cut:
    """Check the factors and, if `enabled`, cut their numerical rank for the whole run.

    Under (26) and (35) the row space of the factors never changes: X_t = X̃_t Vᵀ with X̃_t an
    iterate of full column rank. A direction is cut when its singular value in X_0 is within √m·eps
    of the largest *and* so is its image under A, less what lies in the images of directions
    before it: then neither distinguishes it from zero.

    The decision is a constant to derivatives, and the frame V moves as the start does; see
    `linalg.moving_frame`.

    Raises:
        ValueError: if the factors do not fit the problem.
    """
    factors, structure = jax.tree.flatten(problem.check(params))  # [X], or [X, Y]
    dtype, r = factors[0].dtype, factors[0].shape[1]
    sizes = [norm(f) for f in factors]
    stacked = jnp.concatenate(
        [f / jnp.where(s > 0, s, 1) for f, s in zip(factors, sizes, strict=True)]
    )
    u, singular, vt = svd(lax.stop_gradient(stacked))
    # One Newton-Schulz step: LAPACK's V is orthogonal to several eps only, and XXᵀ shows it.
    v = vt.T @ (1.5 * jnp.eye(r, dtype=dtype) - 0.5 * vt @ vt.T)
    tol = linalg.default_rcond(max(problem.shape), dtype)
    noise = singular <= tol * singular[0]
    directions = [_unit_columns(part) for part in jnp.split(u, _ends(factors)[:-1])]
    images = [lax.stop_gradient(image) for image in _images(problem, directions)]
    for size, image in zip(sizes, images, strict=True):
        # Rounding turns directions of noise towards those of larger singular values, and they have
        # a part of the images of those. What else they have is their own.
        own = jnp.abs(jnp.diagonal(qr(_tall(image))[1]))
        noise &= (own <= tol * jnp.max(own, initial=0)) | (size == 0)
    indefinite = jnp.zeros((), bool)
    if problem.symmetric:
        values, _ = eigh(directions[0].T @ images[0])
        # A start orthogonal to range(A) sees only the rounding of A, which has either sign.
        rounding = jnp.finfo(dtype).eps * linalg.probed_norm(problem.target())
        threshold = 10 * jnp.maximum(tol * jnp.max(jnp.abs(values)), 2 * rounding)
        indefinite = values[0] < -lax.stop_gradient(threshold)
    noise &= jnp.asarray(enabled)
    cut = jnp.any(noise)
    v = linalg.moving_frame(stacked, v, ~noise)
    rotation = jnp.where(cut, v, jnp.eye(r, dtype=dtype))
    rotated = [jnp.where(cut, jnp.where(noise, 0, f @ v), f) for f in factors]
    return Cut(structure.unflatten(rotated), rotation, indefinite)


def _images(problem: Problem, directions: list[Array]) -> list[Array]:
    """What A makes of the directions of each factor: A x; or Aᵀ x and A y of a pair."""
    a = problem.target()
    if problem.symmetric:
        return [a @ directions[0]]
    left, right = directions
    return [transpose_times(a, left), a @ right]


def _ends(factors: list[Array]) -> list[int]:
    """Where each factor ends among the stacked rows."""
    return list(itertools.accumulate(len(f) for f in factors))


def _unit_columns(x: Array) -> Array:
    lengths = norm(x, axis=0)
    return x / jnp.where(lengths > 0, lengths, 1)


def _tall(x: Float[Array, "m n"]) -> Float[Array, "k n"]:
    """X with rows of zeros below, as many as make it at least square."""
    return jnp.pad(x, ((0, max(0, x.shape[1] - x.shape[0])), (0, 0)))
