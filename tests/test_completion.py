"""problems.completion: observed entries alone, and the steps that fill in the others."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cases import exact_residual, normal
from jax.tree_util import Partial

import nyscaled as nys

M, N, R = 30, 20, 2
completion = nys.problems.completion
KEY = jax.random.key(0)


def case(kind, probability=0.5):
    """A problem, its truth and a point elsewhere."""
    if kind == "symmetric":
        truth, point = normal(1, (M, R)) / M**0.5, normal(3, (M, R)) / M**0.5
    else:
        truth = nys.Factors(normal(1, (M, R)) / M**0.5, normal(2, (N, R)) / N**0.5)
        point = nys.Factors(normal(3, (M, R)), normal(4, (N, R)))
    return completion.bernoulli(KEY, truth, probability), truth, point


def both(point):
    return point if isinstance(point, nys.Factors) else (point, point)


@pytest.mark.long
def test_all_entries_seen_is_the_problem_of_the_paper():
    problem, truth, x = case("symmetric", probability=1.0)
    full = nys.problems.Symmetric(truth @ truth.T)
    np.testing.assert_allclose(problem.loss(x), full.loss(x), rtol=1e-5)
    chex.assert_trees_all_close(problem.gradient(x), full.gradient(x), rtol=1e-4, atol=1e-5)


def test_no_matrix_of_all_entries_is_formed():
    m, p = 2000, 4000

    def gradient(rows, columns, values, x):
        return completion.observed(rows, columns, values, (m, m)).gradient(x)

    index = jax.ShapeDtypeStruct((p,), jnp.int32)
    value, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((p,), (m, R)))
    memory = jax.jit(gradient).lower(index, index, value, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * m * m * 4


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_scaled_gd_fills_in_what_was_not_seen(kind):
    problem, truth, _ = case(kind, probability=0.7)
    start = jax.tree.map(lambda f: f + 0.3 * jnp.roll(f, 1), truth)
    step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.4))
    x, y = both(nys.solvers.run(step, start, 100).params)
    u, v = both(truth)
    assert exact_residual(x, u @ v.T, y) < 1e-4


def test_precgd_fills_in_with_too_many_columns_all_but_unseen_submatrices():
    problem, truth, _ = case("symmetric", probability=0.7)
    start = nys.initializers.small(jax.random.key(2), M, 2 * R, 0.1)
    step = nys.solvers.gradient_step(problem, nys.precgd(0.5))
    found = nys.solvers.run(step, start, 200).params
    error = np.abs(np.asarray(found @ found.T - truth @ truth.T))
    seen = np.zeros((M, M), bool)
    seen[problem.map.rows, problem.map.columns] = True
    unseen = ~np.diag(seen)
    free = ~(seen | seen.T) & unseen & unseen[:, None]
    assert free.any()
    assert error[~free].max() < 1e-4
    # XXᵀ + ZZᵀ with Z there has the same entries elsewhere: what the start put there stays.
    assert error[free].max() > 10 * error[~free].max()


@pytest.mark.long
def test_narrow_integers_are_indices_of_a_large_matrix():
    x = normal(0, (300, 2))
    found = []
    for dtype in (np.uint8, np.int8, np.uint32, np.int32):
        rows, columns = np.arange(100, dtype=dtype), np.arange(100, dtype=dtype)[::-1]
        problem = nys.problems.completion.observed(
            rows, columns, np.ones(100, "float32"), (300, 300)
        )
        found.append(problem.gradient(x))
    for gradient in found[:-1]:
        np.testing.assert_array_equal(gradient, found[-1])


@pytest.mark.long
def test_masks_of_equal_size_in_a_batch():
    truth = normal(1, (M, R)) / M**0.5

    def gradient(key):
        rows, columns = jax.random.randint(key, (2, 200), 0, M)
        values = jnp.sum(truth[rows] * truth[columns], axis=1)
        return completion.observed(rows, columns, values, (M, M)).gradient(truth + 0.1)

    keys = jax.random.split(KEY, 2)
    found = jax.vmap(gradient)(keys)
    for g, key in zip(found, keys, strict=True):
        np.testing.assert_allclose(g, gradient(key), rtol=1e-3, atol=1e-5)


def test_projection_bounds_rows_and_leaves_incoherent_factors_alone():
    factors = nys.Factors(normal(1, (M, R)).at[0].mul(50.0), normal(2, (N, R)))
    product = np.asarray(factors.left @ factors.right.T)
    lengths = np.sqrt(M) * np.linalg.norm(product, axis=1)
    bound = 1.01 * np.sort(lengths)[-2]
    found = completion.project_incoherent(factors, bound)
    np.testing.assert_allclose(found.left[1:], factors.left[1:], rtol=1e-6)
    new = np.sqrt(M) * np.linalg.norm(np.asarray(found.left[0] @ factors.right.T))
    np.testing.assert_allclose(new, bound, rtol=1e-4)
    shares = bound / (np.sqrt(N) * np.linalg.norm(product, axis=0))
    assert min(shares) < 0.9 < 1 < max(shares)
    np.testing.assert_allclose(
        found.right, factors.right * np.minimum(shares, 1)[:, None], rtol=1e-4, atol=1e-6
    )
    x = factors.right
    chex.assert_trees_all_equal(completion.project_incoherent(x, 1e6), x)
    zeros = jnp.zeros((M, R))
    chex.assert_trees_all_equal(completion.project_incoherent(zeros, 1.0), zeros)


@pytest.mark.long
def test_projected_steps_project_after_each_step():
    problem, _, point = case("asymmetric")
    project = Partial(completion.project_incoherent, bound=0.5)
    step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5), project)
    found = nys.solvers.run(step, point, 2).params
    for _ in range(2):
        plain = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
        point = project(nys.solvers.run(plain, point, 1).params)
    chex.assert_trees_all_close(found, point, rtol=1e-4, atol=1e-5)
    unprojected = nys.solvers.run(plain, point, 1).params
    assert not np.allclose(project(unprojected).left, unprojected.left, rtol=0.05)


ONES = jnp.ones(2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: completion.observed([0, 1], [0], ONES, (2, 2)), "do not go together"),
        (lambda: completion.observed(ONES[:0], ONES[:0], ONES[:0], (2, 2)), "do not go together"),
        (lambda: completion.observed([0, 2], [0, 1], ONES, (2, 2)), "rows are 0 … 2"),
        (lambda: completion.observed([0, 1], [-1, 1], ONES, (2, 2)), "columns are -1 … 1"),
        (lambda: completion.observed([0.0, 1.0], [0, 1], ONES, (2, 2)), "expected integers"),
        (lambda: completion.observed([0, 1], [0, 1], jnp.ones(3), (2, 2)), "b is"),
        (lambda: completion.observed([0, 1], [0, 1], jnp.ones(2, int), (2, 2)), "int32"),
        (lambda: completion.bernoulli(KEY, jnp.ones((3, 1)), 0.0), "probability is 0"),
        (lambda: completion.project_incoherent(jnp.ones((3, 1)), 0.0), "bound is 0"),
    ],
)
def test_bad_input_is_refused_with_a_reason(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


@pytest.mark.parametrize("shape", [(2, 2, 2), (2.0, 2), 4, (2, 0)])
def test_a_shape_that_is_no_pair_of_sides_is_refused(monkeypatch, shape):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match=r"the matrix has shape .*expected a matrix"):
        completion.observed([0, 1], [0, 1], ONES, shape)
