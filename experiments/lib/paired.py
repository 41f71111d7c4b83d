"""Statistics of paired runs: the same data, order and seed with two methods.

A mean whose interval includes zero is no difference that was seen; it is "the same" only if its
whole interval lies inside a margin. A study that is too small shows neither of the two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

MOST = 20
"""Most pairs of the sign-flip test, which computes all 2ⁿ signs."""


class Paired(NamedTuple):
    """What paired differences show.

    Attributes:
        mean: their mean.
        low: lower end of the interval of the mean.
        high: upper end.
        p: p-value of the exact sign-flip test, two-sided.
        t_test: p-value of the paired t-test. Unlike p it has no smallest value, so that it can be
            corrected for many methods.
        detectable: smallest mean that one t-test of this size and spread, which is not corrected
            for other tests, finds in 4 of 5 cases.
        pairs: number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    t_test: float
    detectable: float
    pairs: int


def interval(differences: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the t-interval of the mean.

    Args:
        differences: independent differences, at least 2.
        level: share of studies whose interval has the mean inside.

    Examples:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    values = _checked(differences)
    half = _error(values) * float(scipy.stats.t.ppf((1 + level) / 2, len(values) - 1))
    return float(values.mean() - half), float(values.mean() + half)


def sign_flip(differences: ArrayLike) -> float:
    """Return the share of the signs for which |Σ ±d| is at least |Σ d|.

    This is the p-value of the hypothesis that the differences are symmetric about 0. Of n pairs it
    is at least 2¹⁻ⁿ.

    Args:
        differences: independent differences.

    Examples:
        >>> sign_flip([1.0, 2.0, 3.0])
        0.25
    """
    values = _checked(differences)
    if len(values) > MOST:
        raise ValueError(f"there are {len(values)} differences; expected at most {MOST}")
    sums = np.zeros(1)
    for value in np.abs(values):
        sums = np.concatenate([sums + value, sums - value])
    # Sums that are equal but for rounding count as equal.
    limit = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    return float(np.mean(np.abs(sums) >= limit))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Return p-values of several hypotheses, corrected by Holm's method.

    Args:
        p_values: p-value of each hypothesis.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1)
    return corrected


def equivalent(differences: ArrayLike, margin: float, alpha: float = 0.05) -> bool:
    """Return whether the mean lies within ±margin, by two one-sided t-tests.

    Args:
        differences: independent differences, at least 2.
        margin: largest mean that has no practical effect.
        alpha: level of each test; their interval has the level 1 − 2·alpha.

    Examples:
        >>> equivalent([0.1, -0.1, 0.0, 0.05], margin=0.5)
        True
        >>> equivalent([1.0, -1.0, 0.0, 0.5], margin=0.5)
        False
    """
    low, high = interval(differences, 1 - 2 * alpha)
    return bool(-margin < low and high < margin)


def detectable(differences: ArrayLike, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest mean that a paired t-test of this size and spread finds.

    Args:
        differences: independent differences, at least 2, of which only the spread is used.
        power: share of the studies that are to find it.
        alpha: level of the test, two-sided.

    Examples:
        >>> round(detectable([-1.0, 0.0, 1.0]), 2)
        3.26
    """
    values = _checked(differences)
    degrees = len(values) - 1
    critical = float(scipy.stats.t.ppf(1 - alpha / 2, degrees))
    low, high = 0.0, 2 * critical + 10
    while high - low > 1e-6 * high:  # the power grows with the shift; the other tail is no power
        shift = (low + high) / 2
        low, high = (shift, high) if _power(shift, degrees, critical) < power else (low, shift)
    return high * _error(values)


def t_test(differences: ArrayLike) -> float:
    """Return the p-value of the paired t-test, two-sided.

    Args:
        differences: independent differences, at least 2.

    Examples:
        >>> round(t_test([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    values = _checked(differences)
    error, mean = _error(values), abs(float(values.mean()))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * scipy.stats.t.sf(mean / error, len(values) - 1))


def _power(shift: float, degrees: int, critical: float) -> float:
    return float(scipy.stats.nct.sf(critical, degrees, shift))


def compare(differences: ArrayLike) -> Paired:
    """Return what paired differences show.

    Args:
        differences: independent differences, at least 2.

    Examples:
        >>> found = compare([1.0, 2.0, 3.0])
        >>> found.mean, found.p, found.pairs
        (2.0, 0.25, 3)
    """
    values = _checked(differences)
    low, high = interval(values)
    return Paired(
        float(values.mean()),
        low,
        high,
        sign_flip(values),
        t_test(values),
        detectable(values),
        len(values),
    )


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Return the p-value of the exact test of McNemar, that two methods are right equally often.

    Args:
        first: whether one method is right, for each item.
        second: whether the other one is right, for the same items.

    Examples:
        >>> mcnemar([True, True, True, False], [True, False, False, False])
        0.5
    """
    one, two = np.asarray(first, bool), np.asarray(second, bool)
    if one.shape != two.shape:
        raise ValueError(f"there are {one.shape} and {two.shape} answers; expected the same items")
    wins, losses = int(np.sum(one & ~two)), int(np.sum(two & ~one))
    if wins + losses == 0:
        return 1.0
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue)


def _error(values: np.ndarray) -> float:
    """The standard error of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


def _checked(differences: ArrayLike) -> np.ndarray:
    values = np.asarray(differences, float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"differences are {values.tolist()!r:.80}; expected at least 2 finite numbers"
        )
    return values
