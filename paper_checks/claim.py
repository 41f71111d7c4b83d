"""What a claim is: a statement, its measurement, and a control that must violate it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

SECTIONS = (
    "symmetric_exact",
    "phases",
    "symmetric_under",
    "counterexamples",
    "theorem_2",
    "lemma_5",
    "symmetric_over",
    "starts",
    "equations",
    "asymmetric",
    "corollary",
    "factorization",
    "helpers",
    "adapters",
    "order",
    "table1",
    "table1_others",
    "fastest",
    "ours",
    "rounding",
    "neighbours",
    "robust",
)
"""The modules that hold claims, in the order of the report."""


Source = Literal["paper", "ours", "literature"]
"""Whose statement it is: the paper's, this project's, or another paper's, cited in the statement."""


Sense = Literal["≤", "≥"]


@dataclasses.dataclass(frozen=True)
class Limit:
    """A further number of a claim whose size rounding decides: it is reported as its limit.

    Attributes:
        value: what was measured.
        limit: what it must not exceed ("≤") or fall below ("≥").
        sense: "≤" or "≥".
    """

    value: float
    limit: float
    sense: Sense = "≤"

    @property
    def holds(self) -> bool:
        """Whether the value keeps its limit; never with NaN."""
        return self.value <= self.limit if self.sense == "≤" else self.value >= self.limit


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measurement held against its bound.

    The report shows `measured` as a number, unless rounding decides its size. A number that differs
    from processor to processor is shown as a bound instead: within the claim's bound if `rounding`
    is set, and beyond it if `at_least` is.

    Attributes:
        measured: the number that was measured.
        bound: what the claim says of it.
        sense: "≤" if the bound is from above, "≥" if from below.
        detail: what the number is, and over what it was taken.
        facts: numbers for the report beyond the claim itself, by name; a Limit must hold.
        rounding: a number that satisfies the bound is rounding error.
        at_least: a number that violates the bound is amplified rounding error of at least this size.
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
        """Whether the bound and the limits of all facts hold; never with NaN."""
        limits = (fact for fact in self.facts.values() if isinstance(fact, Limit))
        return self._within and all(limit.holds for limit in limits)

    @property
    def violated(self) -> bool:
        """Whether the bound is broken by a number: NaN neither satisfies nor violates."""
        return not self._within and not math.isnan(self.measured)

    @property
    def _within(self) -> bool:
        return self.measured <= self.bound if self.sense == "≤" else self.measured >= self.bound

    @property
    def margin(self) -> float:
        """How many times the measurement could grow (or shrink, for "≥") within the bound."""
        top, bottom = self.bound, self.measured
        if self.sense == "≥":
            top, bottom = bottom, top
        return top / bottom if bottom else math.inf


def worst(
    detail: str = "",
    *,
    rounding: bool = False,
    at_least: float | None = None,
    **parts: tuple[Any, float],
) -> Measured:
    """Return several `name=(measured, upper bound)` as one: the largest ratio, at most 1.

    Args:
        detail: what the parts are, and over what they were taken.
        rounding: whether the parts are rounding errors where they keep their bounds.
        at_least: as in `Measured`, for the largest ratio.
        **parts: each measurement with its bound.
    """
    ratios = {name: float(value) / bound for name, (value, bound) in parts.items()}
    broken = [ratio for ratio in ratios.values() if math.isnan(ratio)]
    largest = broken[0] if broken else max(ratios.values())

    def shown(name: str, value: float, bound: float) -> str:
        label = name.replace("_", " ") if name.isidentifier() else name  # "‖E‖_F" is none
        if rounding and value <= bound:
            return f"{label} ≤ {bound:.3g}"
        return f"{label} {value:.3g} (allowed {bound:.3g})"

    text = ", ".join(shown(name, float(v), bound) for name, (v, bound) in parts.items())
    detail = f"{detail}; {text}" if detail else text
    return Measured(largest, 1.0, detail=detail, rounding=rounding, at_least=at_least)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that can be run.

    Attributes:
        id: as in the paper ("lem-2i", "thm-1-phase2", "eq-12"), or ours ("E1-closed-form").
        source: whose statement it is.
        statement: what is claimed, in formulas.
        hypotheses: under which conditions.
        check: measures it where the hypotheses hold.
        control: the same measurement with one of them removed.
        removes: the one hypothesis that the control does without.
        instead: what the control does in its place.
        section: the module that the claim is in.
        function: the name of the function that measures it, and its line there.
    """

    id: str
    source: Source
    statement: str
    hypotheses: str
    check: Callable[[], Measured]
    control: Callable[[], Measured]
    removes: str
    instead: str
    section: str = ""
    function: tuple[str, int] = ("", 0)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A claim that was run; it passes iff its check holds and its control does not."""

    claim: Claim
    check: Measured
    control: Measured

    @property
    def passed(self) -> bool:
        return self.check.satisfied and self.control.violated


_REGISTRY: dict[str, Claim] = {}


def claim(
    id: str,  # noqa: A002
    statement: str,
    *,
    hypotheses: str,
    removes: str,
    instead: str,
    source: Source = "paper",
    **control: Any,
) -> Callable[[Callable[..., Measured]], Callable[..., Measured]]:
    """Register a measurement as a claim.

    The control is the decorated function itself, called with the keywords `control`, which take
    one hypothesis away. The report says of it: "Control: without {removes}; instead, {instead}."
    """
    if not control:
        raise ValueError(f"claim {id!r} has no control; pass the keyword that removes a hypothesis")

    def register(measure: Callable[..., Measured]) -> Callable[..., Measured]:
        if id in _REGISTRY:
            raise ValueError(f"claim {id!r} is registered twice")
        _REGISTRY[id] = Claim(
            id,
            source,
            statement,
            hypotheses,
            check=measure,
            control=functools.partial(measure, **control),
            removes=removes,
            instead=instead,
            section=measure.__module__.rpartition(".")[2],
            function=(measure.__name__, measure.__code__.co_firstlineno),
        )
        return measure

    return register


def registry() -> dict[str, Claim]:
    """All claims by id, in the order of the report."""
    for section in SECTIONS:
        importlib.import_module(f"paper_checks.{section}")
    order = {section: i for i, section in enumerate(SECTIONS)}
    return dict(sorted(_REGISTRY.items(), key=lambda item: order[item[1].section]))


def select(claims: Mapping[str, Claim], only: tuple[str, ...]) -> dict[str, Claim]:
    """The claims named by `only`: "thm-1" is thm-1 and all that begins with "thm-1-".

    Raises:
        ValueError: if an id names no claim.
    """
    for wanted in only:
        if not any(_named(wanted, id) for id in claims):  # noqa: A001
            raise ValueError(f"no claim is called {wanted!r}; --list shows the ids")
    return {
        id: found
        for id, found in claims.items()  # noqa: A001
        if not only or any(_named(wanted, id) for wanted in only)
    }


def _named(wanted: str, id: str) -> bool:  # noqa: A002
    wanted, id = wanted.lower(), id.lower()  # noqa: A001
    return id == wanted or id.startswith(wanted + "-")


def run(claim: Claim) -> Outcome:
    """Runs a claim and its control."""
    return Outcome(claim, claim.check(), claim.control())
