"""Matrix Market files, against those that SciPy writes."""

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from nyscaled.cli import matrix_market


@pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric", "hermitian"])
@pytest.mark.parametrize("sparse", [False, True])
def test_matrix_market_of_every_symmetry(tmp_path, symmetry, sparse):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 5)) * (rng.random((5, 5)) < 0.5)
    a = a + 1j * rng.normal(size=(5, 5)) * (a != 0) if symmetry == "hermitian" else a
    parts = {"symmetric": a + a.T, "skew-symmetric": a - a.T, "hermitian": a + a.conj().T}
    a = parts.get(symmetry, a)
    written = scipy.sparse.coo_array(a) if sparse else a
    scipy.io.mmwrite(tmp_path / "a.mtx", written, symmetry=symmetry, comment="two\nlines")
    ours = matrix_market.read(tmp_path / "a.mtx")
    assert scipy.sparse.issparse(ours) == sparse
    np.testing.assert_allclose(ours.toarray() if sparse else ours, a, rtol=1e-15)


def test_matrix_market_of_patterns_and_integers(tmp_path):
    path, head = tmp_path / "a.mtx", "%%MatrixMarket matrix coordinate"
    path.write_text(f"{head} pattern general\n%\n2 3 2\n1 3\n2 1\n")
    np.testing.assert_array_equal(matrix_market.read(path).toarray(), [[0, 0, 1], [1, 0, 0]])
    path.write_text(f"{head} integer symmetric\n2 2 1\n2 1 7\n")
    np.testing.assert_array_equal(matrix_market.read(path).toarray(), [[0, 7], [7, 0]])


@pytest.mark.parametrize(
    "body",
    ["2 3 1\n0 1 1\n", "2 3 1\n3 1 1\n", "2 3 1\n1.5 1 1\n", "2 3 2\n1 1 1\n", "2 3\n1 1 1\n",
     "2 3 1\n1 99999999999999999999 1\n", "2 3 1\n1 1 1\n # x\n", "2 3 1\nnan 1 1\n",
     "2 3 1\n1 1\n", "2 3 1\n1 1 1 1\n", "2 3 1\n1 1 x\n", "-2 3 1\n1 1 1\n", ""],
)  # fmt: skip
def test_broken_matrix_market_is_refused(tmp_path, body):
    path = tmp_path / "a.mtx"
    path.write_text(f"%%MatrixMarket matrix coordinate real general\n{body}")
    with pytest.raises(ValueError):  # noqa: PT011  # NumPy's words differ
        matrix_market.read(path)


@pytest.mark.parametrize("field", ["real", "complex"])
def test_matrices_without_entries(tmp_path, field):
    path, head = tmp_path / "a.mtx", "%%MatrixMarket matrix"
    path.write_text(f"{head} array {field} skew-symmetric\n1 1\n")
    np.testing.assert_array_equal(matrix_market.read(path), [[0]])
    path.write_text(f"{head} array {field} general\n0 3\n")
    assert matrix_market.read(path).shape == (0, 3)
    path.write_text(f"{head} coordinate {field} general\n2 3 0\n")
    np.testing.assert_array_equal(matrix_market.read(path).toarray(), np.zeros((2, 3)))


@pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric", "hermitian"])
def test_sizes_without_their_entries_take_no_memory(tmp_path, symmetry):
    path = tmp_path / "a.mtx"
    path.write_text(f"%%MatrixMarket matrix array real {symmetry}\n9999999 9999999\n1\n")
    with pytest.raises(ValueError, match=r"it has 1 entries; expected [0-9]+ of 1 numbers"):
        matrix_market.read(path)
