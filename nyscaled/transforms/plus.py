"""LoRA+ as an optax transform: the second factor of each pair has a larger learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import optax
from jaxtyping import Array

from nyscaled import validation
from nyscaled.transforms._pairwise import pairwise
from nyscaled.transforms.pairing import Spec, pair_spec
from nyscaled.typing import Scalar


def lora_plus(
    optimizer: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule = 2e-4,
    ratio: float | Scalar = 16.0,
    *,
    spec: Spec = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: learning rate η for the first factor of each pair and ratio·η for the second.

    Every other leaf has η. The optimizer's update must be proportional to its learning rate, as it
    is for SGD, Adam and their kin, and not for optax's fromage and lbfgs. Decay is scaled too.

    Args:
        optimizer: constructor of the optimizer, `optax.adamw` say.
        learning_rate: η, not negative, or an optax schedule.
        ratio: learning rate of b over that of a, positive.
        spec: which leaves are pairs. `pair_spec` if None.

    Raises:
        ValueError: as `scale_by_gram`, on η < 0, on ratio ≤ 0, and if `optimizer` does not return
            a transformation.

    References:
        Hayou, Ghosh, Yu, LoRA+: Efficient low rank adaptation of large models, ICML 2024.

    Examples:
        >>> tx = lora_plus(optax.sgd, learning_rate=0.5, ratio=4.0)
        >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2)), "bias": jnp.ones(1)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> [float(x.ravel()[0]) for x in jax.tree.leaves(updates)]
        [-0.5, -0.5, -2.0]
    """
    validation.require_scalar(
        "learning_rate", learning_rate, 0, math.inf, open_low=False, schedule=True
    )
    validation.require_positive("ratio", ratio)
    if not callable(optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}; expected a constructor, "
            "such as optax.adamw"
        )

    inner = optimizer(learning_rate)
    validation.require_transformation("what optimizer returns", inner)

    def rule(position: int, update: Array, factor: Array, partner: Array) -> Array:
        return update * ratio if position else update

    scaled = pairwise(lambda state, **extra_args: rule, pair_spec if spec is None else spec)
    return optax.with_extra_args_support(optax.chain(inner, scaled))
