"""experiments/precgd.py in its quick form: sublinear, unstable, linear."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_errors, record

from experiments.lib.methods import scores


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    return read_errors(record(tmp_path_factory, "precgd") / "precgd.csv")


def method(panel, name):
    (errors,) = (e for series, e in panel.items() if series.startswith(name + ", "))
    return errors


DAMPED = "ScaledGD(λ = 0.01)"


def assert_claims(panels):
    for panel in "bc":
        prec, damped = method(panels[panel], "PrecGD"), method(panels[panel], DAMPED)
        # Linear: each window of 30 steps gains a factor, as the one before.
        gains = prec[[60, 90, 120]] / prec[[30, 60, 90]]
        assert gains.max() < 0.2
        # Sublinear, about 1/t: far from what twice the steps gain at a linear rate.
        assert damped[120] > 0.2 * damped[60]
        for slow in (damped, method(panels[panel], "GD")):
            assert slow[120] > 100 * prec[120]
        assert method(panels[panel], "ScaledGD").max() > 100
        assert prec.max() < 1.1 * prec[0]
    for name in ("ScaledGD", DAMPED, "PrecGD"):  # all are linear where r = r*
        assert method(panels["a"], name)[120] < 1e-6
    assert len(panels["d"]) == 10
    for series, errors in panels["d"].items():
        assert (errors[120] < 1e-6) == series.startswith("PrecGD")
    # The error that is left is in proportion to the noise.
    noise = np.array([float(series.split("=")[1]) for series in panels["f"]])
    left = np.array([errors[-1] for errors in panels["f"].values()])
    np.testing.assert_allclose(left / noise, 0.8, rtol=0.3)
    told = method(panels["e"], "PrecGD that knows σ")[-1]
    np.testing.assert_allclose(told, method(panels["e"], "PrecGD")[-1], rtol=0.2)


@pytest.mark.long
def test_quick_run_shows_the_claims(panels):
    assert_claims(panels)


def test_committed_record_shows_the_claims():
    how = json.loads((ROOT / "figures" / "precgd.json").read_text())
    assert not how["config"]["quick"]
    assert_claims(read_errors(ROOT / "figures" / "precgd.csv"))


def test_of_runs_that_end_at_rounding_the_first_there_is_the_best():
    early, late = [1.0, 1e-13, 3e-16, 4e-16], [1.0, 1e-3, 1e-13, 1e-17]
    back, never = [1.0, 1e-13, 1e-13, 1e-9], [1.0, 1e-2, 1e-4, 1e-11]
    scored = scores(np.array([early, late, never, back]))
    assert (np.diff(scored) > 0).all()
    np.testing.assert_array_equal(scored[2:], [1e-11, 1e-9])
