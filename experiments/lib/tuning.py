"""One protocol of tuning for all methods: short runs, and the best two in full length.

A method has seven short runs, and one or two more if its best learning rate is at an end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

RATES = (3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2)
STEP, HALF = 10**0.5, 10**0.25
EXTENSIONS = 2
"""Most steps beyond the grid, where the best learning rate is at its end."""


class Point(NamedTuple):
    """A learning rate, and the second number of a method; None for one without."""

    rate: float
    number: float | None


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried for a method.

    Attributes:
        rates: learning rates.
        numbers: values of its second number, the default first; one or none leaves no choice.
    """

    rates: tuple[float, ...] = RATES
    numbers: tuple[float, ...] = ()

    def times(self, factor: float) -> Grid:
        """Return the grid with other learning rates.

        Args:
            factor: what each is multiplied by.
        """
        return dataclasses.replace(self, rates=tuple(_digits(r * factor) for r in self.rates))

    @property
    def first(self) -> float | None:
        """The default of the second number."""
        return self.numbers[0] if self.numbers else None

    def others(self, best: Point) -> list[Point]:
        """Return the last points of the screening: other second numbers at the best learning rate.

        A method without a choice has two learning rates between those of the grid instead, so that
        it has as many of these.
        """
        if len(self.numbers) > 1:
            return [Point(best.rate, number) for number in self.numbers[1:]]
        return [Point(_digits(best.rate * factor), self.first) for factor in (1 / HALF, HALF)]


def tune(grid: Grid, loss: Callable[[Point, bool], float]) -> Point:
    """Return the point with the lowest loss.

    Args:
        grid: what is tried.
        loss: the validation loss of a point, after a short run or (True) one of full length; NaN
            counts as infinite.

    Examples:
        >>> def loss(point, full):
        ...     return abs(math.log(point.rate / 3e-3)) + abs(point.number - 2) / 10
        >>> tune(Grid(numbers=(1.0, 2.0, 0.5)), loss)
        Point(rate=0.0032, number=2.0)
    """
    losses: dict[Point, float] = {}

    def screen(point: Point) -> None:
        losses[point] = _finite(loss(point, False))

    for rate in grid.rates:
        screen(Point(rate, grid.first))
    for _ in range(EXTENSIONS):
        tried = [point.rate for point in losses]
        rate = min(losses, key=losses.__getitem__).rate
        if rate == max(tried):
            screen(Point(_digits(rate * STEP), grid.first))
        elif rate == min(tried):
            screen(Point(_digits(rate / STEP), grid.first))
        else:
            break
    for point in grid.others(min(losses, key=losses.__getitem__)):
        screen(point)
    best = sorted(losses, key=losses.__getitem__)[:2]
    full = {point: _finite(loss(point, True)) for point in best}
    return min(full, key=full.__getitem__)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _digits(rate: float) -> float:
    """Two significant digits, so that equal points are equal."""
    return float(f"{rate:.1e}")
