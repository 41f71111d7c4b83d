"""What factorizations ask of their options, and of what they return."""

from __future__ import annotations

from typing import SupportsIndex, cast

import numpy as np
from jaxtyping import Array, ArrayLike, Key

from nyscaled.lowrank.host import HostMatrix
from nyscaled.lowrank.result import LowRank, Status
from nyscaled.typing import LinearMap, Number
from nyscaled.validation import is_concrete, require_digits, require_rank, require_scalar


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


def require_unset(reason: str, **options: SupportsIndex | bool | None) -> None:
    """Raise ValueError on options that were passed and would not be used.

    Args:
        reason: the end of errors: why they are not used, and what is expected.
        **options: what a user passed, by name; None and False were not.
    """
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is {value!r} and {reason}")


def require_sound(result: LowRank) -> None:
    """Raise ValueError on a result of numbers that are not finite, or too small to have all digits.

    Args:
        result: a factorization, whose entries are known.
    """
    if Status(int(result.status)) is Status.NON_FINITE:
        raise ValueError("A has NaN or Inf entries, or its products overflow; expected finite ones")
    if size := float(result.norm_estimate):
        require_digits(size, result.norm_estimate.dtype)


def largest_rank(max_rank: SupportsIndex | None, shape: tuple[int, ...]) -> int:
    """Return the largest rank that is allowed, min(m, n) by default.

    Args:
        max_rank: what a user passed.
        shape: the shape (m, n) of A.
    """
    if max_rank is None:
        return min(shape)
    return require_rank(max_rank, shape, "max_rank")
