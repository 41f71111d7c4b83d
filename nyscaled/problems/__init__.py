"""Problems: one file each, with its loss, gradient and, where known, global optimum."""

from nyscaled.problems import completion, onebit, phase, robust, sensing
from nyscaled.problems.asymmetric import Asymmetric
from nyscaled.problems.onebit import OneBit
from nyscaled.problems.robust import RobustPCA
from nyscaled.problems.sensing import Sensing
from nyscaled.problems.symmetric import Symmetric

__all__ = [
    "Asymmetric",
    "OneBit",
    "RobustPCA",
    "Sensing",
    "Symmetric",
    "completion",
    "onebit",
    "phase",
    "robust",
    "sensing",
]
