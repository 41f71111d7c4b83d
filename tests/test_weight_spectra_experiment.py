"""experiments/weight_spectra.py in its quick form, and the claims about its record."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows, record

WEIGHTS = ROOT / "build/weights/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def panels_of(folder):
    panels = read_rows(folder / "weight_spectra.csv", ("x", "value"))
    for shares, errors in panels["error"].values():
        assert np.all(np.diff(shares) > 0)
        assert np.all(np.diff(errors) < 0)
        assert errors[0] == pytest.approx(1, abs=1e-3)
    return panels


@pytest.mark.long
@pytest.mark.skipif(not WEIGHTS.exists(), reason="make weights fetches them")
def test_quick_run_is_the_svd(tmp_path_factory):
    from nyscaled.cli.inputs import entries

    panels = panels_of(record(tmp_path_factory, "weight_spectra"))
    assert set(panels["rank by layer"]) == KINDS
    (entry,) = entries(WEIGHTS, r"model\.layers\.1\.self_attn\.k_proj\.weight")
    values = np.linalg.svd(entry.load(), compute_uv=False)
    left_out = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1] / np.sum(values**2))
    layers, ranks = panels["rank by layer"]["k_proj"]
    assert list(layers) == [0, 1]
    assert ranks[1] * len(values) == pytest.approx(np.sum(left_out > 0.1), abs=1)


def test_committed_record_shows_the_claims():
    how = json.loads((ROOT / "figures" / "weight_spectra.json").read_text())
    assert not how["config"]["quick"]
    assert how["matrices"] == 1 + 30 * len(KINDS)
    panels = panels_of(ROOT / "figures")
    ranks = {kind: panels["rank by layer"][kind] for kind in KINDS}
    for layers, _ in ranks.values():
        np.testing.assert_array_equal(layers, np.arange(30))
    medians = {kind: np.median(values) for kind, (_, values) in ranks.items()}
    assert set(sorted(medians, key=medians.get)[:2]) == {"q_proj", "o_proj"}
    assert all(medians[kind] > 0.9 for kind in KINDS - {"q_proj", "o_proj", "k_proj"})
    assert np.argmin(ranks["q_proj"][1]) == np.argmin(ranks["k_proj"][1]) == 0
    errors = panels["error"]
    for kind in KINDS:  # no kind is further from low rank than a Gaussian matrix
        assert np.all(errors[kind][1] <= errors["Gaussian matrix"][1] + 0.02)
