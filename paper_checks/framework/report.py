"""REPORT.md, and how a generated one is compared with the committed one."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_checks.framework import common
from paper_checks.framework.claim import Limit, Measured, Outcome
from paper_checks.framework.registry import SECTIONS

COMMAND = "python -m paper_checks --report paper_checks/REPORT.md"
FINDINGS = "../docs/pages/findings.md"
_TEMPLATE = Path(__file__).with_name("REPORT.template.md")
_COMMITTED = Path(__file__).parent.parent / "REPORT.md"

TOLERANCE = 0.02
"""The allowed difference of two numbers in the comparison of reports, relative to the larger.

It covers the third printed digit. Numbers that rounding decides are printed as bounds.
"""


def number(value: float) -> str:
    """Return a number as the report shows it: whole numbers in full, others in three digits."""
    return f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e6 else f"{value:.3g}"


def bound(value: float) -> str:
    """Return a bound in as many digits as it has."""
    return f"{value:.6g}"


def fact(value: float | Limit) -> str:
    """Return a further number, or its limit where rounding decides the number."""
    if isinstance(value, Limit) and value.holds:
        return f"{value.sense} {bound(value.limit)}"
    return number(value.value if isinstance(value, Limit) else value)


def shown(measured: Measured) -> str:
    """Return the measurement, or the bound that it keeps where rounding decides the number."""
    if measured.rounding and measured.satisfied:
        return f"{measured.sense} {bound(measured.bound)}"
    least = measured.at_least
    if least is not None and measured.violated and measured.measured >= least:
        return f"≥ {bound(least)}"
    return number(measured.measured)


def margin(measured: Measured) -> str:
    """Return the factor between the measurement and its bound."""
    return f"{measured.margin:.3g}" if measured.margin <= 1e4 else "> 1e4"


def facts(measured: Measured) -> str:
    """Return the measurement's further numbers, with their names."""
    return "; ".join(f"{name}: {fact(value)}" for name, value in measured.facts.items())


def _entry(outcome: Outcome) -> list[str]:
    """Return the lines of one claim."""
    claim, check, control = outcome.claim, outcome.check, outcome.control
    further = f" ({facts(check)})" if check.facts else ""
    distance = "" if check.rounding else f", margin {margin(check)}"
    name, line = claim.function
    derivation = f"- derivation: [findings]({FINDINGS}#{claim.derivation})"
    return [
        f"### {claim.id}",
        "",
        f"**{claim.statement}**",
        "",
        f"- hypotheses: {claim.hypotheses}",
        f"- bound: {check.sense} {bound(check.bound)}",
        f"- measured: {shown(check)}{distance}; {check.detail}{further}",
        f"- control: without {claim.removes}; instead, {claim.instead}",
        f"- control measured: {shown(control)}" + ("" if outcome.passed else " **FAILS**"),
        f"- code: [`{name}`](claims/{claim.section}.py#L{line})",
        *([derivation] if claim.derivation else []),
        "",
    ]


def _overview(outcomes: Sequence[Outcome]) -> str:
    """Return the table of all claims."""
    lines = ["| id | whose | bound | measured | control | |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        claim, check = outcome.claim, outcome.check
        cells = (
            f"[{claim.id}](#{claim.id.lower()})",
            claim.source,
            f"{check.sense} {bound(check.bound)}",
            shown(check),
            shown(outcome.control),
            "pass" if outcome.passed else "**FAIL**",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _sections(outcomes: Sequence[Outcome]) -> str:
    """Return the entries of all claims under the titles of their sections."""
    lines = []
    for section, title in SECTIONS.items():
        lines += [f"## {title}", ""]
        for outcome in outcomes:
            if outcome.claim.section == section:
                lines += _entry(outcome)
    return "\n".join(lines)


_FIELD = re.compile(r"\{\{(.+?)\}\}(?!\})")  # the name of a fact may end with a brace


def filled(template: str, outcomes: Mapping[str, Outcome], values: Mapping[str, str]) -> str:
    """Return a template with its fields replaced.

    A field is the name of a value, `{{versions}}`; a claim, `{{lem-10}}`, for what its check
    measured; or a claim and one of its facts, `{{lem-19 | C₁}}`. `.control` after the id of a claim
    means its control, `{{lem-10.control}}`.

    Args:
        template: a text with fields.
        outcomes: claims by id.
        values: other values by name.

    Raises:
        ValueError: if a field names neither a value nor a claim with this fact.
    """

    def value(match: re.Match[str]) -> str:
        subject, _, name = (part.strip() for part in match[1].partition(" | "))
        if subject in values and not name:
            return values[subject]
        id, _, control = subject.partition(".")  # noqa: A001
        if id not in outcomes or control not in ("", "control"):
            raise ValueError(
                f"the field {match[0]} names {subject!r}; expected the id of a claim, or one of "
                f"{sorted(values)}"
            )
        measured = outcomes[id].control if control else outcomes[id].check
        if name and name not in measured.facts:
            raise ValueError(
                f"the field {match[0]} names the fact {name!r}; expected one of "
                f"{sorted(measured.facts)}"
            )
        return fact(measured.facts[name]) if name else shown(measured)

    return _FIELD.sub(value, template)


def render(outcomes: Sequence[Outcome]) -> str:
    """Return the report as Markdown."""
    packages = ("nyscaled", "jax", "numpy", "mpmath")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    values = {
        "passed": str(sum(outcome.passed for outcome in outcomes)),
        "total": str(len(outcomes)),
        "command": COMMAND,
        "seed": str(common.SEED),
        "tolerance": f"{TOLERANCE:.0%}",
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "overview": _overview(outcomes),
        "sections": _sections(outcomes),
    }
    by_id = {outcome.claim.id: outcome for outcome in outcomes}
    template = _TEMPLATE.read_text(encoding="utf-8")
    return filled(re.sub(r"\n {2}(?=\S)", " ", template), by_id, values)  # a paragraph per line


# Digits inside ids, names and exponents of formulas are text; these are numbers that stand free.
_NUMBER = re.compile(r"(?<![\w.^{+−-])(?:> )?(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|-?inf)(?![\w^.]*\w)")
_MOVING = ("- measured:", "- control measured:", "* **", "| [")


def committed() -> str:
    """Return the report that the repository contains."""
    return _COMMITTED.read_text(encoding="utf-8")


def _agree(a: float, b: float) -> bool:
    """Return whether two numbers agree to TOLERANCE; 0 and inf agree only with themselves."""
    return a == b or abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) < float("inf")


def differences(old: str, new: str) -> list[str]:
    """Return the lines in which two reports differ by more than the last printed digit.

    Ids, statements, hypotheses, bounds and all other text must be equal. Numbers in the lines of
    measurements, in the table and in the section on looseness may differ by TOLERANCE. Versions are
    not compared.

    Args:
        old: the committed report.
        new: the generated report.
    """
    before, after = old.splitlines(), new.splitlines()
    if len(before) != len(after):
        return [f"{len(before)} lines committed, {len(after)} generated"]
    changed = []
    for i, (a, b) in enumerate(zip(before, after, strict=True), start=1):
        if a.startswith("Versions:") and b.startswith("Versions:"):
            continue
        if a != b and not (b.startswith(_MOVING) and _same_but_for_numbers(a, b)):
            changed.append(f"line {i}: committed {a!r}, generated {b!r}")
    return changed


def _same_but_for_numbers(a: str, b: str) -> bool:
    if _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    pairs = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True)
    return all(_agree(float(x), float(y)) for x, y in pairs)
