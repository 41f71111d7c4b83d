"""ScaledGD as optax transforms: gradients of low-rank factors, preconditioned by Gram matrices.

    single factor X           G  ←  G (XᵀX + λI)⁻¹                                    (2), (26)
    pair X Yᵀ                 G_X ← G_X (YᵀY + λI)⁻¹,   G_Y ← G_Y (XᵀX + λI)⁻¹        (6), (35)

    normalized (NoRA+)        as the pair, divided by ‖(·)⁻¹‖_F                       Algorithm 2

`lora_p` is the pair's form before any optimizer, `nora_plus` the normalized one.

Which leaves of a tree of parameters are factors is a *spec*: a tree like the parameters with a
`FactorSpec` or None at each leaf, or a callable that makes one from the parameters.

References:
    Tong, Ma, Chi, Accelerating ill-conditioned low-rank matrix estimation via scaled gradient
    descent, JMLR 2021 (λ = 0). Xu, Shen, Chi, Ma, The power of preconditioning in
    overparameterized low-rank matrix sensing, ICML 2023 (ScaledGD(λ)).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nyscaled import linalg, validation
from nyscaled.numerics import exponent, norm, shift
from nyscaled.transforms.pairing import (
    Spec,
    canonical,
    groups,
    map_gradients,
    over_batch,
    pair_spec,
    require_params,
)


class ScaleByGramState(NamedTuple):
    """Row spaces found at `init`, r×r for each group, flattened and joined; empty in other forms.

    One array whatever the parameters: the structure of an optax state must not depend on them.
    """

    row_spaces: Float[Array, " k"]


def scale_by_gram(
    damping: Any = 0.0, *, pseudo_inverse: bool = False, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients of factors by (damped) inverse Gram matrices.

    The exact form (λ = 0) never forms an inverse Gram matrix; see `linalg.gram_solve`. Factors are
    raised to float32 for the r×r work and results return in the gradient's dtype. A column that
    is exactly zero in a factor is taken as absent, so at Y_0 = 0 the left factor rests, as in (6).

    Args:
        damping: λ ≥ 0, in units of XᵀX; may be injected by `optax.inject_hyperparams`.
        pseudo_inverse: (XᵀX)† in place of the inverse, for factors of deficient rank, (26) and
            (35). ScaledGD keeps the row space of its factors, so the rank is cut once, by `init`,
            at √m·eps of the largest singular value; cutting anew at each step would amplify the
            rounding noise in the cut directions.
        spec: which leaves are factors; `default_spec` if None.

    Returns:
        A transformation whose `update` wants `params`.

    Raises:
        ValueError: by `init`, on a leaf without its partner or one that cannot be a factor
            (named in the message); by `update`, without params; on damping together with
            pseudo_inverse or a negative one.

    Examples:
        >>> tx = optax.chain(scale_by_gram(), optax.scale_by_learning_rate(0.5))
        >>> x = jnp.array([[2.0], [0.0]])
        >>> updates, _ = tx.update(jnp.ones_like(x), tx.init(x), x)
        >>> updates
        Array([[-0.125],
               [-0.125]], dtype=float32)
    """
    validation.require_scalar("damping", damping, 0, float("inf"), open_low=False)
    known = validation.is_concrete(damping)
    if pseudo_inverse and known and float(damping) != 0:
        raise ValueError(
            f"damping is {damping} with pseudo_inverse=True; expected one or the other"
        )

    def row_space(*factors: Array) -> Array:
        sizes = [norm(f) for f in factors]
        stacked = jnp.concatenate(
            [f / jnp.where(s > 0, s, 1) for f, s in zip(factors, sizes, strict=True)]
        )
        cut = linalg.compress(stacked, linalg.default_rcond(factors[0].shape[0], stacked.dtype))
        return jnp.where(jnp.arange(stacked.shape[1]) < cut.rank, cut.rotation, 0)

    def init(params: optax.Params) -> ScaleByGramState:
        leaves, spaces = jax.tree.leaves(params), []
        for group in groups(spec, params):  # checked in every form
            if not pseudo_inverse:
                continue
            factors = [canonical(leaves[m.leaf], m.spec) for m in group]
            spaces.append(over_batch(row_space, *factors).ravel())
        return ScaleByGramState(jnp.concatenate(spaces) if spaces else jnp.zeros((0,)))

    def unflatten(row_spaces: Array, params: Any) -> Any:
        """The row space of each factor, at its leaf."""
        leaves, treedef = jax.tree.flatten(params)
        spaces, start = [jnp.zeros((0,))] * len(leaves), 0
        for group in groups(spec, params):
            factor = canonical(leaves[group[0].leaf], group[0].spec)
            shape = (*factor.shape[:-2], factor.shape[-1], factor.shape[-1])
            stop = start + math.prod(shape)
            for member in group:
                spaces[member.leaf] = row_spaces[start:stop].reshape(shape).astype(factor.dtype)
            start = stop
        return treedef.unflatten(spaces)

    @linalg.full_precision
    def precondition(_: int, g: Array, factor: Array, partner: Array, *space: Array) -> Array:
        if not space:
            return linalg.gram_solve(partner, g, damping)
        return linalg.gram_solve(partner @ space[0], g @ space[0]) @ space[0].T

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        require_params(params)
        spaces = (unflatten(state.row_spaces, params),) if pseudo_inverse else ()
        return map_gradients(precondition, spec, updates, params, *spaces), state

    return optax.GradientTransformationExtraArgs(init, update)


class ScaleByNormalizedGramState(NamedTuple):
    """The number of updates that were made."""

    count: Any


def scale_by_normalized_gram(
    damping: Any = 1e-6, *, spec: Spec = None
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
    validation.require_scalar("damping", damping, 0, float("inf"), open_low=True)
    spec = pair_spec if spec is None else spec

    def init(params: optax.Params) -> ScaleByNormalizedGramState:
        groups(spec, params)
        return ScaleByNormalizedGramState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        require_params(params)

        @linalg.full_precision
        def precondition(position: int, g: Array, factor: Array, partner: Array) -> Array:
            # M of factors of any size: its scale goes, as that of ‖M‖_F does.
            weight = jnp.sqrt(jnp.asarray(damping, g.dtype))
            e = jnp.maximum(exponent(partner), exponent(weight))
            f = linalg.factor(shift(partner, -e), shift(weight, -e) ** 2)
            inverse = f.solve(jnp.eye(g.shape[1], dtype=g.dtype))
            first = jnp.any(factor) if position == 0 else jnp.zeros((), bool)
            rests = (state.count == 0) & (first | ~jnp.any(partner))
            return jnp.where(rests, g, f.solve(g) / norm(inverse))

        new = map_gradients(precondition, spec, updates, params)
        return new, ScaleByNormalizedGramState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def require_step_size(learning_rate: Any) -> None:
    """Raises ValueError if a known learning rate is outside (0, 1], where ScaledGD is defined."""
    validation.require_scalar("learning_rate", learning_rate, 0, 1, open_low=True)


def scaled_gd(
    learning_rate: optax.ScalarOrSchedule,
    damping: Any = 0.0,
    *,
    pseudo_inverse: bool = False,
    spec: Spec = None,
) -> optax.GradientTransformation:
    """Scaled gradient descent: (2) and (6); ScaledGD(λ) with damping; (26), (35) with pseudo_inverse.

    Args:
        learning_rate: η in (0, 1], or an optax schedule. 0.5 is quadratic on (1), 1 is one step
            on (4). For other ranges use `scale_by_gram` with a scaling of your own.
        damping: λ ≥ 0; see `scale_by_gram`.
        pseudo_inverse: see `scale_by_gram`.
        spec: see `scale_by_gram`.

    Raises:
        ValueError: on η outside (0, 1], and as `scale_by_gram` does.

    Examples:
        >>> import nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(0), 30, [1.0, 0.5, 0.1])
        >>> problem, tx = nys.problems.Symmetric(a), scaled_gd(0.5)
        >>> x = nys.initializers.nystrom(jax.random.key(1), a, rank=3)
        >>> state = tx.init(x)
        >>> for _ in range(15):
        ...     updates, state = tx.update(problem.gradient(x), state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> bool(problem.residual(x) < 1e-5)
        True
    """
    require_step_size(learning_rate)
    return optax.chain(
        scale_by_gram(damping, pseudo_inverse=pseudo_inverse, spec=spec),
        optax.scale_by_learning_rate(learning_rate),
    )


def nora_plus(
    inner: optax.GradientTransformation, damping: Any = 1e-6, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """NoRA+ (Algorithm 2): `scale_by_normalized_gram` before any optimizer.

    Under gradient accumulation wrap the result in `optax.MultiSteps`, so that it is applied once
    per optimizer step. The start is Algorithm 1's: `initializers.nystrom_factors`.

    Args:
        inner: the optimizer, `optax.adamw(1e-4)` say.
        damping: λ > 0; the paper uses 1e-6 throughout.
        spec: see `scale_by_normalized_gram`.

    Examples:
        >>> tx = nora_plus(optax.adamw(1e-4))
        >>> params = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["lora_b"].shape
        (2, 4)
    """
    return optax.with_extra_args_support(
        optax.chain(scale_by_normalized_gram(damping, spec=spec), inner)
    )


def lora_p(
    inner: optax.GradientTransformation, damping: Any = 1e-2, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """LoRA-P, Riemannian preconditioned LoRA: `scale_by_gram` on pairs before any optimizer.

    The Gram step is not normalized. Where the forward pass multiplies X Yᵀ by s = alpha/r, plain
    descent with it moves the weights by s² times what it does at s = 1: divide the learning rate
    by s². `nora_plus` and optimizers that normalize, as Adam, have no such factor.

    Args:
        inner: the optimizer, `optax.adamw(1e-4)` say.
        damping: λ ≥ 0, in units of XᵀX.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_gram`.

    References:
        Zhang, Pilanci, Riemannian preconditioned LoRA for fine-tuning foundation models, ICML 2024.

    Examples:
        >>> tx = lora_p(optax.sgd(1.0), damping=0.0)
        >>> params = {"lora_a": jnp.full((5, 1), 2.0), "lora_b": jnp.ones((1, 4))}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["lora_a"][0]
        Array([-0.5], dtype=float32)
    """
    pairs = scale_by_gram(damping, spec=pair_spec if spec is None else spec)
    return optax.with_extra_args_support(optax.chain(pairs, inner))
