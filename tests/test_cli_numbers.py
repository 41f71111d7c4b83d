"""`nyscaled factorize`: sizes, ranks and options at the ends of their ranges."""

import csv
import io

import numpy as np
import pytest
from cli_cases import M, factorize, matrix, refused, saved


@pytest.fixture(scope="module")
def a():
    return matrix()


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("out", ["o.csv", "o.npz"])
def test_the_zero_matrix(tmp_path, out, capsys):
    path = saved(tmp_path / "a.npy", np.zeros((5, 4), np.float32))
    for words in (("--rank", 3), ("--tol", 0.1)):
        assert factorize(path, *words, "--out", tmp_path / out, "--overwrite") == 0
        assert "relative error 0, stable rank 0" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [1e-160, 1e-280, 1e300])
def test_sizes_whose_squares_leave_the_range(tmp_path, a, scale, capsys):
    path = saved(tmp_path / "a.npy", scale * a.astype(np.float64))
    for words in (("--rank", 1), ("--rank", 1, "--out", tmp_path / f"{scale}.npz")):
        assert factorize(path, *words) == 0
        values = np.linalg.svd(a, compute_uv=False)
        share = np.linalg.norm(values[1:]) / np.linalg.norm(values)
        said = capsys.readouterr().out.partition("rank 1, relative error ")[2]
        assert float(said.partition(",")[0]) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("out", [(), ("--out", "o.npz"), ("--out", "o.csv")])
@pytest.mark.long_beyond(1)
def test_a_rank_above_the_shorter_side_is_that_side(tmp_path, a, out, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", a=a, b=a[:7])
    assert factorize("a.npz", "--rank", 10, *out) == 0
    said = capsys.readouterr()
    assert "1 of 2 matrices: the shorter side is less than --rank 10" in said.err
    if "o.npz" in out:
        arrays = np.load("o.npz")
        assert (arrays["a.left"].shape, arrays["b.left"].shape) == ((M, 10), (7, 7))
    else:
        if out:
            table = csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text()))
            assert [row["rank"] for row in table] == ["10", "7"]
        assert out or ("rank 10," in said.out and "rank 7," in said.out)
    # Beside a tolerance it is a limit.
    assert factorize("a.npz", "--rank", 10, "--tol", 0.5, *out, "--overwrite") == 0
    assert "shorter side" not in capsys.readouterr().err


OUT_OF_RANGE = {
    "--tol is 2; expected a number in (0, 1]": ("--tol", 2),
    "--tol is nan": ("--tol", "nan"),
    "--seed is 99999999999999999999; expected": ("--rank", 1, "--seed", 99999999999999999999),
    "--seed is -1; expected": ("--rank", 1, "--seed", -1),
    "--rank is 0; expected": ("--rank", 0),
    "--passes is 1; expected an integer ≥ 2": ("--rank", 1, "--passes", 1),
    "--passes is 3 and --tol is given": ("--tol", 0.1, "--passes", 3),
    "none.toml does not exist": ("--config", "none.toml"),
}


@pytest.mark.parametrize("out", [(), ("--out", "o.npz"), ("--out", "o.csv")])
def test_numbers_out_of_range_are_refused_for_every_output(tmp_path, a, out, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.npy", a)
    for reason, words in OUT_OF_RANGE.items():
        assert reason in refused(capsys, path, *words, *out)
    assert {p.name for p in tmp_path.iterdir()} == {"a.npy"}
