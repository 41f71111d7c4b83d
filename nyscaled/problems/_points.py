"""A point of a problem: one factor X, for XXᵀ, or a pair of `Factors`, for XYᵀ."""

from __future__ import annotations

from nyscaled.matrices import as_factors
from nyscaled.typing import Factors, Params


def both(point: Params) -> Factors:
    """Return the left and the right factor of the product: of one factor X, X twice."""
    return as_factors(point if isinstance(point, Factors) else (point, point))
