"""PrecGD as optax transforms: the damping of ScaledGD(λ) tied to the loss of the current iterate.

    single factor X           G  ←  G (XᵀX + λ_t I)⁻¹,      λ_t = c √|f(X_t) − f_noise|
    pair X Yᵀ                 G_X ← G_X (YᵀY + λ_t I)⁻¹,    G_Y ← G_Y (XᵀX + λ_t I)⁻¹

If X has more columns than the rank of the solution, XᵀX becomes singular on the way. Without
damping the step is then unstable; with a constant damping it is slow once XᵀX falls below it. √f is
of the size of ‖XXᵀ − M‖_F, which is the damping that keeps the rate linear.

References:
    Zhang, Fattahi, Zhang, Preconditioned gradient descent for over-parameterized nonconvex matrix
    factorization, NeurIPS 2021; the same with certification, JMLR 2023.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax
from jaxtyping import Array

from nyscaled import linalg, validation
from nyscaled.numerics import root
from nyscaled.transforms._pairwise import Rule, pairwise
from nyscaled.transforms.pairing import Spec
from nyscaled.typing import Scalar


def scale_by_residual_gram(
    damping_scale: float | Scalar = 1.0, noise_level: float | Scalar = 0.0, *, spec: Spec = None
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients of factors by (XᵀX + λI)⁻¹ with λ = damping_scale·√|f − noise_level|.

    `update` reads f from `value=`, as optax's line searches do, or √f from `root_value=`, which is
    finite where f overflows and positive where f underflows. At f = noise_level λ is zero: pass a
    noise level that is rather too low than too high.

    Args:
        damping_scale: c > 0. Results depend on it little. For the losses ¼‖𝒜(XXᵀ) − b‖² of this
            package √f = ½‖·‖, and c = 1 is the value of the references up to that constant.
        noise_level: f_noise ≥ 0, the loss at the truth: σ²/4 on problems of
            `problems.sensing.gaussian`.
        spec: which leaves are factors; `default_spec` if None. They share one loss.

    Returns:
        A transformation without state. Its `update` requires `params` and `value`.

    Raises:
        ValueError: by `init`, as `scale_by_gram`; by `update`, without params or value; on
            damping_scale ≤ 0 or a negative noise level.

    Examples:
        >>> tx = scale_by_residual_gram()
        >>> x = jnp.array([[1.0], [0.0]])
        >>> updates, _ = tx.update(jnp.ones_like(x), tx.init(x), x, value=9.0)
        >>> jnp.round(updates, 4)
        Array([[0.25],
               [0.25]], dtype=float32)
    """
    validation.require_positive("damping_scale", damping_scale)
    validation.require_nonnegative("noise_level", noise_level)

    def rule_of(
        state: optax.EmptyState,
        *,
        value: float | Array | None = None,
        root_value: float | Array | None = None,
        **extra_args: object,
    ) -> Rule:
        if root_value is None:
            if value is None or jnp.ndim(value) != 0:
                got = "None" if value is None else f"of shape {jnp.shape(value)}"
                raise ValueError(
                    f"value is {got}; expected the loss: update(grads, state, params, value=loss)"
                )
            root_value = root(jnp.asarray(value, jnp.result_type(float, value)))
        # √|f − f_noise| from roots, which fit where f does not.
        root_value, level = jnp.asarray(root_value), jnp.sqrt(noise_level)
        product = root(jnp.abs(root_value - level)) * root(root_value + level)
        damping = damping_scale * product

        def rule(_: int, g: Array, factor: Array, partner: Array) -> Array:
            return linalg.gram_solve(partner, g, damping.astype(partner.dtype))

        return rule

    return pairwise(rule_of, spec)


def precgd(
    learning_rate: optax.ScalarOrSchedule,
    damping_scale: float | Scalar = 1.0,
    noise_level: float | Scalar = 0.0,
    *,
    spec: Spec = None,
) -> optax.GradientTransformationExtraArgs:
    """PrecGD: X⁺ = X − η ∇f(X)(XᵀX + λ_t I)⁻¹ with λ_t = damping_scale·√|f(X_t) − noise_level|.

    `solvers.gradient_step(problem, precgd(0.5))` passes the loss to `update`.

    Args:
        learning_rate: η > 0, or an optax schedule. 0.5 suits ¼‖𝒜(XXᵀ) − b‖².
        damping_scale: c > 0, the damping in units of √|f − noise_level|.
        noise_level: f_noise ≥ 0, the loss at the truth; rather too low than too high.
        spec: which leaves are factors; `default_spec` if None.

    Raises:
        ValueError: on η ≤ 0, and as `scale_by_residual_gram`.

    Examples:
        >>> import nyscaled as nys
        >>> problem, _ = nys.problems.sensing.gaussian(jax.random.key(0), 10, [1.0], 200)
        >>> step = nys.solvers.gradient_step(problem, precgd(0.5))
        >>> start = nys.initializers.small(jax.random.key(1), 10, rank=3, scale=0.3)
        >>> solution = nys.solvers.run(step, start, num_steps=60, record=problem.loss)
        >>> bool(solution.history[-1] < 1e-9)
        True
    """
    validation.require_scalar(
        "learning_rate", learning_rate, 0, math.inf, open_low=True, schedule=True
    )
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_residual_gram(damping_scale, noise_level, spec=spec),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
