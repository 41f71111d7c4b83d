"""One-bit sensing: bᵢ is the frequency with which ⟨Aᵢ, M⟩ + logistic noise is positive.

References:
    Davenport, Plan, van den Berg, Wootters, 1-bit matrix completion, Information and Inference
    2014.
    Zhang, Fattahi, Zhang, NeurIPS 2021 (PrecGD on it, bᵢ = σ(⟨Aᵢ, M⟩)).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import entr, logit
from jaxtyping import Array, Float, Key

from nyscaled import validation
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.numerics import clipped
from nyscaled.problems import sensing
from nyscaled.typing import Factors, Number, Scalar, Values

__all__ = [
    "OneBit",
    "gaussian",
    "gaussian_factors",
]


@pytree_dataclass
class OneBit(sensing.Sensing):
    """f(X, Y) = 4τ² Σᵢ KL(bᵢ ‖ σ(𝒜(XYᵀ)ᵢ/τ)) at `Factors`, half of it with XXᵀ at X (m, r).

    KL(b ‖ q) = b log(b/q) + (1−b) log((1−b)/(1−q)) is the logistic loss less its least value: f is
    zero at a truth that explains b exactly, as `precgd` requires. The factor 4τ² makes the
    curvature that of `Sensing` where q = ½, and less elsewhere: step sizes and the damping of
    `precgd` are those of `Sensing`.

    Args:
        map: the linear map 𝒜, as in `Sensing`.
        b: (p,) frequencies in [0, 1], in the dtype of 𝒜.
        noise_scale: τ > 0 of the logistic noise, bᵢ ≈ σ(𝒜(M)ᵢ/τ). A Python float.

    Raises:
        ValueError: as `Sensing`, and on b outside [0, 1] or τ ≤ 0.

    Examples:
        >>> problem, truth = gaussian(jax.random.key(0), 8, [1.0], num_measurements=100)
        >>> bool(problem.loss(truth) < 1e-5), bool(problem.loss(truth + 1) > 0.1)
        (True, True)
    """

    noise_scale: float = field(static=True, default=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.require_positive("noise_scale", self.noise_scale)
        if validation.is_concrete(self.b):
            low, high = float(jnp.min(self.b)), float(jnp.max(self.b))
            if low < 0 or high > 1:
                raise ValueError(f"b is {low:g} … {high:g}; expected frequencies in [0, 1]")

    def misfit(self, predicted: Float[Array, " p"]) -> Scalar:
        """Return 4τ² Σᵢ KL(bᵢ ‖ σ(zᵢ/τ)) of predicted measurements z."""
        z, b = predicted / self.noise_scale, self.b
        far = jax.nn.softplus(z) - b * z - entr(b) - entr(1 - b)
        # Near zᵢ = τ logit(bᵢ) that is a difference of numbers of size 1, far larger than itself.
        distance = z - logit(b)
        d = clipped(distance, -1, 1)
        near = jnp.log1p(b * jnp.expm1(d)) - b * d
        return 4 * self.noise_scale**2 * jnp.sum(jnp.where(jnp.abs(distance) < 1, near, far))

    def root_misfit(self, predicted: Float[Array, " p"]) -> Scalar:
        """Return the root of `misfit`."""
        return jnp.sqrt(self.misfit(predicted))

    def slope(self, predicted: Float[Array, " p"]) -> Float[Array, " p"]:
        """Return the derivative of `misfit`, 4τ(σ(z/τ) − b)."""
        return 4 * self.noise_scale * (jax.nn.sigmoid(predicted / self.noise_scale) - self.b)


def gaussian(
    key: Key[Array, ""],
    m: int,
    spectrum: Values,
    num_measurements: int,
    trials: Number | None = None,
) -> tuple[OneBit, Float[Array, "m k"]]:
    """Return a symmetric problem with Gaussian measurements of a random M of given spectrum.

    Aᵢ has entries N(0, 1/p) and τ = p^(−½), so that the arguments of σ are N(0, ‖M‖_F²). The loss
    at the truth is 0 from exact frequencies, and about 1/trials from more than a few trials.

    Args:
        key: PRNG key of M, 𝒜 and the trials.
        m: side of M.
        spectrum: the k ≤ m positive eigenvalues of M.
        num_measurements: p ≥ 1; a few times m k distinguish M from other matrices of low rank.
        trials: the number of observed signs per bᵢ, may be traced; None for bᵢ = σ(𝒜(M)ᵢ/τ).

    Returns:
        The problem and X* (m, k) with M = X*X*ᵀ, in JAX's default float.

    Raises:
        ValueError: on a bad spectrum or p, and on trials < 1.

    Examples:
        >>> problem, _ = gaussian(jax.random.key(0), 8, [1.0], num_measurements=100, trials=4)
        >>> sorted({float(b) for b in problem.b})
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    exact_key, coin_key = jax.random.split(key)
    exact, truth = sensing.gaussian(exact_key, m, spectrum, num_measurements)
    return _seen(coin_key, exact, trials), truth


def gaussian_factors(
    key: Key[Array, ""],
    m: int,
    n: int,
    spectrum: Values,
    num_measurements: int,
    trials: Number | None = None,
) -> tuple[OneBit, Factors]:
    """Return the same for a rectangular M (m, n) of given singular values, and its factors.

    Args:
        key: a PRNG key.
        m: the number of rows of M.
        n: the number of columns of M.
        spectrum: the singular values of M (k,), all positive.
        num_measurements: the number p of measurements.
        trials: the number of observed signs per measurement; None for exact probabilities.

    Examples:
        >>> problem, truth = gaussian_factors(jax.random.key(0), 6, 5, [1.0], num_measurements=40)
        >>> problem.shape, bool(problem.loss(truth) < 1e-5)
        ((6, 5), True)
    """
    exact_key, coin_key = jax.random.split(key)
    exact, truth = sensing.gaussian_factors(exact_key, m, n, spectrum, num_measurements)
    return _seen(coin_key, exact, trials), truth


def _seen(key: Array, exact: sensing.Sensing, trials: Number | None) -> OneBit:
    noise_scale = exact.map.count**-0.5
    b = jax.nn.sigmoid(exact.b / noise_scale)
    if trials is not None:
        validation.require_at_least("trials", trials, 1)
        b = jax.random.binomial(key, trials, b) / trials
    return OneBit(exact.map, b.astype(exact.dtype), noise_scale)
