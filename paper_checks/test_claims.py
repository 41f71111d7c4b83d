"""Each claim as a test, the tests of the framework, and the report compared with the code."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from paper_checks.__main__ import Config, as_record, main
from paper_checks.framework import Claim, Limit, Measured, Outcome, claim, report, worst
from paper_checks.framework.common import per_dtype
from paper_checks.framework.registry import registry, select
from paper_checks.framework.runner import run_all

CLAIMS = registry()
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """The outcomes of the claims that this run selects; each claim runs once."""
    items = request.session.items
    cases = [
        item.callspec.params
        for item in items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    names = {case["name"] for case in cases if "name" in case}
    if any(item.name == "test_report_is_what_the_code_generates" for item in items):
        names = set(CLAIMS)
    selected = [claim for name, claim in CLAIMS.items() if name in names]
    return {outcome.claim.id: outcome for outcome in run_all(selected)}


@pytest.mark.parametrize("name", CLAIMS)
def test_claim(name: str, outcomes: dict[str, Outcome]) -> None:
    result = outcomes[name]
    assert result.check.satisfied, result.check
    assert result.control.violated, result.control


def test_report_is_what_the_code_generates(outcomes: dict[str, Outcome]) -> None:
    generated = report.render([outcomes[name] for name in CLAIMS])
    assert report.differences(report.committed(), generated) == []


def make(check: float, control: float) -> Outcome:
    results = Measured(check, 1.0), Measured(control, 1.0)
    claim = Claim(
        "made-up",
        "ours",
        "x ≤ 1",
        "none",
        check=lambda: results[0],
        control=lambda: results[1],
        removes="anything",
        instead="nothing",
        section="exact_dynamics",
    )
    return Outcome(claim, *results)


@pytest.mark.parametrize(
    ("check", "control", "passed"),
    [
        (0.5, 2.0, True),
        (0.5, 0.9, False),  # a control that holds
        (2.0, 3.0, False),  # a check that fails
        (math.nan, 2.0, False),
        (0.5, math.nan, False),  # a control that is NaN shows nothing
        (0.5, math.inf, True),
    ],
)
def test_passes_only_if_the_check_holds_and_the_control_does_not(
    check: float, control: float, passed: bool
) -> None:
    result = make(check, control)
    assert result.passed is passed
    assert as_record(result)["passed"] is passed


def test_a_lower_bound_is_read_from_below() -> None:
    assert Measured(2.0, 1.5, "≥").satisfied
    assert Measured(1.0, 1.5, "≥").violated
    assert Measured(3.0, 1.5, "≥").margin == 2.0


def test_worst_is_the_part_nearest_its_bound_and_keeps_nan() -> None:
    assert worst("", {"a": (1.0, 10.0), "b": (3.0, 4.0)}).measured == 0.75
    assert math.isnan(worst("", {"a": (1.0, 10.0), "b": (math.nan, 4.0)}).measured)


def test_worst_shows_formulas_as_they_are() -> None:
    parts = {"two words": (1.0, 2.0), "‖E‖_F": (1.0, 2.0)}
    assert worst("", parts).detail == "two words 1 (allowed 2), ‖E‖_F 1 (allowed 2)"


def test_only_selects_a_group_by_its_prefix() -> None:
    ids = ("thm-1-phase1", "thm-1", "thm-10", "lem-1", "lem-11")
    claims: dict[str, Claim] = dict.fromkeys(ids, CLAIMS["lem-1"])
    assert set(select(claims, ("thm-1",))) == {"thm-1-phase1", "thm-1"}
    assert set(select(claims, ("LEM-1",))) == {"lem-1"}
    with pytest.raises(ValueError, match="thm-7"):
        select(claims, ("thm-7",))


def test_each_claim_has_all_its_parts() -> None:
    assert len(CLAIMS) >= 120
    for each in CLAIMS.values():
        assert each.statement
        assert each.hypotheses
        assert each.removes
        assert each.instead


def test_each_derivation_is_an_anchor_of_the_findings() -> None:
    findings = (ROOT / "docs" / "pages" / "findings.md").read_text(encoding="utf-8")
    anchors = set(re.findall(r'<a id="([\w-]+)">', findings))
    derivations = {claim.derivation for claim in CLAIMS.values() if claim.source == "ours"}
    assert derivations <= anchors
    assert "" not in derivations


def test_a_claim_of_ours_without_a_derivation_is_refused() -> None:
    words: dict[str, Any] = {"hypotheses": "none", "removes": "x", "instead": "y", "step": 1}
    with pytest.raises(ValueError, match="expected an anchor"):
        claim("made-up", "x ≤ 1", source="ours", **words)
    with pytest.raises(ValueError, match="expected an anchor"):
        claim("made-up", "x ≤ 1", derivation="accuracy", **words)


def test_per_dtype_measures_in_each_dtype() -> None:
    parts = per_dtype(lambda dtype: {"float64": 1.0, "float32": 3.0}[dtype], 2.0, "X")
    assert parts == {"X float64": (1.0, 2.0), "X float32": (3.0, 2.0)}
    assert set(per_dtype(lambda dtype: 0, 1.0)) == {"float64", "float32"}


def test_fields_of_the_template_are_filled_by_claim_fact_and_control() -> None:
    outcome = Outcome(
        CLAIMS["lem-1"], Measured(0.25, 1.0, facts={"C₁, {x}": 7.0}), Measured(math.inf, 1.0)
    )
    text = "{{lem-1}} {{lem-1 | C₁, {x}}} {{lem-1.control}} {{passed}}"
    assert report.filled(text, {"lem-1": outcome}, {"passed": "3"}) == "0.25 7 inf 3"
    for field in ("{{lem-2}}", "{{lem-1 | C₂}}", "{{lem-1.check}}"):
        with pytest.raises(ValueError, match="expected"):
            report.filled(field, {"lem-1": outcome}, {})


def test_command_line_writes_records_and_returns_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert main(Config(only=("lem-14", "lem-18"), json=path)) == 0
    records = json.loads(path.read_text())
    fields = {"id", "source", "statement", "measured", "bound", "control", "passed"}
    assert [r["id"] for r in records] == ["lem-14", "lem-18"]
    assert all(set(r) == fields and r["passed"] for r in records)
    assert "2 of 2 claims pass" in capsys.readouterr().out


def test_a_fact_that_breaks_its_limit_fails_the_check() -> None:
    facts = {"least": Limit(2.0, 1.0, "≥"), "most": Limit(1e-16, 1e-13)}
    assert Measured(0.5, 1.0, facts=facts).satisfied
    assert not Measured(0.5, 1.0, facts=facts | {"most": Limit(1e-12, 1e-13)}).satisfied
    assert not Measured(0.5, 1.0, facts=facts | {"most": Limit(math.nan, 1e-13)}).satisfied


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (Measured(0.5, 1.0), "0.5"),
        (Measured(3e-15, 1e-13, rounding=True), "≤ 1e-13"),
        (Measured(3e-12, 1e-13, rounding=True), "3e-12"),
        (Measured(0.0123456, 1e-13, at_least=1e-3), "≥ 0.001"),
        (Measured(1e-4, 1e-13, at_least=1e-3), "0.0001"),
        (Measured(20.0, 10.0, "≥", rounding=True), "≥ 10"),
    ],
)
def test_a_number_that_rounding_decides_is_shown_as_a_bound(measured: Measured, text: str) -> None:
    assert report.shown(measured) == text


TEXT = "### lem-8\n- bound: ≤ 1\n- measured: 0.26, margin 3.9; e_{t+1}\nVersions: a"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("0.26", "0.262", True),
        ("0.26", "0.27", False),
        ("0.26", "≤ 0.26", False),
        ("lem-8", "lem-9", False),
        ("≤ 1", "≤ 1.001", False),
        ("e_{t+1}", "e_{t+2}", False),
        ("Versions: a", "Versions: b", True),
        ("margin 3.9", "margin > 1e4", False),
    ],
)
def test_the_comparison_of_reports_can_fail(old: str, new: str, same: bool) -> None:
    assert (report.differences(TEXT, TEXT.replace(old, new)) == []) is same


def test_check_prints_the_lines_that_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = {name: CLAIMS[name] for name in ("lem-14",)}
    monkeypatch.setattr("paper_checks.__main__.registry", lambda: only)
    monkeypatch.setattr(report, "render", lambda outcomes: "a\nb")
    monkeypatch.setattr(report, "committed", lambda: "a\nb")
    assert main(Config(check=True)) == 0
    monkeypatch.setattr(report, "committed", lambda: "a\nc")
    assert main(Config(check=True)) == 1
    assert "line 2: committed 'c', generated 'b'" in capsys.readouterr().out
