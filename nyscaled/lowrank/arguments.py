"""What both factorizations ask of a tolerance and of the largest rank."""

from __future__ import annotations

from typing import SupportsIndex, cast

import numpy as np
from jaxtyping import Array, ArrayLike, Key

from nyscaled.lowrank.host import HostMatrix
from nyscaled.typing import LinearMap, Number
from nyscaled.validation import is_concrete, require_rank, require_scalar


def known_tolerance(a: LinearMap | HostMatrix, tol: Number | None, key: Key[Array, ""]) -> float:
    """Return `tol` as a float; ValueError unless it lies in (0, 1] and all arguments are known.

    Args:
        a: A.
        tol: what a user passed.
        key: PRNG key.
    """
    if not is_concrete((tol, key)) or not (isinstance(a, HostMatrix) or is_concrete(a)):
        raise ValueError(
            "A, tol or the key is traced; expected a rank under jit, vmap and grad, where the "
            "shapes of results must be known"
        )
    if callable(tol) or np.ndim(cast(ArrayLike, tol)) != 0:
        raise ValueError(f"tol is {tol!r}; expected a number in (0, 1]")
    require_scalar("tol", tol, 0, 1, open_low=True)
    return float(cast(float, tol))


def require_no_options_of_ranks(oversampling: SupportsIndex | None, jackknife: bool) -> None:
    """Raise ValueError on options that a tolerance does not take.

    Args:
        oversampling: what a user passed.
        jackknife: what a user passed.
    """
    if jackknife:
        raise ValueError("jackknife is True and tol is given; expected a rank")
    if oversampling is not None:
        raise ValueError(f"oversampling is {oversampling} and tol is given; expected a rank")


def largest_rank(max_rank: SupportsIndex | None, shape: tuple[int, ...]) -> int:
    """Return the largest rank that is allowed, min(m, n) by default.

    Args:
        max_rank: what a user passed.
        shape: the shape (m, n) of A.
    """
    if max_rank is None:
        return min(shape)
    return require_rank(max_rank, shape, "max_rank")
