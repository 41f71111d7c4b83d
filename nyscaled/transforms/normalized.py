"""NoRA+ (Algorithm 2) as optax transforms: the pair's Gram preconditioners, of Frobenius norm 1."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from nyscaled import linalg, validation
from nyscaled.numerics import exponent, norm, shift
from nyscaled.transforms._pairwise import Rule, before, pairwise
from nyscaled.transforms.pairing import Spec, pair_spec
from nyscaled.typing import Scalar


class ScaleByNormalizedGramState(NamedTuple):
    """State of `scale_by_normalized_gram`.

    Attributes:
        count: the number of updates that were made.
    """

    count: Any


def scale_by_normalized_gram(
    damping: float | Scalar = 1e-6, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """Algorithm 2's preconditioner: G_X ← G_X M / ‖M‖_F with M = (YᵀY + λI)⁻¹, and G_Y alike.

    In the first update the factor whose partner is zero, or else the first of each pair, keeps its
    gradient (line 5 of the algorithm). Both sides use the factors before the step. The norm makes
    the scale of the update independent of λ, so that λ needs no tuning.

    Args:
        damping: λ > 0, in units of XᵀX.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_gram`, and on damping ≤ 0.

    Examples:
        >>> from nyscaled import Factors
        >>> tx = scale_by_normalized_gram()
        >>> params = Factors(jnp.ones((3, 1)), jnp.zeros((2, 1)))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates.left[0]
        Array([1.], dtype=float32)
    """
    validation.require_positive("damping", damping)

    def rule_of(state: ScaleByNormalizedGramState, **extra_args: object) -> Rule:
        def rule(position: int, g: Array, factor: Array, partner: Array) -> Array:
            # M of factors of any size: its scale goes, as that of ‖M‖_F does.
            weight = jnp.sqrt(jnp.asarray(damping, g.dtype))
            e = jnp.maximum(exponent(partner), exponent(weight))
            f = linalg.factor(shift(partner, -e), shift(weight, -e) ** 2)
            inverse = f.solve(jnp.eye(g.shape[1], dtype=g.dtype))
            first = jnp.any(factor) if position == 0 else jnp.zeros((), bool)
            keeps = (state.count == 0) & (first | ~jnp.any(partner))
            return jnp.where(keeps, g, f.solve(g) / norm(inverse))

        return rule

    return pairwise(
        rule_of,
        pair_spec if spec is None else spec,
        lambda params: ScaleByNormalizedGramState(jnp.zeros((), jnp.int32)),
    )


def nora_plus(
    inner: optax.GradientTransformation, damping: float | Scalar = 1e-6, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """NoRA+ (Algorithm 2): `scale_by_normalized_gram` before any optimizer.

    Under gradient accumulation wrap the result in `optax.MultiSteps`, so that it is applied once
    per optimizer step. The start is Algorithm 1's: `initializers.nystrom_factors`.

    Args:
        inner: the optimizer, `optax.adamw(1e-4)` say.
        damping: λ > 0, in units of XᵀX; the paper uses 1e-6 throughout.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_normalized_gram`, and if `inner` is not a transformation.

    Examples:
        >>> tx = nora_plus(optax.adamw(1e-4))
        >>> params = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["lora_b"].shape
        (2, 4)
    """
    return before(scale_by_normalized_gram(damping, spec=spec), inner)
