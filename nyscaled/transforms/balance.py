"""RefLoRA as optax transforms: gradients of a pair X Yᵀ as its balanced factors would have them.

    G_X ← G_X S⁻¹,   G_Y ← G_Y S,   S = (XᵀX)⁻¹ # YᵀY, the S > 0 with S XᵀX S = YᵀY

A # B is the geometric mean. With S = P Pᵀ the factors XP and YP⁻ᵀ have the same product and equal
Gram matrices. A step of plain descent on them moves X Yᵀ as these gradients do, so that the step
depends on X Yᵀ only and not on its factors. The scalar form has S = ‖Y‖_F/‖X‖_F · I.

References:
    Zhang, Li, Giannakis, RefLoRA: Refactored low-rank adaptation for efficient fine-tuning of large
    models, NeurIPS 2025.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nyscaled import linalg, validation
from nyscaled.lapack import svd
from nyscaled.numerics import norm, normalized, shift
from nyscaled.transforms._pairwise import Rule, before, pairwise
from nyscaled.transforms.pairing import Spec, pair_spec
from nyscaled.typing import Scalar


class ScaleByBalanceState(NamedTuple):
    """State of `scale_by_balance`.

    Attributes:
        count: the number of updates that were made.
    """

    count: Any


def scale_by_balance(
    warmup_steps: int | Array = 100, *, scalar: bool = False, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """Balance gradients of pairs: G_X ← G_X S⁻¹, G_Y ← G_Y S with S of the factors before the step.

    S is not formed: S⁻¹ = XᵀP Σ⁻¹ PᵀX, where X Yᵀ = P Σ Qᵀ is a thin SVD, computed from an r×r
    matrix. S does not exist if a factor is deficient. If the numerical rank of X Yᵀ is below r, at
    √max(m, n)·eps of the largest singular value, the update has the scalar form. If a factor is
    zero, as at the start, S = I. So results are always finite.

    Args:
        warmup_steps: how many updates pass gradients through before the first that is scaled.
        scalar: whether S = ‖Y‖_F/‖X‖_F · I, which costs only two norms.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_gram`, and on warmup_steps < 0.

    Examples:
        >>> from nyscaled import Factors
        >>> params = Factors(jnp.full((4, 1), 3.0), jnp.ones((4, 1)))  # S = 1/3
        >>> tx = scale_by_balance(warmup_steps=0)
        >>> updates, _ = tx.update(Factors(jnp.ones((4, 1)), params.right), tx.init(params), params)
        >>> jnp.round(updates.left[0], 4), jnp.round(updates.right[0], 4)
        (Array([3.], dtype=float32), Array([0.3333], dtype=float32))
    """
    validation.require_nonnegative("warmup_steps", warmup_steps)

    def rule_of(state: ScaleByBalanceState, **extra_args: object) -> Rule:
        def rule(_: int, g: Array, factor: Array, partner: Array) -> Array:
            # The S of (Y, X) is the inverse of the S of (X, Y): both positions read alike.
            scaled = g * _ratio(factor, partner)
            if not scalar:
                # Where X is scaled by 2^k, S⁻¹ is too.
                (x, e), (y, e_partner) = normalized(factor), normalized(partner)
                root, exists = _root(x, y)
                balanced = shift((g @ root.T) @ root, e - e_partner)
                scaled = jnp.where(exists, balanced, scaled)
            return jnp.where(state.count < warmup_steps, g, scaled)

        return rule

    return pairwise(
        rule_of,
        pair_spec if spec is None else spec,
        lambda params: ScaleByBalanceState(jnp.zeros((), jnp.int32)),
    )


def _ratio(x: Float[Array, "m r"], y: Float[Array, "n r"]) -> Scalar:
    """‖X‖_F/‖Y‖_F, or 1 if either is zero."""
    above, below = norm(x), norm(y)
    exists = (above != 0) & (below != 0)
    return jnp.where(exists, above / jnp.where(exists, below, 1), 1)


def _root(x: Float[Array, "m r"], y: Float[Array, "n r"]) -> tuple[Float[Array, "r r"], Array]:
    """L with S⁻¹ = LᵀL, and whether it exists: L = Σ^(-1/2) PᵀX with the SVD X Yᵀ = P Σ Qᵀ."""
    basis = linalg.orthonormalize(x)
    x_core, y_core = basis.T @ x, linalg.orthonormalize(y).T @ y
    p, sigma, _ = svd(x_core @ y_core.T)
    exists = sigma[-1] > linalg.default_rcond(max(len(x), len(y)), x.dtype) * sigma[0]
    return (p / jnp.sqrt(jnp.where(exists, sigma, 1))).T @ x_core, exists


def reflora(
    inner: optax.GradientTransformation, warmup_steps: int | Array = 100, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """RefLoRA: `scale_by_balance` before any optimizer.

    Args:
        inner: the optimizer, `optax.adamw(1e-4)` say.
        warmup_steps: how many first updates are not balanced. At Y_0 = 0 nothing can be.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_balance`, and if `inner` is not a transformation.

    Examples:
        >>> tx = reflora(optax.adamw(1e-4))
        >>> params = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["lora_b"].shape
        (2, 4)
    """
    return before(scale_by_balance(warmup_steps, spec=spec), inner)


def reflora_s(
    inner: optax.GradientTransformation, warmup_steps: int | Array = 100, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """RefLoRA-S, the scalar form: as `reflora` with S = ‖Y‖_F/‖X‖_F · I.

    Args:
        inner: the optimizer, `optax.adamw(1e-4)` say.
        warmup_steps: how many first updates are not balanced.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_balance`, and if `inner` is not a transformation.

    Examples:
        >>> tx = reflora_s(optax.sgd(1.0), warmup_steps=0)
        >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.full((1, 2), 2.0)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["lora_a"][0], updates["lora_b"][0]
        (Array([-0.5], dtype=float32), Array([-4., -4.], dtype=float32))
    """
    return before(scale_by_balance(warmup_steps, scalar=True, spec=spec), inner)
