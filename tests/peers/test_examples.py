"""The examples that read real weights run."""

import runpy
from pathlib import Path

import pytest

import nyscaled as nys

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "build" / "weights"

pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no build/weights: make weights")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    (tmp_path / "build").symlink_to(ROOT / "build")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_language_model(capsys, folder):
    names = runpy.run_path(str(ROOT / "examples" / "language_model.py"))
    assert "Paris" in capsys.readouterr().out.splitlines()[0]
    assert float(names["value"]) < 2.5  # 4.8 before training
    again, _ = nys.models.load(folder / "merged")
    assert again.config.model_type == "llama"


def test_sentences(capsys, folder):
    names = runpy.run_path(str(ROOT / "examples" / "sentences.py"))
    losses = [float(line) for line in capsys.readouterr().out.splitlines()[-8:]]
    assert losses[-1] < 0.9 * losses[0]
    assert (folder / "reviews" / "adapter_model.safetensors").is_file()
    similar = names["vectors"] @ names["vectors"].T
    assert similar[0, 1] > 0.8 > 0.3 > similar[0, 2]


def test_dates(folder):
    """The first run of the guide of fine-tuning."""
    runpy.run_path(str(ROOT / "examples" / "dates.py"))
    result = nys.finetune.run(
        nys.finetune.Config(
            model=str(WEIGHTS / "SmolLM2-135M-Instruct.Q4_1.gguf"),
            data=folder / "dates",
            task="instructions",
            method="nora+",
            steps=20,
            batch_size=8,
            out=folder / "runs",
        )
    )
    assert result.scores["exact match"] > 0.8
