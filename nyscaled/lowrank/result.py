"""What a factorization returns."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """How a factorization ended; an int32 array under jit and vmap.

    Examples:
        >>> Status.EXACT.message
        'the factors are the matrix, to rounding'
    """

    message: str

    def __new__(cls, value: int, message: str) -> Status:
        status = int.__new__(cls, value)
        status._value_ = value
        status.message = message
        return status

    RANK_REACHED = 0, "the factors have the rank that was asked for"
    CONVERGED = 1, "the estimated error is at most the tolerance"
    EXACT = 2, "the factors are the matrix, to rounding"
    MAX_RANK = 3, "the estimated error is above the tolerance at the largest rank allowed"
    NON_FINITE = 4, "the matrix, or a product with it, has NaN or Inf entries"
    INDEFINITE = 5, "the matrix is not positive semidefinite"
