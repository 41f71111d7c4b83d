"""pivoted_cholesky, and nystrom of a KernelMatrix: pivots, error, entries, rounding, refusals."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KEY, normal
from jax.tree_util import Partial
from test_lowering import assert_full_precision

import nyscaled as nys
from nyscaled.linalg import KernelMatrix, kernels
from nyscaled.lowrank import Status, pivoted, pivoted_cholesky

SIZE, RANK = 300, 90  # two blocks of 45 pivots
POINTS = normal(0, (SIZE, 2))
SMOOTH, ROUGH = kernels.gaussian(1.0), kernels.matern(1.0, 0.5)


def dense(a):
    """The matrix in float64, by NumPy."""
    x = np.asarray(a.points, np.float64)
    squares = np.sum((x[:, None] - x) ** 2, axis=-1)
    return np.exp(-np.sqrt(squares)) if a.kernel == ROUGH else np.exp(-squares / 2)


def difference(a, result):
    factor = np.asarray(result.factor, np.float64)
    return dense(a) - factor @ factor.T


@pytest.mark.parametrize("seed", range(3))
def test_the_trace_of_the_error_is_known_and_near_the_best(seed):
    a = KernelMatrix(ROUGH, POINTS)
    f = pivoted_cholesky(a, RANK, key=jax.random.key(seed))
    error = difference(a, f)
    chex.assert_trees_all_close(f.residual, np.diag(error), atol=1e-5)
    chex.assert_trees_all_close(float(jnp.sum(f.residual)), np.trace(error), rtol=1e-4)
    best = np.sum(np.linalg.eigvalsh(dense(a))[:-RANK])
    assert best < np.trace(error) < 2.5 * best
    assert np.linalg.eigvalsh(error)[0] > -1e-4
    pivots = np.asarray(f.pivots)
    assert len(set(pivots)) == RANK == int(f.numerical_rank)
    chex.assert_trees_all_close(error[pivots], np.zeros((RANK, SIZE)), atol=1e-5)


@pytest.mark.long
def test_pivots_are_drawn_by_the_diagonal_of_what_is_left():
    """Of four points all orders of two pivots have the probabilities of one draw after another."""
    points = jnp.array([[0.0], [0.2], [1.0], [3.0]])
    a = KernelMatrix(lambda x, y: (1 + x[0]) * (1 + y[0]) * SMOOTH(x, y), points)
    matrix = np.asarray(a @ jnp.eye(4), np.float64)
    count = 4000
    keys = jax.random.split(KEY, count)
    draws = jax.jit(jax.vmap(lambda key: pivoted_cholesky(a, 2, key=key).pivots))(keys)
    frequencies = collections.Counter(map(tuple, np.asarray(draws).tolist()))
    for i in range(4):
        left = np.diag(matrix) - matrix[i] ** 2 / matrix[i, i]
        for j in set(range(4)) - {i}:
            p = matrix[i, i] / np.trace(matrix) * left[j] / np.sum(left)
            assert abs(frequencies[i, j] - count * p) < 5 * (count * p) ** 0.5 + 2
    assert sum(frequencies.values()) == count


def test_uniform_pivots_are_worse():
    """A cluster of points, and a few far away: the control for random pivots."""
    points = jnp.concatenate([0.01 * POINTS, 10 * normal(1, (15, 2))])
    a = KernelMatrix(SMOOTH, points)
    mean = {"random": float(jnp.sum(pivoted_cholesky(a, 20).residual))}
    chosen = np.random.default_rng(0).choice(len(points), 20, replace=False)
    columns = dense(a)[:, chosen]
    uniform = columns @ np.linalg.pinv(columns[chosen], rcond=1e-10) @ columns.T
    mean["uniform"] = np.trace(dense(a) - uniform)
    assert mean["random"] < mean["uniform"] / 20


@pytest.mark.long
@pytest.mark.parametrize("block", [1, 8, 64])
def test_blocks_change_the_pivots_but_not_the_error(block, monkeypatch):
    monkeypatch.setattr(pivoted, "_BLOCK", block)
    jax.clear_caches()
    a = KernelMatrix(ROUGH, POINTS[:100])
    traces = [
        float(jnp.sum(pivoted_cholesky(a, 20, key=jax.random.key(i)).residual)) for i in range(5)
    ]
    jax.clear_caches()
    assert 33 < np.mean(traces) < 38


def test_entries_are_evaluated_once(monkeypatch):
    """(r + 1)·n of them, and those among the points of two blocks per round of proposals."""
    entries, rounds = [], []

    def counted(kernel, x, y):
        jax.debug.callback((entries if len(x) == SIZE else rounds).append, len(x) * len(y))
        return evaluate(kernel, x, y)

    evaluate = kernels.evaluate
    monkeypatch.setattr(kernels, "evaluate", counted)
    monkeypatch.setattr(pivoted, "evaluate", counted)
    jax.clear_caches()
    pivoted_cholesky(KernelMatrix(ROUGH, POINTS), RANK)
    jax.effects_barrier()
    jax.clear_caches()
    assert sum(map(int, entries)) == RANK * SIZE  # and the diagonal
    assert set(map(int, rounds)) == {RANK**2}
    assert len(rounds) <= 2 * 4


def test_it_is_compiled_once():
    pivoted._factorization.clear_cache()
    for seed in range(3):
        a = KernelMatrix(kernels.gaussian(1.0 + seed), normal(seed, (SIZE, 2)))
        pivoted_cholesky(a, RANK, key=jax.random.key(seed))
    assert pivoted._factorization._cache_size() == 1


# --- Rounding ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_a_numerical_rank_below_the_rank_is_returned_and_rounding_is_no_pivot(scale):
    """100 copies of each of 3 points, then a kernel whose eigenvalues fall below rounding."""
    points = jnp.repeat(jnp.array([[0.0], [1.0], [5.0]]), 100, axis=0)
    f = pivoted_cholesky(KernelMatrix(Partial(_scaled, scale), points), 10)
    assert int(f.numerical_rank) == 3
    assert sorted(np.asarray(f.pivots[:3]) // 100) == [0, 1, 2]
    assert np.all(f.pivots[3:] == -1)
    assert not jnp.any(f.factor[:, 3:])
    assert jnp.sum(f.residual) <= 300 * 1e-6 * scale
    a = KernelMatrix(Partial(_scaled, scale), POINTS)
    f = pivoted_cholesky(a, 250)
    assert 40 < int(f.numerical_rank) < 250
    assert jnp.all(jnp.isfinite(f.factor))
    assert jnp.all(f.residual >= 0)
    assert jnp.sum(f.residual) < SIZE * 2e-5 * scale
    error = dense(KernelMatrix(SMOOTH, POINTS)) - np.asarray(f.factor @ f.factor.T) / scale
    assert np.linalg.eigvalsh(error)[0] > -1e-4


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**121, 2.0**126])
def test_a_trace_beyond_the_range_of_the_dtype_changes_nothing(scale):
    a, scaled = (KernelMatrix(Partial(_scaled, c), POINTS) for c in (1.0, scale))
    f, g = (pivoted_cholesky(matrix, 40, tol=0.3) for matrix in (a, scaled))
    chex.assert_trees_all_equal(f.pivots, g.pivots)
    assert 0 < int(g.numerical_rank) < 40
    chex.assert_trees_all_close(g.factor / np.sqrt(scale), f.factor, atol=1e-4)
    if scale < 2.0**126:
        psd, expected = nys.nystrom(scaled, 20), nys.nystrom(a, 20)
        chex.assert_trees_all_close(psd.eigenvalues / scale, expected.eigenvalues, rtol=1e-2)
        chex.assert_trees_all_close(psd.vectors[:, :3], expected.vectors[:, :3], atol=1e-3)
    else:
        with pytest.raises(ValueError, match="A has eigenvalues beyond float32"):
            nys.nystrom(scaled, 20)


def _scaled(scale, x, y):
    return scale * SMOOTH(x, y)


def test_a_tolerance_ends_it_early():
    a = KernelMatrix(SMOOTH, POINTS)
    f = pivoted_cholesky(a, 90, tol=0.05)
    assert int(f.numerical_rank) < 90
    assert float(jnp.sum(f.residual)) <= 0.05 * SIZE
    assert int(pivoted_cholesky(a, 90, tol=0.5).numerical_rank) < int(f.numerical_rank) + 1


# --- nystrom -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [SMOOTH, ROUGH])
def test_nystrom_returns_its_eigenvectors(kernel):
    a = KernelMatrix(kernel, POINTS)
    psd, f = nys.nystrom(a, RANK), pivoted_cholesky(a, RANK)
    live = int(psd.numerical_rank)
    expected = np.zeros((RANK, RANK))
    expected[:live, :live] = np.eye(live)
    chex.assert_trees_all_close(psd.vectors.T @ psd.vectors, expected, atol=1e-5)
    chex.assert_trees_all_close(psd.factor @ psd.factor.T, f.factor @ f.factor.T, atol=3e-5)
    assert np.all(np.diff(np.asarray(psd.eigenvalues)) <= 0)
    assert psd.eigenvalues[-1] >= 0
    chex.assert_trees_all_equal(psd.pivots, f.pivots)
    error = np.linalg.norm(difference(a, psd))
    assert error - 1e-3 < float(psd.error_estimate) == float(jnp.sum(f.residual))
    assert int(psd.passes) == 0
    assert psd.status is Status.RANK_REACHED


def test_a_kernel_matrix_of_more_than_the_numerical_rank_and_its_eigenvalues():
    a = KernelMatrix(SMOOTH, POINTS)
    psd = nys.nystrom(a, RANK)
    exact = np.linalg.eigvalsh(dense(a))[::-1][:10]
    chex.assert_trees_all_close(psd.eigenvalues[:10], exact, rtol=1e-3)


def test_it_works_under_jit_and_vmap():
    def trace(x):
        a = KernelMatrix(SMOOTH, x)
        return nys.nystrom(a, 20).error_estimate

    stack = jnp.stack([POINTS, 2 * POINTS])
    batched = jax.jit(jax.vmap(trace))(stack)
    chex.assert_trees_all_close(batched, jnp.stack([trace(x) for x in stack]), rtol=1e-2)


def test_it_lowers_for_accelerators_in_full_precision():
    fn = functools.partial(nys.nystrom, rank=20)
    assert_full_precision(lambda x: fn(KernelMatrix(SMOOTH, x)), POINTS)


# --- What is refused -----------------------------------------------------------------------------

REFUSED = {
    "rank": (SMOOTH, {"rank": SIZE + 1}, "rank is 301"),
    "tol": (SMOOTH, {"tol": -1.0}, "tol is -1"),
    "tol of everything": (SMOOTH, {"tol": 1.0}, r"tol is 1.0; expected a number in \[0, 1\)"),
    "negative": (lambda x, y: -SMOOTH(x, y), {}, "A is not positive semidefinite"),
    "indefinite": (lambda x, y: jnp.sum((x - y) ** 2) + 0.1, {}, "A is not positive semidefinite"),
    "NaN": (lambda x, y: jnp.nan * x[0], {}, "A has a diagonal entry of nan"),
    "Inf": (lambda x, y: 1e38 * (10 + x[0] * y[0]), {}, "A has a diagonal entry of inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    kernel, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        pivoted_cholesky(KernelMatrix(kernel, POINTS), **{"rank": 10} | options)


def test_other_matrices_and_the_jackknife_are_refused():
    with pytest.raises(ValueError, match="A is a ArrayImpl; expected a nys"):
        pivoted_cholesky(jnp.eye(3), 2)
    with pytest.raises(ValueError, match="jackknife is True and A is a KernelMatrix"):
        nys.nystrom(KernelMatrix(SMOOTH, POINTS), 2, jackknife=True)
