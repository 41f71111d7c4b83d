"""LoRA-RITE as optax transforms: Adam for the product X Yᵀ, whichever factors it is written with.

Let Y = UR with orthonormal U. For the side of X, with G the gradient in X and t the step:

    G̅ = G R⁻¹,   P = UᵀU₋,   V = β₂ P V₋ Pᵀ + (1 − β₂) G̅ᵀG̅/m,   ρ = β₂ (ρ₋ + d(V₋, P V₋ Pᵀ))
    M = β₁ M₋ Pᵀ + (1 − β₁) G̅ (V + ρI)^(-1/2),   the update is M R⁻ᵀ

U₋, V₋, ρ₋, M₋ are those of the step before, d is the largest difference of eigenvalues: the mass
that leaves with a direction of U. Replacing (X, Y) by (XT, YT⁻ᵀ) changes U by a rotation, with it
V and M, and X Yᵀ moves as before. The averages are corrected for their start from zero as Adam's.

References:
    Yen et al., LoRA done RITE: Robust invariant transformation equilibration for LoRA optimization,
    ICLR 2025. The averages of V and ρ and the mean over m rows are those of its authors' code.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nyscaled import linalg, validation
from nyscaled.lapack import eigh, svd
from nyscaled.numerics import at_least_float32, full_precision
from nyscaled.transforms._pairwise import (
    Group,
    by_shape,
    canonical,
    canonical_shape,
    groups,
    require_groups,
    require_params,
    restore,
    stack,
    stacked_spec,
    unstack,
)
from nyscaled.transforms.pairing import Spec, pair_spec
from nyscaled.typing import Scalar


class ScaleByRiteState(NamedTuple):
    """Moments of the gradients, in the bases of the partners of their factors.

    Attributes:
        count: the number of updates that were made.
        moments: M, a tree like the parameters.
        bases: at each factor, the basis U of its range; a tree like the parameters.
        second_moments: V of each factor, flattened and joined.
        escaped: ρ of each factor, joined.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    moments: optax.Params
    bases: optax.Params
    second_moments: Float[Array, " k"]
    escaped: Float[Array, " p"]


def scale_by_rite(
    b1: float | Scalar = 0.9, b2: float | Scalar = 0.999, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients of pairs as LoRA-RITE does.

    Directions in which the partner of a factor is zero, at √n·eps of its largest singular value,
    have no update: at Y = 0 the factor X does not move. Results do not depend on the scale of the
    gradients.

    Args:
        b1: β₁ in [0, 1), decay of the first moment.
        b2: β₂ in [0, 1), decay of the second moment.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_gram`, and on decays outside [0, 1).

    Examples:
        >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 9))}
        >>> tx = scale_by_rite()
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> jnp.round(updates["lora_a"][0], 4), jnp.round(updates["lora_b"][0, 0], 4)
        (Array([0.3333], dtype=float32), Array(0.5, dtype=float32))
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        validation.require_scalar(name, decay, 0, 1, open_low=False)
        if validation.is_concrete(decay) and float(decay) == 1:
            raise ValueError(f"{name} is 1, with which nothing is averaged; expected it in [0, 1)")
    spec = pair_spec if spec is None else spec

    def init(params: optax.Params) -> ScaleByRiteState:
        zeros = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), params)
        shapes = _batch_and_rank(require_groups(spec, params), jax.tree.leaves(params))
        return ScaleByRiteState(
            jnp.zeros((), jnp.int32),
            zeros,
            jax.tree.map(jnp.zeros_like, zeros),
            _joined([jnp.zeros((*batch, rank, rank)) for batch, rank in shapes.values()]),
            _joined([jnp.zeros(batch) for batch, _ in shapes.values()]),
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ScaleByRiteState]:
        state, params = cast(ScaleByRiteState, state), require_params(params)
        leaves, treedef = jax.tree.flatten(params)
        grads, moments, bases = (
            list(treedef.flatten_up_to(tree)) for tree in (updates, state.moments, state.bases)
        )
        everyone = groups(spec, params)
        shapes = _batch_and_rank(everyone, leaves)
        seconds = _parted(state.second_moments, {i: (*b, r, r) for i, (b, r) in shapes.items()})
        escaped = _parted(state.escaped, {i: b for i, (b, _) in shapes.items()})
        step = full_precision(functools.partial(_step, _decays(state.count, b1, b2)))
        for equal in by_shape(everyone, leaves, grads):
            sides = [(m, stacked_spec(leaves, m)) for m in zip(*equal, strict=True)]
            for own, other in zip(sides, reversed(sides), strict=True):
                of_own, of_other = (grads, moments), (leaves, bases)
                arrays = (
                    *(canonical(stack(tree, own[0]), own[1]) for tree in of_own),
                    *(canonical(stack(tree, other[0]), other[1]) for tree in of_other),
                    *(stack(tree, own[0]) for tree in (seconds, escaped)),
                )
                rule = step
                for _ in range(arrays[0].ndim - 2):
                    rule = jax.vmap(rule)
                scaled, moment, basis, second, lost = rule(*arrays)
                _write(grads, own[0], restore(scaled, stack(grads, own[0]), own[1]))
                _write(moments, own[0], restore(moment, stack(moments, own[0]), own[1]))
                _write(bases, other[0], restore(basis, stack(bases, other[0]), other[1]))
                _write(seconds, own[0], second)
                _write(escaped, own[0], lost)
        new_state = ScaleByRiteState(
            jnp.asarray(optax.safe_increment(state.count)),
            treedef.unflatten(moments),
            treedef.unflatten(bases),
            _joined(seconds.values()),
            _joined(escaped.values()),
        )
        return treedef.unflatten(grads), new_state

    return optax.GradientTransformationExtraArgs(init, update)


class _Decays(NamedTuple):
    """β₁ and β₂ corrected for averages that start from zero: the first step has 0."""

    first: Scalar
    second: Scalar


def _decays(count: Array, b1: float | Scalar, b2: float | Scalar) -> _Decays:
    t = (count + 1).astype(jnp.result_type(float))
    return _Decays(*(jnp.asarray(b * (1 - b ** (t - 1)) / (1 - b**t)) for b in (b1, b2)))


def _step(
    decays: _Decays,
    g: Float[Array, "m r"],
    moment: Float[Array, "m r"],
    partner: Float[Array, "n r"],
    old_basis: Float[Array, "n r"],
    second: Float[Array, "r r"],
    escaped: Scalar,
) -> tuple[Array, ...]:
    """Return the update of a factor and its new moment, basis, second moment and escaped mass."""
    n, r = partner.shape
    u, sigma, vt = svd(jnp.pad(partner, ((0, max(0, r - n)), (0, 0))))  # r triples, if n < r too
    u = u[:n]
    live = sigma > linalg.default_rcond(len(partner), partner.dtype) * sigma[0]
    basis = jnp.where(live, u, 0)
    inverse = jnp.where(live, 1 / jnp.where(live, sigma, 1), 0)
    plain = (g @ vt.T) * inverse
    turn = basis.T @ old_basis
    turned = turn @ second @ turn.T
    lost = jnp.max(jnp.abs(eigh(second)[0] - eigh(turned)[0]))
    second = decays.second * turned + (1 - decays.second) * (plain.T @ plain) / len(g)
    escaped = decays.second * (escaped + lost)
    values, vectors = eigh(second)
    # What rounding leaves of an eigenvalue that is zero is no scale to divide by.
    noise = linalg.default_rcond(len(values), values.dtype) * values[-1]
    total = jnp.maximum(values, noise) + escaped
    root = jnp.where(total > 0, jax.lax.rsqrt(jnp.where(total > 0, total, 1)), 0)
    scaled = ((plain @ vectors) * root) @ vectors.T
    moment = decays.first * moment @ turn.T + (1 - decays.first) * scaled
    return (moment * inverse) @ vt, moment, basis, second, escaped


def _write(tree: list[Array] | dict[int, Array], members: Group, value: Array) -> None:
    """Put a stack of arrays at the leaves of its members."""
    for member, x in zip(members, unstack(value, len(members)), strict=True):
        tree[member.leaf] = x


def _batch_and_rank(
    everyone: Sequence[Group], leaves: Sequence[Array]
) -> dict[int, tuple[tuple[int, ...], int]]:
    """Lengths of the batch axes and the rank of each factor, by its index among the leaves."""
    shapes = {m.leaf: canonical_shape(leaves[m.leaf], m.spec) for group in everyone for m in group}
    return {leaf: (shape[:-2], shape[-1]) for leaf, shape in shapes.items()}


def _joined(arrays: Iterable[Array]) -> Array:
    """One vector of all entries: `init` without arrays must have the same structure."""
    return jnp.concatenate([jnp.zeros(0), *(x.ravel() for x in arrays)])


def _parted(vector: Array, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Array]:
    """The inverse of `_joined`, for arrays of these shapes."""
    ends = itertools.accumulate(map(math.prod, shapes.values()))
    return {
        leaf: vector[end - math.prod(shape) : end].reshape(shape)
        for (leaf, shape), end in zip(shapes.items(), ends, strict=True)
    }


def lora_rite(
    learning_rate: optax.ScalarOrSchedule = 2e-4,
    b1: float | Scalar = 0.9,
    b2: float | Scalar = 0.999,
    *,
    spec: Spec = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE: `scale_by_rite` for pairs, Adam for every other leaf, and a learning rate.

    Args:
        learning_rate: η > 0, or an optax schedule.
        b1: β₁ in [0, 1), decay of the first moments.
        b2: β₂ in [0, 1), decay of the second moments.
        spec: which leaves are pairs. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_rite`.

    Examples:
        >>> tx = lora_rite(0.1)
        >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 9)), "bias": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> bool(jnp.allclose(updates["bias"], -0.1))
        True
    """
    spec = pair_spec if spec is None else spec

    def is_other(params: optax.Params) -> optax.Params:
        leaves, treedef = jax.tree.flatten(params)
        factors = {m.leaf for group in groups(spec, params) for m in group}
        return treedef.unflatten([i not in factors for i in range(len(leaves))])

    return optax.with_extra_args_support(
        optax.chain(
            scale_by_rite(b1, b2, spec=spec),
            optax.masked(optax.scale_by_adam(b1, b2), is_other),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
