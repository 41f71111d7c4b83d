"""Starting points: Nyström's, from products with A or from gradients, and others."""

from nyscaled.initializers.nystrom_starts import (
    nystrom,
    nystrom_approximation,
    nystrom_factors,
    nystrom_factors_from_gradient,
    nystrom_from_gradient,
    perturbed,
    random_sketch,
    rescaled,
)
from nyscaled.initializers.others import altgd, small, small_factors, spectral

__all__ = [
    "altgd",
    "nystrom",
    "nystrom_approximation",
    "nystrom_factors",
    "nystrom_factors_from_gradient",
    "nystrom_from_gradient",
    "perturbed",
    "random_sketch",
    "rescaled",
    "small",
    "small_factors",
    "spectral",
]
