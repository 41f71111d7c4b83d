"""Low-rank factorization of matrices of any kind, from thin products."""

from nyscaled.lowrank.factorization import factorize
from nyscaled.lowrank.generalized_nystrom import one_pass
from nyscaled.lowrank.host import HostMatrix
from nyscaled.lowrank.host_operator import HostOperator
from nyscaled.lowrank.pivoted import PivotedCholesky, pivoted_cholesky
from nyscaled.lowrank.preconditioner import NystromPreconditioner, nystrom_preconditioner
from nyscaled.lowrank.psd import nystrom
from nyscaled.lowrank.psd_result import PSDApproximation
from nyscaled.lowrank.result import Deviations, LowRank, Status
from nyscaled.lowrank.stream import RowBlocks

__all__ = [
    "Deviations",
    "HostMatrix",
    "HostOperator",
    "LowRank",
    "NystromPreconditioner",
    "PSDApproximation",
    "PivotedCholesky",
    "RowBlocks",
    "Status",
    "factorize",
    "nystrom",
    "nystrom_preconditioner",
    "one_pass",
    "pivoted_cholesky",
]
