"""What a claim is: a statement, its measurement, and a control that must violate it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

Source = Literal["paper", "ours", "literature"]
"""Who states it: the paper, this project, or another paper, which the statement cites."""


Sense = Literal["≤", "≥"]


@dataclasses.dataclass(frozen=True)
class Limit:
    """A further number of a claim whose size rounding decides, so that the report shows its limit.

    Attributes:
        value: the number measured.
        limit: the number that it must not exceed ("≤") or fall below ("≥").
        sense: "≤" or "≥".
    """

    value: float
    limit: float
    sense: Sense = "≤"

    @property
    def holds(self) -> bool:
        """Whether the value keeps its limit; False for NaN."""
        return self.value <= self.limit if self.sense == "≤" else self.value >= self.limit


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measurement and its bound.

    The report shows `measured` as a number, unless rounding decides its size and it differs between
    processors. Then the report shows a bound: the claim's bound if `rounding` is set and the number
    satisfies it, and `at_least` if that is set and the number violates the bound.

    Attributes:
        measured: the number measured.
        bound: the bound that the claim states.
        sense: "≤" for an upper bound, "≥" for a lower bound.
        detail: what the number is, and what it was maximized over.
        facts: further numbers for the report, by name; each `Limit` among them must hold.
        rounding: whether a number that satisfies the bound is rounding error.
        at_least: the least size of a number that violates the bound by amplified rounding error.
    """

    measured: float
    bound: float
    sense: Sense = "≤"
    detail: str = ""
    facts: Mapping[str, float | Limit] = dataclasses.field(default_factory=dict)
    rounding: bool = False
    at_least: float | None = None

    @property
    def satisfied(self) -> bool:
        """Whether the bound and the limits of all facts hold; False for NaN."""
        limits = (fact for fact in self.facts.values() if isinstance(fact, Limit))
        return self._within and all(limit.holds for limit in limits)

    @property
    def violated(self) -> bool:
        """Whether a number breaks the bound; NaN neither satisfies nor violates it."""
        return not self._within and not math.isnan(self.measured)

    @property
    def _within(self) -> bool:
        return self.measured <= self.bound if self.sense == "≤" else self.measured >= self.bound

    @property
    def margin(self) -> float:
        """The factor by which the measurement could grow (for "≥": shrink) within the bound."""
        top, bottom = self.bound, self.measured
        if self.sense == "≥":
            top, bottom = bottom, top
        return top / bottom if bottom else math.inf


Parts = dict[str, tuple[float, float]]
"""Measurements by name, each with its upper bound."""


def worst(
    detail: str, parts: Parts, *, rounding: bool = False, at_least: float | None = None
) -> Measured:
    """Return several measurements as one: the largest ratio of a measurement to its bound, ≤ 1.

    Args:
        detail: what the parts are, and what they were maximized over.
        parts: each measurement with its bound.
        rounding: whether parts within their bounds are rounding errors.
        at_least: the `at_least` of `Measured`, for the largest ratio.
    """
    ratios = [float(value) / bound for value, bound in parts.values()]
    broken = [ratio for ratio in ratios if math.isnan(ratio)]
    largest = broken[0] if broken else max(ratios)

    def shown(name: str, value: float, bound: float) -> str:
        if rounding and value <= bound:
            return f"{name} ≤ {bound:.3g}"
        return f"{name} {value:.3g} (allowed {bound:.3g})"

    text = ", ".join(shown(name, float(value), bound) for name, (value, bound) in parts.items())
    detail = f"{detail}; {text}" if detail else text
    return Measured(largest, 1.0, detail=detail, rounding=rounding, at_least=at_least)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that can be run.

    Attributes:
        id: the number in the paper ("lem-2i", "thm-1-phase2", "eq-12"), or a name
            ("exact-trajectory").
        source: who states it.
        statement: the statement in formulas.
        hypotheses: the conditions, and the runs that meet them.
        check: measures the statement where the hypotheses hold.
        control: the same measurement with one hypothesis removed.
        removes: the hypothesis that the control removes.
        instead: what the control does in its place.
        derivation: the anchor in docs/pages/findings.md of the derivation, for a statement that is
            not in a paper.
        section: the module of `paper_checks.claims` that contains the claim.
        function: the name of the function that measures it, and the line where it begins.
    """

    id: str
    source: Source
    statement: str
    hypotheses: str
    check: Callable[[], Measured]
    control: Callable[[], Measured]
    removes: str
    instead: str
    derivation: str = ""
    section: str = ""
    function: tuple[str, int] = ("", 0)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A claim with the results of its check and of its control."""

    claim: Claim
    check: Measured
    control: Measured

    @property
    def passed(self) -> bool:
        """Whether the check holds and the control does not."""
        return self.check.satisfied and self.control.violated
