"""Low-rank factorization of matrices of any kind, from thin products."""

from nyscaled.lowrank.host import HostMatrix, HostOperator

__all__ = ["HostMatrix", "HostOperator"]
