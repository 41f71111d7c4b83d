"""ScaledGD as optax transforms: gradients of low-rank factors, preconditioned by Gram matrices.

    single factor X           G  ←  G (XᵀX + λI)⁻¹                                    (2)
    pair X Yᵀ                 G_X ← G_X (YᵀY + λI)⁻¹,   G_Y ← G_Y (XᵀX + λI)⁻¹        (6)

`scaled_gd` is this with a learning rate, `lora_p` the pair's form before any optimizer.

References:
    Tong, Ma, Chi, Accelerating ill-conditioned low-rank matrix estimation via scaled gradient
    descent, JMLR 2021 (λ = 0). Xu, Shen, Chi, Ma, The power of preconditioning in
    overparameterized low-rank matrix sensing, ICML 2023 (ScaledGD(λ)).
"""

from __future__ import annotations

import optax
from jaxtyping import Array

from nyscaled import linalg, validation
from nyscaled.transforms._pairwise import before, pairwise, require_tall
from nyscaled.transforms.pairing import Spec, pair_spec
from nyscaled.transforms.pinv import scale_by_gram_pinv
from nyscaled.typing import Scalar


def scale_by_gram(
    damping: float | Scalar = 0.0, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients of factors by (damped) inverse Gram matrices.

    The exact form (λ = 0) never forms an inverse Gram matrix; see `linalg.gram_solve`. Factors are
    raised to float32 for the r×r work and results return in the gradient's dtype. A column that
    is exactly zero in a factor is treated as absent, so at Y_0 = 0 the left factor does not move,
    as in (6). For factors of deficient rank use `scale_by_gram_pinv`.

    Args:
        damping: λ ≥ 0, in units of XᵀX; may be injected by `optax.inject_hyperparams`.
        spec: which leaves are factors; `default_spec` if None.

    Returns:
        A transformation without state. Its `update` requires `params`.

    Raises:
        ValueError: by `init`, on a leaf without its partner or one that cannot be a factor
            (named in the message), if no leaf is a factor, and without damping on a factor with
            fewer rows than columns; by `update`, without params; on a negative damping.

    Examples:
        >>> tx = optax.chain(scale_by_gram(), optax.scale_by_learning_rate(0.5))
        >>> x = jnp.array([[2.0], [0.0]])
        >>> updates, _ = tx.update(jnp.ones_like(x), tx.init(x), x)
        >>> updates
        Array([[-0.125],
               [-0.125]], dtype=float32)
    """
    validation.require_nonnegative("damping", damping)

    def rule(_: int, g: Array, factor: Array, partner: Array) -> Array:
        return linalg.gram_solve(partner, g, damping)

    def init_state(params: optax.Params) -> optax.EmptyState:
        if validation.is_concrete(damping) and float(damping) == 0:
            require_tall(spec, params)
        return optax.EmptyState()

    return pairwise(lambda state, **extra_args: rule, spec, init_state)


def require_step_size(learning_rate: object) -> None:
    """Raise ValueError if a known learning rate is outside (0, 1], where ScaledGD is defined."""
    validation.require_scalar("learning_rate", learning_rate, 0, 1, open_low=True, schedule=True)


def scaled_gd(
    learning_rate: optax.ScalarOrSchedule,
    damping: float | Scalar = 0.0,
    *,
    pseudo_inverse: bool = False,
    spec: Spec = None,
) -> optax.GradientTransformation:
    """Scaled gradient descent: (2) and (6); ScaledGD(λ) with damping; (26), (35) by pseudo-inverse.

    Args:
        learning_rate: η in (0, 1], or an optax schedule. 0.5 is quadratic on (1), 1 is one step
            on (4). For other ranges chain `scale_by_gram` with your own scaling.
        damping: λ ≥ 0 of `scale_by_gram`, in units of XᵀX.
        pseudo_inverse: `scale_by_gram_pinv` in place of `scale_by_gram`, without damping.
        spec: which leaves are factors; `default_spec` if None.

    Raises:
        ValueError: on η outside (0, 1], on damping together with pseudo_inverse, and as
            `scale_by_gram` does.

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
    validation.require_nonnegative("damping", damping)
    if pseudo_inverse and validation.is_concrete(damping) and float(damping) != 0:
        raise ValueError(
            f"damping is {damping} with pseudo_inverse=True; expected one or the other"
        )
    scaled = scale_by_gram_pinv(spec=spec) if pseudo_inverse else scale_by_gram(damping, spec=spec)
    return optax.chain(scaled, optax.scale_by_learning_rate(learning_rate))


def lora_p(
    inner: optax.GradientTransformation, damping: float | Scalar = 1e-2, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """LoRA-P, Riemannian preconditioned LoRA: `scale_by_gram` on pairs before any optimizer.

    The Gram step is not normalized. If the forward pass multiplies X Yᵀ by s = alpha/r, plain
    descent with it moves the weights by s² times what it does at s = 1: divide the learning rate
    by s². Optimizers that normalize their updates, as Adam does, require no such division.

    Args:
        inner: the optimizer, `optax.adamw(1e-4)` say.
        damping: λ ≥ 0, in units of XᵀX.
        spec: which leaves are pairs; all other leaves pass through. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_gram`, and if `inner` is not a transformation.

    References:
        Zhang, Pilanci, Riemannian preconditioned LoRA for fine-tuning foundation models, ICML 2024.

    Examples:
        >>> tx = lora_p(optax.sgd(1.0), damping=0.0)
        >>> params = {"lora_a": jnp.full((5, 1), 2.0), "lora_b": jnp.ones((1, 4))}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["lora_a"][0]
        Array([-0.5], dtype=float32)
    """
    return before(scale_by_gram(damping, spec=pair_spec if spec is None else spec), inner)
