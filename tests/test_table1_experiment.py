"""experiments/table1.py in its quick form, and its committed record: the powers of κ."""

import csv
import json
from collections import defaultdict

import numpy as np
import pytest
from experiment_cases import ROOT, record

OURS, WEAK = "ScaledGD, Nyström", "ScaledGD, Nyström, weak"


def counts(path):
    """{panel: {series: iterations}}."""
    curves = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            curves[row["panel"]][row["series"]].append(float(row["iterations"]))
    return {p: {s: np.array(v) for s, v in series.items()} for p, series in curves.items()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return record(tmp_path_factory, "table1")


def power(how, panel, name):
    """Slope of log count in log κ, and its half width."""
    fit = how["fits"][panel][name]["power of kappa"]
    return fit["slope"], fit["half_width"]


def assert_claims(how, curves):
    slope, half = power(how, "symmetric, EP", OURS)
    assert abs(slope) < 0.15 + half
    assert how["fits"]["symmetric, EP"][OURS]["per doubling of kappa"]["slope"] < 0.5
    assert (curves["symmetric, EP"][OURS] <= 15).all()
    assert (curves["asymmetric, EP high"][OURS] == 1).all()
    assert 0.6 < power(how, "symmetric, EP", "GD, small")[0] < 1.1
    assert 1.0 < power(how, "asymmetric, EP", "AltGD")[0] < 2.0


@pytest.mark.long
def test_quick_run_shows_the_claims(quick):
    how = json.loads((quick / "table1.json").read_text())
    assert_claims(how, counts(quick / "table1.csv"))
    by_tolerance = counts(quick / "table1_accuracy.csv")
    ours, gd = (by_tolerance["symmetric, EP"][name] for name in (OURS, "GD, small"))
    # Quadratic: halving log ε costs a step. Linear: as many steps for each digit.
    assert ours[-1] - ours[3] <= 2
    assert gd[-1] - gd[3] > 50


def test_committed_record_shows_the_claims():
    how = json.loads((ROOT / "figures" / "table1.json").read_text())
    curves = counts(ROOT / "figures" / "table1.csv")
    assert not how["config"]["quick"]
    assert how["config"]["trials"] >= 3
    assert_claims(how, curves)
    for panel in ("asymmetric, EP", "asymmetric, OP"):
        assert (curves[f"{panel} high"][OURS] == 1).all()
        # Xu et al.: linear in κ. What reaches the bound κ² falls short of it by little.
        assert 0.8 < power(how, panel, "Nesterov, large Nyström")[0] < 1.1
        assert 1.7 < power(how, panel, "modified GD, small")[0] < 2.0
    assert (curves["asymmetric, UP high"][WEAK] == 1).all()
    for panel in ("symmetric, OP", "symmetric, UP", "asymmetric, UP"):
        assert abs(power(how, panel, OURS)[0]) < 0.1
    # Descent ends at its cap of 1e5 steps, κ ≤ 1e4: the record says so and shows no more.
    assert np.isinf(curves["symmetric, EP"]["GD, small"][-1])
    assert len(curves["symmetric, EP"]["GD, small"]) < len(curves["symmetric, EP"][OURS])
