"""Step sizes that theorems give: the paper's staircase, AltGD's, and Nesterov's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from nyscaled import validation
from nyscaled.lapack import svd
from nyscaled.linalg import default_rcond
from nyscaled.matrices import as_dense, reads
from nyscaled.numerics import full_precision
from nyscaled.typing import Scalar


def staircase(initial: float = 0.1, every: int = 100, factor: float = 0.1) -> optax.Schedule:
    """Return η = initial, initial·factor, …, with `every` steps per level (after Theorem 2).

    The step sizes have a finite sum: with few steps per level the iteration stops short of a weak
    optimum, which a constant η reaches (claim staircase-stops).

    Args:
        initial: the step size of the first level.
        every: the number of steps per level, ≥ 1.
        factor: what the step size is multiplied by from level to level, positive.

    Raises:
        ValueError: on an initial step size or a factor that is not positive, and on every < 1.

    Examples:
        >>> [round(float(staircase(0.1, every=10)(t)), 4) for t in (0, 9, 10, 20)]
        [0.1, 0.1, 0.01, 0.001]
    """
    validation.require_positive("initial", initial)
    validation.require_positive("factor", factor)
    validation.require_at_least("every", every, 1)  # 0 would be a constant step size to optax
    return optax.exponential_decay(initial, every, factor, staircase=True)


def altgd_learning_rate(norm: ArrayLike) -> Any:
    """Return η = 9 / (4 C ν ‖A‖) with C = 8 and ν = ½, for the start `initializers.altgd`.

    Args:
        norm: ‖A‖, the largest singular value.

    Raises:
        ValueError: on a norm that is not positive.

    References:
        Ward and Kolda, Convergence of alternating gradient descent for matrix factorization,
        NeurIPS 2023.

    Examples:
        >>> altgd_learning_rate(1.0)
        0.5625
    """
    validation.require_positive("norm", norm)
    return 9 / (16 * norm)


@reads(x0=as_dense)
@full_precision
def nesterov_parameters(x0: Float[Array, "m r"]) -> tuple[Scalar, Scalar]:
    """Return step size and momentum of Nesterov's method for X_0 = AΩ, Y_0 = 0.

    If X_0 is large it hardly moves, and descent in Y is least squares with smoothness L = σ_1(X_0)²
    and, on what it changes, strong convexity μ = σ_min(X_0)², the least singular value that is not
    zero: η = 1/L, momentum (√L − √μ)/(√L + √μ). The rate is 1 − √(μ/L), linear in κ(A).

    `optax.sgd(η, momentum, nesterov=True)` is the method: its parameters are the points where
    gradients are taken.

    Args:
        x0: X_0 (m, r), of any rank but 0.

    Returns:
        η and the momentum, in the dtype of X_0.

    Raises:
        ValueError: if X_0 is zero (outside of jit).

    References:
        Xu, Wang, Zhao, Ward, Tao, Provable acceleration of Nesterov's accelerated gradient for
        rectangular matrix factorization and linear neural networks, NeurIPS 2024.

    Examples:
        >>> rate, momentum = nesterov_parameters(jnp.diag(jnp.array([2.0, 1.0, 0.0])))
        >>> round(float(rate), 4), round(float(momentum), 4)
        (0.25, 0.3333)
    """
    _, singular, _ = svd(x0)
    if validation.is_concrete(singular) and not bool(singular[0] != 0):
        raise ValueError("x0 is zero, which is a saddle point; expected X_0 = AΩ of any rank but 0")
    live = singular > default_rcond(x0.shape[0], x0.dtype) * singular[0]
    ratio = jnp.min(jnp.where(live, singular, singular[0])) / singular[0]  # √(μ/L)
    return 1 / singular[0] / singular[0], (1 - ratio) / (1 + ratio)
