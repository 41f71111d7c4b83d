"""`nys.factorize` of matrices that are read by row blocks: each pass gives both products."""

import jax
import numpy as np
import pytest
from lowrank_cases import SPECTRA, best, error, matrix, orthonormality

import nyscaled as nys

Status = nys.lowrank.Status
M, N, RANK = 300, 90, 10


def blocks(a, rows=64):
    """The matrix as a stream, which counts how often it is read."""
    return nys.lowrank.RowBlocks(a, block_bytes=rows * a.shape[1] * a.itemsize)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.long
def test_three_passes_come_as_close_as_six_products(spectrum):
    s = SPECTRA[spectrum](N)
    source = blocks(matrix(M, N, s))
    f = nys.factorize(source, RANK, passes=3)
    assert int(f.passes) == source.passes == 3
    assert error(matrix(M, N, s), f) <= 1.02 * best(s, RANK) + 1e-5
    assert max(orthonormality(f.left), orthonormality(f.right)) < 1e-5
    assert 0.7 < float(f.error_estimate) / error(matrix(M, N, s), f) < 1.4


def test_an_exact_rank_takes_two_passes():
    s = np.where(np.arange(N) < RANK, 0.7 ** np.arange(N), 0)
    source = blocks(matrix(M, N, s))
    f = nys.factorize(source, RANK)
    assert int(f.passes) == source.passes == 2
    assert f.status is Status.EXACT
    assert error(matrix(M, N, s), f) <= 1e-5 * np.linalg.norm(s)


@pytest.mark.long
def test_a_wide_matrix_and_too_many_columns():
    s = SPECTRA["harmonic"](40)
    a = matrix(40, 200, s)
    assert error(a, nys.factorize(blocks(a), RANK, passes=3)) <= 1.02 * best(s, RANK)
    f = nys.factorize(blocks(a), 40, passes=6)
    assert error(a, f) < 1e-4


@pytest.mark.long
def test_all_rows_of_a_wide_matrix_lose_nothing_to_the_square_of_a():
    """In single precision AᴴA has lost the directions of σ_i = 0.3^i beyond the first seven."""
    s = 0.3 ** np.arange(50)
    a, size = matrix(50, 80, s), np.linalg.norm(s)
    f = nys.factorize(blocks(a), tol=1e-5)
    assert f.status is Status.CONVERGED
    assert len(f.singular_values) <= 12  # the least is 10
    assert error(a, f) <= 1.2e-5 * size
    source = blocks(a)
    f = nys.factorize(source, 50, passes=2)
    assert int(f.passes) == source.passes == 2
    assert f.status is Status.EXACT
    assert error(a, f) <= 5e-6 * size
    assert float(f.error_estimate) <= 5e-6 * size


@pytest.mark.long
@pytest.mark.parametrize("tol", [0.3, 0.05, 1e-7])
def test_a_tolerance_is_met(tol):
    s = 0.9 ** np.arange(N)
    a, size = matrix(M, N, s), np.linalg.norm(s)
    f = nys.factorize(blocks(a), tol=tol)
    assert error(a, f) <= max(1.05 * tol, 1e-5) * size
    needed = int(np.sum([best(s, r) > tol * size for r in range(N)]))
    assert len(f.singular_values) <= 1.1 * needed + 2
    few = nys.factorize(blocks(a), tol=0.05, max_rank=3)
    assert (len(few.singular_values), few.status) == (3, Status.MAX_RANK)


@pytest.mark.long
def test_complex_and_the_same_key():
    s = SPECTRA["harmonic"](N)
    a = matrix(M, N, s, np.complex64)
    f = nys.factorize(blocks(a), RANK, passes=3)
    assert error(a, f) <= 1.02 * best(s, RANK)
    again = nys.factorize(blocks(a), RANK, passes=3, key=jax.random.key(0))
    assert np.array_equal(f.left, again.left)


@pytest.mark.long
def test_deviations_grow_towards_what_is_not_determined():
    f = nys.factorize(blocks(matrix(M, N, SPECTRA["harmonic"](N))), 4, passes=2, jackknife=True)
    assert f.deviations.left[0] < 0.3 * f.deviations.left[3]
    assert f.deviations.right[0] < 0.3 * f.deviations.right[3]


def test_a_large_and_a_small_matrix():
    a = matrix(M, N, SPECTRA["harmonic"](N))
    s = np.asarray(nys.factorize(blocks(a), RANK, passes=3).singular_values)
    for scale in (2.0**100, 2.0**-90):
        scaled = nys.factorize(blocks(a * np.float32(scale)), RANK, passes=3)
        np.testing.assert_allclose(np.asarray(scaled.singular_values, float) / scale, s, rtol=1e-4)
