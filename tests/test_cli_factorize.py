"""`nyscaled factorize`: what it reads and writes, and how it refuses."""

import csv
import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.io
import scipy.sparse
from cli_cases import RANK, M, N, factorize, folder_of, matrix, product, refused, saved

from nyscaled import lowrank
from nyscaled.cli import inputs, main
from nyscaled.cli.table import kinds


@pytest.fixture(scope="module")
def a():
    return matrix()


FILES = ["a.npy", "a.npz", "a.safetensors", "a.h5", "dense.mtx", "sparse.mtx"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("out", ["out.npz", "out.safetensors"])
@pytest.mark.long_beyond(2)
def test_factors_of_each_format_are_the_matrix(tmp_path, a, name, out, capsys):
    path, out = saved(tmp_path / name, a), tmp_path / out
    assert factorize(path, "--rank", RANK, "--out", out) == 0
    arrays = np.load(out) if out.suffix == ".npz" else safetensors.numpy.load_file(out)
    np.testing.assert_allclose(product(arrays), a, atol=1e-4 * np.abs(a).max())
    assert arrays["left"].shape == (M, RANK)
    assert arrays["error_estimate"] <= 1e-3 * arrays["norm_estimate"]
    assert {"numerical_rank", "passes", "status"} <= set(arrays)
    assert f"{M} × {N}, rank {RANK}" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {path.name, out.name}  # nothing else is left


@pytest.mark.long
def test_the_file_reads_as_a_program_of_its_own(tmp_path, a):
    path, out = saved(tmp_path / "a.npy", a.astype(np.float64)), tmp_path / "out.npz"
    words = ["factorize", path, "--tol", "1e-10", "--out", out]
    command = [sys.executable, "-m", "nyscaled.cli", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "relative error" in result.stdout
    arrays = np.load(out)
    assert arrays["left"].dtype == np.float64
    # float64 has been kept: float32 would leave 1e-7.
    np.testing.assert_allclose(product(arrays), a, atol=1e-12 * np.abs(a).max())


def test_float64_leaves_the_configuration_alone(tmp_path, a):
    before = dict(jax.config.values)
    assert factorize(saved(tmp_path / "a.npy", a.astype(float)), "--rank", RANK) == 0
    assert dict(jax.config.values) == before


def test_compressed_matrix_market(tmp_path, a, capsys):
    import gzip

    plain = saved(tmp_path / "sparse.mtx", a)
    path = tmp_path / "a.mtx.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert factorize(path, "--rank", RANK) == 0
    assert f"rank {RANK}" in capsys.readouterr().out


@pytest.mark.long
def test_sparse_matrix_stays_sparse(tmp_path, capsys):
    """Dense it would take 160 GB."""
    rows, size = np.arange(1000), 200_000
    a = scipy.sparse.csr_array((np.ones(1000, "f"), (rows * 199, rows % 50)), shape=(size, size))
    path = tmp_path / "a.npz"
    scipy.sparse.save_npz(path, a)
    assert factorize(path, "--rank", 7) == 0
    assert "rank 7, relative error" in capsys.readouterr().out


def test_half_precision_and_integers_become_float32(tmp_path, a):
    for dtype in (np.float16, np.int64):
        path, out = tmp_path / "a.npy", tmp_path / f"{np.dtype(dtype)}.npz"
        np.save(path, np.round(a * 8).astype(dtype))
        assert factorize(path, "--rank", N, "--out", out) == 0
        assert np.load(out)["left"].dtype == np.float32


def test_columns_first_is_not_read_as_rows_first(tmp_path, a):
    np.save(tmp_path / "a.npy", np.asfortranarray(a))
    assert factorize(tmp_path / "a.npy", "--rank", RANK, "--out", tmp_path / "o.npz") == 0
    np.testing.assert_allclose(product(np.load(tmp_path / "o.npz")), a, atol=1e-4)


def test_tensors_by_pattern(tmp_path, a):
    tensors = {f"h.{i}.{k}.weight": (i + 1) * a for i in range(2) for k in ("q", "v")}
    path = folder_of(tmp_path / "model", tensors)
    out = tmp_path / "out.npz"
    assert factorize(path, "--name", r".*\.q\.weight", "--rank", RANK, "--out", out) == 0
    arrays = np.load(out)
    assert {name.rpartition(".")[0] for name in arrays} == {"h.0.q.weight", "h.1.q.weight"}
    np.testing.assert_allclose(product(arrays, "h.1.q.weight."), 2 * a, atol=1e-3)


def test_table_and_picture_of_a_folder(tmp_path, a):
    rng = np.random.default_rng(1)
    full = rng.normal(size=(M, N)).astype(np.float32)
    tensors = {
        "embed.weight": full,
        "h.0.q.weight": a,
        "h.1.q.weight": full,
        "h.0.q.bias": a[0],
        "ids": np.ones((2, 2), int),
    }
    path, out = folder_of(tmp_path / "model", tensors), tmp_path / "out.csv"
    assert factorize(path, "--tol", 0.1, "--top", RANK, "--out", out) == 0
    table = {row.pop("name"): row for row in csv.DictReader(io.StringIO(out.read_text()))}
    assert set(table) == {"embed.weight", "h.0.q.weight", "h.1.q.weight"}
    low, high = table["h.0.q.weight"], table["h.1.q.weight"]
    assert (low["rows"], low["columns"]) == (str(M), str(N))
    values = np.linalg.svd(a, compute_uv=False)
    assert int(low["rank"]) <= RANK < int(high["rank"])
    assert float(high["relative_error"]) <= 0.1
    for name, weight in (("h.0.q.weight", a), ("h.1.q.weight", full)):
        values = np.linalg.svd(weight, compute_uv=False)
        energy = np.sum(values**2)
        assert float(table[name]["stable_rank"]) == pytest.approx(energy / values[0] ** 2, rel=0.02)
        share = float(table[name][f"share_of_top_{RANK}"])
        assert share == pytest.approx(np.sum(values[:RANK] ** 2) / energy, rel=0.02)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_row_of_a_given_rank_is_of_the_best_approximation(tmp_path, capsys):
    full = np.diag(np.array([2.0, 2.0, 1.0, 0.0], np.float32))
    path, out = saved(tmp_path / "full.npy", full), tmp_path / "out.csv"
    assert factorize(path, "--rank", 1, "--out", out) == 0
    assert "rank 1, relative error 0.745" in capsys.readouterr().out  # √5/3
    (line,) = csv.DictReader(io.StringIO(out.read_text()))
    assert (line["rank"], line["status"]) == ("1", "RANK_REACHED")
    assert float(line["stable_rank"]) == pytest.approx(9 / 4, rel=1e-4)


def test_kinds_are_the_shortest_ends_that_differ():
    names = ["e.0.attn.out.dense.weight", "e.1.attn.out.dense.weight", "e.0.out.dense.weight"]
    assert kinds(names) == ["attn.out.dense", "attn.out.dense", "e.out.dense"]
    assert kinds([""]) == [""]


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_flags_override_the_file_of_options(tmp_path, a, suffix):
    path, out = saved(tmp_path / "a.npy", a), tmp_path / "out.npz"
    options = tmp_path / f"options.{suffix}"
    pairs = {"file": json.dumps(str(path)), "tol": "1e-2", "rank": "1", "overwrite": "true"}
    equals = " = " if suffix == "toml" else ": "
    mark = "\ufeff"  # with which some editors begin a file
    options.write_text(mark + "\n".join(key + equals + value for key, value in pairs.items()))
    out.touch()  # overwrite is read from the file
    assert factorize("--config", options, "--rank", 3, "--out", out) == 0
    assert np.load(out)["left"].shape[1] <= 3
    assert factorize("--config", options, "--out", out) == 1  # rank 1 misses the tolerance
    assert np.load(out)["left"].shape[1] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rnk = 3", "rnk"),
        ("rank = 2.5", "rank = 2.5; expected an integer"),
        ("rank = true", "rank = True; expected an integer"),
        ('tol = "x"', "expected a number"),
        ("name = 3", "expected a text"),
        ("overwrite = 1", "expected true or false"),
        ("config = 'b.toml'", "'config'"),
        ("rank = ", "not a file of options"),
    ],
)
def test_broken_options_are_refused(tmp_path, a, text, reason, capsys):
    options = tmp_path / "options.toml"
    options.write_text(text)
    assert reason in refused(capsys, saved(tmp_path / "a.npy", a), "--config", options)


def test_broken_yaml_is_refused(tmp_path, capsys):
    for text in ("!!python/object/apply:os.system ['touch x']", "- 1", "a: ["):
        (tmp_path / "o.yaml").write_text(text)
        refused(capsys, "a.npy", "--config", tmp_path / "o.yaml")
    (tmp_path / "o.ini").write_text("")
    assert ".toml" in refused(capsys, "a.npy", "--config", tmp_path / "o.ini")


@pytest.mark.parametrize("name", [*FILES, "sparse.npz"])
def test_a_file_cut_short_is_refused(tmp_path, a, name, capsys):
    path = tmp_path / name
    if name == "sparse.npz":
        scipy.sparse.save_npz(path, scipy.sparse.csr_array(a))
    else:
        saved(path, a)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 30):
        path = tmp_path / f"{size}{name}"  # the last one may still be mapped into memory
        path.write_bytes(whole[:size])
        assert name in refused(capsys, path, "--rank", 2)


@pytest.mark.parametrize("name", [*FILES, "a.gguf", "a.mtx.gz"])
def test_a_file_of_another_format_is_refused(tmp_path, name, capsys):
    path = tmp_path / name
    path.write_bytes(b"These are words, and no matrix.\n" * 20)
    assert name in refused(capsys, path, "--rank", 2)


class Bomb:
    def __reduce__(self):
        return open, ("executed", "w")


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bombs = np.array([[Bomb()]], object)
    np.save("a.npy", bombs)
    np.savez("a.npz", a=bombs)
    np.savez("s.npz", format=bombs, shape=[1, 1], data=bombs)
    for name in ("a.npy", "a.npz", "s.npz"):
        refused(capsys, name, "--rank", 1)
    assert not (tmp_path / "executed").exists()


def test_sparse_indices_out_of_range_are_refused(tmp_path, a, capsys):
    matrix = scipy.sparse.csr_array(a)
    matrix.indices[3] = 10**8
    scipy.sparse.save_npz(tmp_path / "a.npz", matrix)
    assert "a.npz" in refused(capsys, tmp_path / "a.npz", "--rank", 2)


def test_refusals_name_the_reason(tmp_path, a, capsys):
    path = saved(tmp_path / "a.npy", a)
    several = saved(tmp_path / "a.npz", a)
    cases = {
        "does not exist": ("nothing.npy", "--rank", 2),
        "'.txt'": (saved(tmp_path / "a.npy", a).rename(tmp_path / "a.txt"), "--rank", 2),
        "regular expression": (several, "--rank", 2, "--name", "("),
        "'b'": (several, "--rank", 2, "--name", "b"),
        "--top is 0": (several, "--rank", 2, "--top", 0),
        "'.pt'": (several, "--rank", 2, "--out", tmp_path / "o.pt"),
        "is not a folder": (several, "--rank", 2, "--out", tmp_path / "no" / "o.npz"),
        "rank": (several, "--rank", "two"),
        "--rnk": (several, "--rnk", 2),
        "PATH": ("--rank", 2),
        "tol": (several,),
    }
    for reason, words in cases.items():
        error = refused(capsys, *words)
        assert reason in error
    np.save(path, np.full((3, 3), np.nan, np.float32))
    assert "NaN" in refused(capsys, path, "--rank", 2)
    np.save(path, np.array([["a"]]))
    assert "expected numbers" in refused(capsys, path, "--rank", 1)
    np.save(path, np.ones(3))
    assert "shape (3,)" in refused(capsys, path, "--rank", 1)


def test_existing_files_are_kept(tmp_path, a, capsys):
    path = saved(tmp_path / "a.npy", a)
    for out in (tmp_path / "o.npz", tmp_path / "o.csv"):
        kept = out.with_suffix(".png") if out.suffix == ".csv" else out
        kept.write_text("mine")
        assert "--overwrite" in refused(capsys, path, "--rank", 2, "--out", out)
        assert kept.read_text() == "mine"
        assert factorize(path, "--rank", 2, "--out", out, "--overwrite") == 0
        assert kept.read_bytes() != b"mine"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, a, capsys, monkeypatch):
    def full(path, arrays):
        path.write_text("half")
        raise OSError("no space left on device")

    path, out = saved(tmp_path / "a.npy", a), tmp_path / "o.npz"
    out.write_text("mine")
    monkeypatch.setattr("nyscaled.cli.outputs.write_arrays", full)
    assert "no space" in refused(capsys, path, "--rank", 2, "--out", out, "--overwrite")
    assert out.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"a.npy", "o.npz"}


def test_a_tolerance_below_rounding_is_missed(tmp_path, a, capsys):
    for out in ("a.npz", "a.csv"):
        assert factorize(saved(tmp_path / "a.npy", a), "--tol", 1e-30, "--out", tmp_path / out) == 1
        assert "above --tol 1e-30" in capsys.readouterr().err


def test_a_missed_tolerance_is_a_status(tmp_path, a, capsys):
    path, out = saved(tmp_path / "a.npy", a), tmp_path / "o.npz"
    assert factorize(path, "--rank", 1, "--tol", 1e-3, "--out", out) == 1
    assert "1 of 1 matrices" in capsys.readouterr().err
    assert out.exists()


def test_missing_packages_are_named(tmp_path, a, capsys, monkeypatch):
    path = saved(tmp_path / "a.h5", a)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "nyscaled[cli]" in refused(capsys, path, "--rank", 2)
    monkeypatch.setitem(sys.modules, "nyscaled.cli.evaluate", None)
    assert main(["evaluate", "--help"]) == 1
    assert "nyscaled[finetune]" in capsys.readouterr().err


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0
    assert "factorize" in capsys.readouterr().out
    assert main(["factorize", "--help"]) == 0
    assert "nyscaled factorize a.npy --tol 1e-3" in capsys.readouterr().out
    assert main(["factorise"]) == 2
    assert "expected one of: factorize" in capsys.readouterr().err
    assert main([]) == 2


def test_large_arrays_are_read_by_blocks(tmp_path, a, monkeypatch):
    monkeypatch.setattr(inputs, "memory", lambda: 4)
    for name in ("a.npy", "a.h5"):
        (entry,) = inputs.entries(saved(tmp_path / name, a))
        assert isinstance(entry.load(), lowrank.RowBlocks)
        out = tmp_path / "out.npz"
        assert factorize(tmp_path / name, "--rank", RANK, "--out", out, "--overwrite") == 0
        np.testing.assert_allclose(product(np.load(out)), a, atol=1e-4 * np.abs(a).max())


@pytest.mark.long_beyond(1)
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with pipes")
@pytest.mark.parametrize("words", [["--help"], ["factorize", "--help"], ["--version"]])
def test_output_that_nobody_reads_ends_quietly(words):
    command = [sys.executable, "-m", "nyscaled.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_double_complex_factors_have_no_safetensors(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "a.npy", matrix().astype(complex))
    words = (tmp_path / "a.npy", "--rank", RANK, "--out")
    monkeypatch.setattr("nyscaled.cli.factorize.factorize", None)  # refused before it
    error = refused(capsys, *words, tmp_path / "a.safetensors")
    assert "it is complex128, which no .safetensors holds; expected --out in .npz" in error
