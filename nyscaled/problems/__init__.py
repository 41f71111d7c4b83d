"""Problems: one file each, with its loss, gradient and, where known, global optimum."""

from nyscaled.problems import completion as completion
from nyscaled.problems import onebit as onebit
from nyscaled.problems import phase as phase
from nyscaled.problems import robust as robust
from nyscaled.problems import sensing as sensing
from nyscaled.problems.asymmetric import Asymmetric as Asymmetric
from nyscaled.problems.onebit import OneBit as OneBit
from nyscaled.problems.robust import RobustPCA as RobustPCA
from nyscaled.problems.sensing import Sensing as Sensing
from nyscaled.problems.symmetric import Symmetric as Symmetric
