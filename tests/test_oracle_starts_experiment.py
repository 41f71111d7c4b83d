"""experiments/oracle_starts.py: no start is quadratic, and only the tiny one is slower."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows, record

SPECTRAL, NYSTROM, POWER, RANDOM, SMALL = (
    "spectral",
    "Nyström, 1 gradient",
    "Nyström, 2 power rounds",
    "random, ζ = 0.1",
    "small, ζ = 0.001",
)
COLUMNS = ("x", "value")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return read_rows(record(tmp_path_factory, "oracle_starts") / "oracle_starts.csv", COLUMNS)


@pytest.fixture(scope="module")
def committed():
    how = json.loads((ROOT / "figures" / "oracle_starts.json").read_text())
    assert not how["config"]["quick"]
    return read_rows(ROOT / "figures" / "oracle_starts.csv", COLUMNS)


def assert_sensing_is_linear_from_every_start(panels, name):
    errors = {start: curve[1] for start, curve in panels[f"{name}, error by iteration"].items()}
    assert set(errors) == {SPECTRAL, NYSTROM, POWER, RANDOM, SMALL}
    for curve in errors.values():
        # Windows of 20 steps gain about the same: a quadratic phase would end in one step.
        gains = curve[[60, 80, 100]] / curve[[40, 60, 80]]
        assert 1e-3 < gains.min() < gains.max() < 0.2
        assert gains.max() < 4 * gains.min()
    assert errors[SMALL].max() > 100
    assert errors[SPECTRAL][0] < 0.8 * errors[RANDOM][0]
    steps = {s: c[1] for s, c in panels[f"{name}, condition, ScaledGD, steps"].items()}
    at_ten = {start: counts[1] for start, counts in steps.items()}
    assert at_ten[SMALL] > at_ten[RANDOM] + 5
    np.testing.assert_allclose(at_ten[NYSTROM], at_ten[RANDOM], rtol=0.15)
    for counts in steps.values():
        assert counts.max() < 1.3 * counts[0]  # does not grow with κ
    slow = panels[f"{name}, condition, GD, steps"]
    assert all(counts[1] > 3 * counts[0] for _, counts in slow.values())


@pytest.mark.long
def test_quick_run_shows_the_claims(quick):
    assert_sensing_is_linear_from_every_start(quick, "sensing")


def test_committed_record_shows_the_claims(committed):
    for name in ("sensing", "symmetric sensing"):
        assert_sensing_is_linear_from_every_start(committed, name)
        success = committed[f"{name}, oversampling, success"]
        assert all(share[0] < 0.5 and share[-1] == 1 for _, share in success.values())
    shares = committed["completion, oversampling, success"]
    assert shares[SMALL][1].max() < 0.5
    assert all(share[-1] >= 0.9 for start, (_, share) in shares.items() if start != SMALL)
