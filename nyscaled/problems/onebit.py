"""One-bit sensing: bᵢ is how often the sign of ⟨Aᵢ, M⟩ + logistic noise was seen to be positive.

References:
    Davenport, Plan, van den Berg, Wootters, 1-bit matrix completion, Information and Inference 2014.
    Zhang, Fattahi, Zhang, NeurIPS 2021 (PrecGD on it, bᵢ = σ(⟨Aᵢ, M⟩)).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Float

from nyscaled import validation
from nyscaled.problems.sensing import Sensing
from nyscaled.typing import Scalar, pytree_dataclass


@pytree_dataclass
class OneBit(Sensing):
    """f(X, Y) = Σᵢ KL(bᵢ ‖ σ(𝒜(XYᵀ)ᵢ)) at `Factors`, ½ Σᵢ KL(bᵢ ‖ σ(𝒜(XXᵀ)ᵢ)) at X (m, r).

    KL(b ‖ q) = b log(b/q) + (1−b) log((1−b)/(1−q)) is the logistic loss less its least value: f is
    zero at a truth that explains b exactly, as `precgd` wants. Curvature is at most a quarter of
    that of `Sensing`, and so step sizes are four times as large and more.

    Args:
        a: 𝒜, as in `Sensing`.
        b: (p,) frequencies in [0, 1], in the dtype of 𝒜.

    Raises:
        ValueError: as `Sensing`, and on b outside [0, 1].

    Example:
        >>> from nyscaled.problems import sensing
        >>> exact, truth = sensing.gaussian(jax.random.key(0), 8, [1.0], num_measurements=100)
        >>> problem = OneBit(exact.a, jax.nn.sigmoid(exact.b))
        >>> bool(problem.loss(truth) < 1e-5), bool(problem.loss(truth + 1) > 0.01)
        (True, True)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if validation.is_concrete(self.b):
            low, high = float(jnp.min(self.b)), float(jnp.max(self.b))
            if low < 0 or high > 1:
                raise ValueError(f"b is {low:g} … {high:g}; wanted frequencies in [0, 1]")

    def misfit(self, predicted: Float[Array, " p"]) -> Scalar:
        """Σᵢ KL(bᵢ ‖ σ(zᵢ)) of predicted measurements z."""
        least = entr(self.b) + entr(1 - self.b)
        return jnp.sum(jax.nn.softplus(predicted) - self.b * predicted - least)

    def slope(self, predicted: Float[Array, " p"]) -> Float[Array, " p"]:
        """The derivative of `misfit`, σ(z) − b."""
        return jax.nn.sigmoid(predicted) - self.b
