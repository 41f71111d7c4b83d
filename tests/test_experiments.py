"""The quick forms of the scripts of figures: they run from the command line and show the claims."""

import dataclasses
import gzip
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from experiment_cases import ROOT, read_errors, read_rows, record, run

import nyscaled as nys
from experiments import fig1 as fig1_script
from experiments.lib import matrix as matrices
from experiments.lib import style
from experiments.lib.curves import Curve
from experiments.lib.record import save, versions


@pytest.fixture(scope="module")
def fig1(tmp_path_factory):
    return record(tmp_path_factory, "fig1")


@pytest.fixture(scope="module")
def fig4(tmp_path_factory):
    return record(tmp_path_factory, "fig4")


def ratios(errors, low, high):
    """Ratios of successive errors while they lie between the bounds."""
    inside = np.flatnonzero((errors[:-1] < high) & (errors[1:] > low))
    inside = inside[np.argmax(np.diff(inside, prepend=inside[0]) > 1) :]
    return errors[inside + 1] / errors[inside]


def assert_quadratic(errors):
    """Lemma 8's inequality in the second phase (κ = 100, ‖A‖ = 1), and a step that shows it."""
    phase = np.flatnonzero((errors < 2 / (3 * 100**2)) & (errors > 1e-8))
    assert len(phase)
    assert (errors[phase + 1] <= 0.75 * 100**2 * errors[phase] ** 2 + 1e-13).all()
    assert (errors[phase + 1] / errors[phase]).min() < 1e-3


def test_fig1_nystrom_is_at_rounding_by_iteration_16(fig1):
    errors = read_errors(fig1 / "fig1.csv")["a"]["ScaledGD, Nyström"]
    assert errors[16:].max() <= 1e-12


def test_fig1_nystrom_is_quadratic_and_small_start_halves(fig1):
    curves = read_errors(fig1 / "fig1.csv")["a"]
    assert_quadratic(curves["ScaledGD, Nyström"])
    tail = ratios(curves["ScaledGD, small start"], 1e-11, 1e-4)
    assert len(tail) > 10
    np.testing.assert_allclose(tail, 0.5, atol=0.02)


def test_fig1_gd_is_far_from_converged_after_2000_steps(fig1):
    errors = read_errors(fig1 / "fig1.csv")["a"]["GD (η = 0.01), small start"]
    assert len(errors) == 2001
    assert errors[-1] > 5e-3


@pytest.mark.parametrize("noise", ["0.01", "0.0001", "1e-06"])
def test_fig1_perturbed_curves_leave_and_then_halve(fig1, noise):
    curves = read_errors(fig1 / "fig1.csv")["b"]
    errors = curves[f"perturbed (ξ = 0.1), ξₙ = {noise}"]
    departure = np.argmax(errors > 10 * curves["Nyström, ξ = 0.1"])
    tail = errors[max(departure, 14) : 30]
    np.testing.assert_allclose(tail[1:] / tail[:-1], 0.5, atol=0.02)


@pytest.mark.parametrize("figure", ["fig1", pytest.param("fig4", marks=pytest.mark.long)])
def test_nystrom_curves_are_the_exact_predictions(figure, request):
    curves = read_errors(request.getfixturevalue(figure) / f"{figure}.csv")
    assert len(curves["b exact"]) == 5
    for series, exact in curves["b exact"].items():
        above = exact > 1e-12
        np.testing.assert_allclose(curves["b"][series][above], exact[above], rtol=1e-3)
        assert curves["b"][series][~above].max() < 1e-12


def test_fig1_under_parametrized_decays_at_the_rate_of_the_gap(tmp_path_factory, fig1):
    curves = read_errors(fig1 / "fig1.csv")
    series = "ScaledGD, Nyström, η = 0.5"
    errors, decay = curves["c"][series], curves["c predicted decay"][series]
    assert errors[-1] < 1e-5
    measured = (errors[-1] / errors[-100]) ** (1 / 99)
    # Not yet asymptotic in the quick form; the rate is the slowest of several.
    assert decay[1] - 0.02 < measured < decay[1] + 0.002


@pytest.mark.long
def test_fig4_pseudo_inverse_is_quadratic_and_damping_is_not(fig4):
    curves = read_errors(fig4 / "fig4.csv")["a"]
    assert_quadratic(curves["ScaledGD (†), Nyström"])
    assert curves["ScaledGD (†), Nyström"][16:].max() <= 1e-12
    damped = curves["ScaledGD-λ (λ = 0.01), small start"]
    assert damped[-1] > 1e-6
    assert (damped[21:] / damped[20:-1]).min() > 0.5


@pytest.mark.long
def test_order_shows_the_quadratic_phase_far_below_double_precision(tmp_path_factory):
    curves = read_errors(record(tmp_path_factory, "order") / "order.csv")["order"]
    errors = curves["Nyström"]
    assert 0 < errors[-1] < 1e-100
    # With 350 digits the last steps square the error; the perturbed ones halve it.
    logs = np.log10(errors[-3:])
    np.testing.assert_allclose(logs[1:] / logs[:-1], 2, atol=0.05)
    (perturbed,) = (e for s, e in curves.items() if s.startswith("perturbed") and "1e-06" in s)
    np.testing.assert_allclose(perturbed[-3:] / perturbed[-4:-1], 0.5, atol=0.01)


def test_record_names_seed_command_and_versions(fig1):
    how = json.loads((fig1 / "fig1.json").read_text())
    assert how["config"]["seed"] == 0
    assert how["config"]["precision"] == "float64"
    assert "experiments/fig1.py --quick" in how["command"]
    assert {"jax", "jaxlib", "optax", "numpy", "nyscaled"} <= set(how["versions"])


def test_versions_of_a_clone_that_is_not_installed(monkeypatch):
    version = importlib.metadata.version

    def installed(name):
        if name == "nyscaled":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert versions()["nyscaled"] == nys.__version__
    assert list(versions())[:2] == ["nyscaled", "jax"]


def test_committed_figures_belong_to_the_code():
    """The committed records carry the panels and series that the scripts write."""
    for name in ("fig1", "fig4", "fig1_digits_rbf", "order"):
        how = json.loads((ROOT / "figures" / f"{name}.json").read_text())
        assert not how["config"].get("quick")
        curves = read_errors(ROOT / "figures" / f"{name}.csv")
        panel = curves["order" if name == "order" else "a"]
        best = min(e.min() for s, e in panel.items() if "Nyström" in s)
        assert best < 1e-12


@pytest.mark.parametrize("path", sorted((ROOT / "figures").glob("*.json")), ids=lambda p: p.stem)
def test_committed_record_has_the_options_of_its_script_in_their_order(path):
    """Otherwise `make fig1` in a fresh clone changes the record."""
    how = json.loads(path.read_text())
    script = Path(how["command"].split()[1])
    config = importlib.import_module(f"experiments.{script.stem}").Config
    assert list(how["config"]) == [field.name for field in dataclasses.fields(config)]


def decaying_matrix():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    return (basis * 0.6 ** np.arange(40)) @ basis.T


def test_record_keeps_the_abscissas_of_a_curve(tmp_path):
    figure, axes = style.plt.subplots()
    curve = Curve([10.0, 1e8], [4, 5])
    style.draw(axes, curve, 0, "steps")
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), curve.x)
    curves = {"a": {"steps": curve}, "b": {"by iteration": [1.0, 0.5]}}
    save(tmp_path, "x", figure, curves, fig1_script.Config(), columns=("kappa", "steps"))
    recorded = read_rows(tmp_path / "x.csv", ("kappa", "steps"))
    np.testing.assert_array_equal(recorded["a"]["steps"], curve)
    np.testing.assert_array_equal(recorded["b"]["by iteration"], [[0, 1], [1, 0.5]])


def test_a_long_series_is_kept_on_a_log_scale_in_six_digits(tmp_path):
    errors = 1 / (3 + np.arange(5000.0))
    curves = {"a": {"long": errors, "short": errors[:301], "table": Curve(errors, errors)}}
    notes = {"last": [errors[-1], {"a": errors[0]}], "steps": 123456789}
    save(tmp_path, "x", style.plt.figure(), curves, fig1_script.Config(), **notes)
    held = read_rows(tmp_path / "x.csv", ("iteration", "error"))["a"]
    iterations, kept = held["long"]
    assert len(iterations) <= 301
    assert iterations[0] == 0
    assert iterations[-1] == 4999
    steps = np.diff(iterations)
    assert (steps[:30] == 1).all()
    assert (steps <= 1 + 0.03 * iterations[1:]).all()
    np.testing.assert_allclose(kept, errors[iterations.astype(int)], rtol=5.1e-6)
    assert len(held["short"][0]) == 301
    assert len(held["table"][0]) == 5000
    assert "a,long,0,0.333333\n" in (tmp_path / "x.csv").read_text()
    how = json.loads((tmp_path / "x.json").read_text())
    assert how["last"] == [float(f"{errors[-1]:.6g}"), {"a": 0.333333}]
    assert how["steps"] == 123456789


def test_matrix_files_of_each_format(tmp_path):
    import scipy.io

    matrix = decaying_matrix()
    np.save(tmp_path / "a.npy", matrix)
    np.savez(tmp_path / "a.npz", matrix)
    np.savez(tmp_path / "named.npz", a=matrix, b=np.ones(3))
    scipy.io.mmwrite(tmp_path / "a.mtx", matrix, precision=17)
    scipy.io.mmwrite(tmp_path / "sparse.mtx", scipy.sparse.csr_array(matrix), precision=17)
    scipy.io.mmwrite(tmp_path / "half.mtx", np.tril(matrix), precision=17, symmetry="general")
    even = (matrix + matrix.T) / 2
    scipy.io.mmwrite(tmp_path / "even.mtx", even, precision=17, symmetry="symmetric")
    text = (tmp_path / "even.mtx").read_text()
    assert "symmetric" in text
    (tmp_path / "again.mtx.gz").write_bytes(gzip.compress(text.encode()))
    np.testing.assert_allclose(matrices.load(tmp_path / "half.mtx"), np.tril(matrix), rtol=1e-12)
    head = "%%MatrixMarket matrix coordinate pattern symmetric\n% a comment\n3 3 2\n"
    (tmp_path / "ones.mtx").write_text(head + "2 1\n3 3\n")
    ones = [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(matrices.load(tmp_path / "ones.mtx"), ones)
    head = "%%MatrixMarket matrix array integer general\r\n%by André\r\n  % indented\r\n\r\n2 2\r\n"
    for encoding in ("utf-8", "latin-1"):
        (tmp_path / "names.mtx").write_bytes((head + "1\r\n2\r\n3\r\n4\r\n").encode(encoding))
        np.testing.assert_array_equal(matrices.load(tmp_path / "names.mtx"), [[1, 3], [2, 4]])
    for name in ("a.npy", "a.npz", "named.npz", "a.mtx", "sparse.mtx", "again.mtx.gz"):
        np.testing.assert_allclose(matrices.load(tmp_path / name), matrix, rtol=1e-12)


def test_matrix_files_that_lie_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    large = {"descr": "<f8", "fortran_order": False, "shape": (30_000, 30_000)}
    with (tmp_path / "large.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, large)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", (tmp_path / "large.npy").read_bytes() + b"\0" * 10**6)
        archive.writestr("b", b"\0" * 10**6)
    with zipfile.ZipFile(tmp_path / "other.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 10**6)
    head = b"%%MatrixMarket matrix coordinate real "
    texts = {
        "nul": head + b"general\n2 2 2\n1 1 1\0\n2 2 1\n",
        "twice": head + b"general\n2 2 2\n1 1 1\n1 1 1\n",
        "halves": head + b"symmetric\n2 2 2\n2 1 1\n1 2 1\n",
        "wide": head + b"general\n3000000000 3000000000 1\n1 1 1\n",
        "many": head + b"general\n3 3 1000000000000\n1 1 1\n",
        "end": head + b"general\n2 2 1\n1 1 1\xfb",  # on which SciPy's reader crashes
        "outside": head + b"general\n2 2 1\n1 3 1\n",
        "complex": head.replace(b"real", b"complex") + b"general\n1 1 1\n1 1 1 1\n",
        "minus": head + b"general\n2 2 -1\n1 1 1\n",
        "underscore": head + b"general\n2_0 2_0 1\n1 1 1\n",
        "nothing": head + b"general\n0 0 0\n",
        "sizes": head + b"general\n",
        "fraction": head.replace(b"real", b"integer") + b"general\n2 2 1\n1 1 1.5\n",
        "nan": head + b"general\n2 2 1\nnan 1 1\n",
        "dense": head.replace(b"coordinate", b"array") + b"general\n20000 20000\n1\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.mtx").write_bytes(text)
        (tmp_path / f"{name}.mtx.gz").write_bytes(gzip.compress(text))
    messages = {
        "large.npy": "holds 30000 rows; expected at least 1 and at most 20000",
        "bomb.npz": "holds 30000 rows",
        "other.npz": "cannot be read as a matrix",
        "nul.mtx": "has a NUL byte",
        "nul.mtx.gz": "has a NUL byte",
        "twice.mtx": "has an entry twice",
        "halves.mtx.gz": "has an entry twice",
        "wide.mtx": "holds 3000000000 rows",
        "many.mtx": r"holds \(1, 3\) numbers; expected \(1000000000000, 3\)",
        "complex.mtx": "not that of a real matrix",
        "end.mtx": "cannot be read as a matrix",
        "outside.mtx": "outside of rows and columns 1 to 2",
        "minus.mtx": "sizes are '2 2 -1'; expected 3 integers",
        "underscore.mtx": "sizes are '2_0 2_0 1'; expected 3 integers",
        "nothing.mtx": "holds 0 rows; expected at least 1",
        "sizes.mtx": "sizes are ''",
        "fraction.mtx": "other numbers than the integers",
        "nan.mtx": "outside of rows and columns 1 to 2",
        "dense.mtx": "holds 1 numbers; expected 400000000",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            matrices.load(tmp_path / name)
    monkeypatch.setattr(matrices, "MAX_TEXT", 2**20)
    (tmp_path / "long.mtx.gz").write_bytes(gzip.compress(texts["twice"] + b"%" * 2**21))
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        matrices.load(tmp_path / "long.mtx.gz")


@pytest.mark.long
def test_own_matrix(tmp_path):
    """Its name is in the title, and is no formula."""
    path = tmp_path / r"$\q$.npy"
    np.save(path, decaying_matrix())
    result = run("fig1.py", "--quick", "--matrix", path, "--rank", 5, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    curves = read_errors(tmp_path / r"fig1_$\q$.csv")["a"]
    assert abs(curves["ScaledGD, Nyström"][-1]) < 1e-12


def bad_matrices(folder):
    np.save(folder / "wide.npy", np.ones((3, 4)))
    np.save(folder / "skew.npy", np.array([[1.0, 2.0], [0.0, 1.0]]))
    np.save(folder / "indefinite.npy", np.diag([1.0, 0.5, -1.0]))
    np.save(folder / "nan.npy", np.full((3, 3), np.nan))
    np.save(folder / "fine.npy", np.diag([3.0, 2.0, 1.0]))
    (folder / "broken.npy").write_bytes(b"\x93NUMPY\x01")
    (folder / "text.npy").write_text("no matrix")
    (folder / "matrix.csv").write_text("1,2\n3,4\n")


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        ("wide.npy", 1, "square"),
        ("skew.npy", 1, "symmetric"),
        ("indefinite.npy", 1, "PSD"),
        ("nan.npy", 1, "NaN"),
        ("fine.npy", 3, "rank"),
        ("fine.npy", 0, "rank"),
        ("broken.npy", 1, "cannot be read"),
        ("text.npy", 1, "cannot be read"),
        ("matrix.csv", 1, ".npy"),
        ("absent.npy", 1, "not a file"),
    ],
)
def test_bad_matrix_files_are_refused_with_a_reason(tmp_path, name, rank, message):
    bad_matrices(tmp_path)
    config = fig1_script.Config(
        out=tmp_path, matrix=tmp_path / name, rank=rank, precision="float32"
    )
    with pytest.raises(ValueError, match=message):
        fig1_script.main(config)
    assert not list(tmp_path.glob("fig1*"))


@pytest.mark.long
def test_a_script_runs_from_another_folder_by_path_and_by_module(tmp_path):
    """With the editable install, which puts the root of the repository on the path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in ([str(ROOT / "experiments" / "fig1.py")], ["-m", "experiments.fig1"]):
        result = subprocess.run(
            [sys.executable, *command, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        assert "--quick" in result.stdout


def test_command_line_refusal_is_one_line(tmp_path):
    result = run("fig1.py", "--matrix", tmp_path / "absent.npy")
    assert result.returncode != 0
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.long
def test_float32(tmp_path):
    result = run("fig4.py", "--quick", "--precision", "float32", "--out", Path(tmp_path))
    assert result.returncode == 0, result.stderr
    errors = read_errors(tmp_path / "fig4.csv")["a"]["ScaledGD (†), Nyström"]
    assert errors[-1] < 5e-6
