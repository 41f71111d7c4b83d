"""experiments/fits.py in its quick form, exact counts of parameters, and the committed table."""

import csv
import json

import pytest
from experiment_cases import ROOT, run

# LLaMA and Gemma as on their cards on the hub, OPT as transformers counts it.
PARAMETERS = {
    "OPT-1.3B": 1_315_758_080,
    "LLaMA-7B": 6_738_415_616,
    "LLaMA2-7B": 6_738_415_616,
    "Gemma-7B": 8_537_680_896,
    "Stable Diffusion 1": 859_520_964,
}
BYTES = "base", "adapters", "optimizer", "temporaries"


def rows_of(folder):
    with (folder / "fits.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("parameters", "rank", "start", "total", *BYTES):
            row[key] = int(row[key])
        assert row["total"] == sum(row[key] for key in BYTES)
    return rows


@pytest.mark.long
def test_quick_run(tmp_path):
    result = run("fits.py", "--quick", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "fits.json").read_text())["parameters"] == PARAMETERS
    (row,) = rows_of(tmp_path)
    assert row["parameters"] == 125_239_296
    # All but norms, biases and positions is split in eight.
    assert 1 < 8 * row["base"] / (2 * row["parameters"]) < 1.02
    adapters = 12 * 2 * 8 * (768 + 768) * 4
    assert row["adapters"] == adapters // 2 * 3 // 4  # rows in four, columns in two
    assert row["optimizer"] == 2 * row["adapters"] + 4
    # Split logits are a quarter of a gigabyte in all of their copies.
    assert row["temporaries"] < 0.5e9
    assert "OPT-125M" in (tmp_path / "fits.md").read_text()


def test_committed_table():
    folder = ROOT / "figures"
    how = json.loads((folder / "fits.json").read_text())
    assert not how["config"]["quick"]
    assert how["parameters"] == PARAMETERS
    rows = rows_of(folder)
    assert len(rows) == 3 * 2 * 4 + 4
    for row in rows:
        assert row["parameters"] == PARAMETERS[row["model"]]
        devices = {"one device": 1, "fsdp 1": 1, "fsdp 4": 4}.get(row["mesh"], 8)
        width = {"bfloat16": 2, "float32": 4}[row["dtype"]]
        assert 1 <= devices * row["base"] / (width * row["parameters"]) < 1.01
        assert row["start"] < row["total"]
    for row in rows[-4:]:  # 128 layers of rank 4
        assert row["adapters"] == 4 * 797_184
    assert len((folder / "fits.md").read_text().splitlines()) == len(rows) + 2
