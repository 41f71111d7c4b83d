"""What a figure shows: series of values, in full or on a logarithmic selection of iterations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Curve(NamedTuple):
    """Values y at abscissas x that are not the iterations 0, 1, …, for example steps against κ."""

    x: ArrayLike
    y: ArrayLike

    @classmethod
    def of(cls, values: Curve | ArrayLike) -> Curve:
        """Return `values` if they are a Curve; otherwise they are errors by iteration."""
        if isinstance(values, cls):
            return cls(np.asarray(values.x), np.asarray(values.y))
        errors = np.asarray(values)
        return cls(np.arange(len(errors)), errors)


Curves = Mapping[str, Mapping[str, Curve | ArrayLike]]
"""panel → series → a Curve, or errors by iteration."""

KEPT = 300
"""The most iterations of a series in a record, in addition to the start."""


def kept_iterations(count: int) -> np.ndarray:
    """Return which of the iterations 0 … count − 1 a record holds: all, or KEPT on a log scale."""
    if count <= KEPT + 1:
        return np.arange(count)
    return np.unique([0, *np.geomspace(1, count - 1, KEPT).round().astype(int)])
