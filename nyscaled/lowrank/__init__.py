"""Low-rank factorization of matrices of any kind, from thin products."""

from nyscaled.lowrank.factorization import factorize
from nyscaled.lowrank.generalized_nystrom import one_pass
from nyscaled.lowrank.host import HostMatrix, HostOperator
from nyscaled.lowrank.psd import nystrom
from nyscaled.lowrank.psd_result import PSDApproximation
from nyscaled.lowrank.result import Deviations, LowRank, Status
from nyscaled.lowrank.stream import RowBlocks

__all__ = [
    "Deviations",
    "HostMatrix",
    "HostOperator",
    "LowRank",
    "PSDApproximation",
    "RowBlocks",
    "Status",
    "factorize",
    "nystrom",
    "one_pass",
]
