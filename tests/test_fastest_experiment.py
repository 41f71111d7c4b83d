"""experiments/fastest.py in its quick form: counts against κ and ξ, and errors in float32."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows, record


def panels_of(folder):
    """{panel: {series: (x, y)}}."""
    return read_rows(folder / "fastest.csv", ("x", "y"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return panels_of(record(tmp_path_factory, "fastest"))


PLAIN, DIRECT = "ScaledGD, η = 1/2", "direct factor (Nyström approximation)"


def steps(panels, panel, series):
    return panels[panel][series][1]


def assert_claims(panels):
    for series, bound in (("scaled Newton, Byers–Xu", 9), ("QDWH", 6), (DIRECT, 1)):
        for panel in ("a", "b"):
            assert steps(panels, panel + " high", series).max() <= bound
    # Up to half a step per doubling of κ; less where the errors of small directions are small
    # beside ‖A‖. A step per doubling of ξ away from the best.
    kappas, plain = panels["a"][PLAIN]
    slope = (plain[-1] - plain[0]) / np.log2(kappas[-1] / kappas[0])
    assert 0.3 < slope <= 0.5
    assert np.ptp(steps(panels, "b", PLAIN)) >= 7
    for series in ("QDWH", DIRECT, "scaled Newton, Byers–Xu"):
        assert np.ptp(steps(panels, "b", series)) == 0
    # float32: no dependence on κ, unless written as in textbooks.
    assert steps(panels, "c high", "QDWH").max() < 2e-6
    textbook = steps(panels, "c", "QDWH, textbook")
    assert textbook[-1] > 30 * steps(panels, "c", "QDWH")[-1]


@pytest.mark.long
def test_quick_run_shows_the_claims(quick):
    assert_claims(quick)


def test_committed_record_shows_the_claims():
    how = json.loads((ROOT / "figures" / "fastest.json").read_text())
    assert not how["config"]["quick"]
    assert how["config"]["trials"] >= 3
    panels = panels_of(ROOT / "figures")
    assert_claims(panels)
    assert np.ptp(steps(panels, "b", "ScaledGD, rescaled start")) == 0
