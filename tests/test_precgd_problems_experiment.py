"""experiments/precgd_problems.py: PrecGD is linear on each problem, and its error grows with σ."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_errors, record

PROBLEMS = ("completion", "1-bit", "phase")
UNSEEN = "PrecGD, half of the diagonal unseen"


def both(folder):
    """The curves and the record."""
    how = json.loads((folder / "precgd_problems.json").read_text())
    return read_errors(folder / "precgd_problems.csv"), how


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return both(record(tmp_path_factory, "precgd_problems"))


@pytest.fixture(scope="module")
def committed():
    return both(ROOT / "figures")


def assert_linear(errors, gain):
    """Each window of 50 steps gains a factor, until rounding."""
    kept = errors[50::50]
    kept = kept[kept > 1e-14]
    assert len(kept) > 2
    assert (kept[1:] / kept[:-1]).max() < gain
    assert errors.max() < 1.2 * errors[0]


def assert_noise_and_condition_are_as_claimed(how, spread):
    for problem in PROBLEMS:
        last = how["last_errors"][f"{problem}, σ"]
        for name in ("PrecGD", "PrecGD that knows σ"):
            ratios = np.array(last[name]) / how["grid"]["noises"]
            assert ratios.max() < 1.5 * ratios.min()
            np.testing.assert_allclose(ratios, 0.7, rtol=0.5)
        kappa = np.array(how["last_errors"][f"{problem}, κ"]["PrecGD"])
        assert kappa.max() < spread * max(kappa.min(), 1e-15)


@pytest.mark.long
def test_quick_run_shows_the_claims(quick):
    panels, how = quick
    for problem in PROBLEMS:
        series = panels[f"{problem}, r = 4"]
        assert_linear(series["PrecGD"], 0.6)
        assert series["GD"][-1] > 20 * series["PrecGD"][-1]
    assert_noise_and_condition_are_as_claimed(how, 100)


def test_committed_record_shows_the_claims(committed):
    panels, how = committed
    assert not how["config"]["quick"]
    assert_noise_and_condition_are_as_claimed(how, 30)
    for problem in PROBLEMS:
        for rank in (4, 8):
            series = panels[f"{problem}, r = {rank}"]
            assert_linear(series["PrecGD"], 0.5)
            # Doubling the steps gains a factor of ten at most.
            for name in ("GD", "ScaledGD(λ = 0.01)"):
                assert series[name][400] > 0.3 * series[name][300]
                assert series[name][400] > 1e4 * series["PrecGD"][400]
            assert series["ScaledGD"].max() > 20
        assert panels[f"{problem}, r = 2"]["PrecGD"][400] < 1e-12
    assert panels["completion, r = 4"]["ScaledGD"][400] < 1e-12
    assert panels["1-bit, r = 8"]["ScaledGD"][400] > 1
    assert np.isinf(panels["phase, r = 8"]["ScaledGD"][400])


def test_completion_misses_what_it_does_not_see_with_too_many_columns(committed):
    panels, _ = committed
    assert panels["completion, r = 2"][UNSEEN][400] < 1e-12
    for rank in (4, 8):
        assert panels[f"completion, r = {rank}"][UNSEEN][200:].min() > 3e-4
