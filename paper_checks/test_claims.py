"""Each claim as a test, the framework's own tests, and the report held against the code."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

from paper_checks import report
from paper_checks.__main__ import Config, as_record, main
from paper_checks.claim import Claim, Measured, Outcome, registry, run, select, worst

CLAIMS = registry()
REPORT = Path(__file__).with_name("REPORT.md")


@functools.cache
def outcome(name: str) -> Outcome:
    return run(CLAIMS[name])


@pytest.mark.parametrize("name", CLAIMS)
def test_claim(name: str) -> None:
    result = outcome(name)
    assert result.check.satisfied, result.check
    assert result.control.violated, result.control


def test_report_is_what_the_code_generates() -> None:
    generated = report.render([outcome(name) for name in CLAIMS])
    assert report.differences(REPORT.read_text(encoding="utf-8"), generated) == []


def make(check: float, control: float) -> Outcome:
    claim = Claim(
        "made-up",
        "ours",
        "x ≤ 1",
        "none",
        check=lambda: Measured(check, 1.0),
        control=lambda: Measured(control, 1.0),
        control_description="anything",
        section="ours",
    )
    return run(claim)


@pytest.mark.parametrize(
    ("check", "control", "passed"),
    [
        (0.5, 2.0, True),
        (0.5, 0.9, False),  # a control that holds
        (2.0, 3.0, False),  # a check that fails
        (math.nan, 2.0, False),
        (0.5, math.nan, False),  # a control that is no number shows nothing
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
    assert worst(a=(1.0, 10.0), b=(3.0, 4.0)).measured == 0.75
    assert math.isnan(worst(a=(1.0, 10.0), b=(math.nan, 4.0)).measured)


def test_only_selects_a_group_by_its_prefix() -> None:
    ids = ("thm-1-phase1", "thm-1", "thm-10", "lem-1", "lem-11")
    made = dict.fromkeys(ids, CLAIMS["lem-1"])
    assert set(select(made, ("thm-1",))) == {"thm-1-phase1", "thm-1"}
    assert set(select(made, ("LEM-1",))) == {"lem-1"}
    with pytest.raises(ValueError, match="thm-7"):
        select(made, ("thm-7",))


def test_there_are_enough_claims_and_each_has_all_its_parts() -> None:
    assert len(CLAIMS) >= 45
    for claim in CLAIMS.values():
        assert claim.statement
        assert claim.hypotheses
        assert claim.control_description


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


TEXT = "### lem-8\n- bound: ≤ 1\n- measured: 0.26, margin 3.9; e_{t+1}\nVersions: a"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("0.26", "0.31", True),
        ("0.26", "4.1", False),  # another order
        ("lem-8", "lem-9", False),
        ("≤ 1", "≤ 2", False),
        ("e_{t+1}", "e_{t+2}", False),
        ("Versions: a", "Versions: b", True),
        ("margin 3.9", "margin > 1e4", False),
    ],
)
def test_the_comparison_of_reports_can_fail(old: str, new: str, same: bool) -> None:
    assert (report.differences(TEXT, TEXT.replace(old, new)) == []) is same
