"""Runs over grids and trials: all in one compiled call, the best of a grid, and its spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike


def over(fn: Callable[..., Any], *in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """Return `fn` of all combinations of several axes, compiled as one call.

    Args:
        fn: one run.
        *in_axes: per axis of the result, from the first, the arguments of `fn` that have this axis
            (0) and those that do not (None).
    """
    for axes in reversed(in_axes):
        fn = jax.vmap(fn, axes)
    return jax.jit(fn)


def spread(values: ArrayLike, axis: int) -> dict[str, np.ndarray]:
    """Return median, least and largest values over the trials.

    Args:
        values: numbers with an axis of trials.
        axis: that axis.

    Returns:
        The three by the suffix of the panel that records them: "", " low", " high".
    """
    reductions = {"": np.median, " low": np.min, " high": np.max}
    return {suffix: reduce(np.asarray(values), axis=axis) for suffix, reduce in reductions.items()}


class Best(NamedTuple):
    """The best point of a grid, and the trials at this point: (trial, …)."""

    point: int
    trials: np.ndarray

    @property
    def median(self) -> np.ndarray:
        """The median over the trials."""
        return np.median(self.trials, axis=0)


def best(values: ArrayLike, *keys: ArrayLike) -> Best:
    """Return the point of a grid with the least first key; among equals, the least second key.

    Args:
        values: numbers of each point and trial, (point, trial, …).
        *keys: numbers of each point, (point,).
    """
    point = int(np.lexsort([np.asarray(key) for key in reversed(keys)])[0])
    return Best(point, np.asarray(values)[point])
