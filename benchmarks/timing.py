"""Timing of compiled functions: interleaved rounds in one process, medians, ratios to a floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

_SPIN = 0.1  # seconds, longer than threads of a BLAS go on spinning after a call


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = False,
) -> dict[str, np.ndarray]:
    """Seconds of each function in each round by the clock, after one warm-up call.

    All functions run in every round, so that a slow moment of the machine hits them alike.

    Args:
        functions: what is timed, by name.
        rounds: how often each runs.
        clock: of seconds.
        warm: whether each timed call follows a tenth of a second of calls of the same function
            that are not timed, so that no function pays for what the last one left in caches and in
            threads that spin.
    """
    for fn in functions.values():
        jax.block_until_ready(fn())
    seconds = {name: np.empty(rounds) for name in functions}
    for i in range(rounds):
        for name, fn in functions.items():
            until = time.perf_counter() + _SPIN
            while warm and time.perf_counter() < until:
                jax.block_until_ready(fn())
            start = clock()
            jax.block_until_ready(fn())
            seconds[name][i] = clock() - start
    return seconds


def ratio(seconds: Mapping[str, np.ndarray], name: str, floor: str) -> float:
    """Median over rounds of time(name) / time(floor)."""
    return float(np.median(seconds[name] / seconds[floor]))
