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
    "symmetric_under",
    "symmetric_over",
    "asymmetric",
    "helpers",
    "adapters",
    "order",
    "table1",
    "fastest",
    "ours",
    "neighbours",
    "robust",
)
"""The modules that hold claims, in the order of the report."""


Source = Literal["paper", "ours", "literature"]
"""Whose statement it is: the paper's, this project's, or another paper's, cited in the statement."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measurement held against its bound.

    Attributes:
        measured: the number that was measured.
        bound: what the claim says of it.
        sense: "≤" if the bound is from above, "≥" if from below.
        detail: what the number is, and over what it was taken.
        facts: numbers for the report beyond the claim itself, by name.
    """

    measured: float
    bound: float
    sense: Literal["≤", "≥"] = "≤"
    detail: str = ""
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def satisfied(self) -> bool:
        """Whether the bound holds; never with NaN."""
        return self.measured <= self.bound if self.sense == "≤" else self.measured >= self.bound

    @property
    def violated(self) -> bool:
        """Whether the bound is broken by a number: NaN neither satisfies nor violates."""
        return not self.satisfied and not math.isnan(self.measured)

    @property
    def margin(self) -> float:
        """How many times the measurement could grow (or shrink, for "≥") within the bound."""
        top, bottom = self.bound, self.measured
        if self.sense == "≥":
            top, bottom = bottom, top
        return top / bottom if bottom else math.inf


def worst(detail: str = "", **parts: tuple[Any, float]) -> Measured:
    """Several `name=(measured, upper bound)` as one: the largest ratio, which must not exceed 1."""
    ratios = {name: float(value) / bound for name, (value, bound) in parts.items()}
    broken = [ratio for ratio in ratios.values() if math.isnan(ratio)]
    largest = broken[0] if broken else max(ratios.values())
    shown = ", ".join(
        f"{name.replace('_', ' ')} {float(value):.1e} (allowed {bound:.1e})"
        for name, (value, bound) in parts.items()
    )
    return Measured(largest, 1.0, detail=f"{detail}; {shown}" if detail else shown)


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
        control_description: which one, and how.
        section: the module that the claim is in.
    """

    id: str
    source: Source
    statement: str
    hypotheses: str
    check: Callable[[], Measured]
    control: Callable[[], Measured]
    control_description: str
    section: str = ""


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
    without: str,
    source: Source = "paper",
    **removed: Any,
) -> Callable[[Callable[..., Measured]], Callable[..., Measured]]:
    """Registers a measurement as a claim.

    The control is the decorated function itself, called with the keywords `removed`: each takes
    one hypothesis away. `without` says in words which.
    """
    if not removed:
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
            control=functools.partial(measure, **removed),
            control_description=without,
            section=measure.__module__.rpartition(".")[2],
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
