"""Learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def schedule(name: str, peak: float, steps: int, warmup: int) -> Callable[[int], np.float32]:
    """Return the learning rate as a function of the step.

    It rises linearly over the warm-up, and falls to 0 at the end unless it is constant.

    Args:
        name: "constant", "linear" or "cosine".
        peak: the largest value.
        steps: number of steps.
        warmup: steps in which it rises.

    Raises:
        ValueError: if the warm-up has more steps than there are.

    Examples:
        >>> rate = schedule("linear", 1.0, steps=6, warmup=2)
        >>> [round(float(rate(step)), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    if warmup > steps:
        raise ValueError(
            f"warmup_steps is {warmup} and the run has {steps} steps; expected at most as many"
        )

    def rate(step: int) -> np.float32:
        if step < warmup:
            return np.float32(peak * (step + 1) / warmup)
        share = (step - warmup) / max(steps - warmup, 1)
        falling = {
            "constant": 1.0,
            "linear": 1.0 - share,
            "cosine": (1.0 + math.cos(math.pi * share)) / 2,
        }
        return np.float32(peak * falling[name])

    return rate
