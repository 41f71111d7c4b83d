"""problems.phase: quadratic measurements against their matrices, and recovery from them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import nyscaled as nys

M, R, P = 12, 3, 150
KEY = jax.random.key(0)
phase = nys.problems.phase


def test_measurements_are_squares_of_projections_and_the_truth_explains_them():
    problem, truth = phase.gaussian(KEY, M, (2.0, 0.5), P)
    vectors = np.asarray(problem.map.vectors, np.float64)
    expected = np.sum((vectors @ np.asarray(truth, np.float64)) ** 2, axis=1)
    np.testing.assert_allclose(problem.b, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(truth.T @ truth), [0.5, 2.0], rtol=1e-5)
    assert problem.loss(truth) < 1e-10
    # aᵢ = N(0, I) p^(−¼): the mean of ‖aᵢ‖² is m/√p
    np.testing.assert_allclose(np.mean(np.sum(vectors**2, axis=1)), M / P**0.5, rtol=0.1)


def test_noise_is_of_the_given_size_and_may_be_traced():
    def loss_at_the_truth(noise):
        problem, truth = phase.gaussian(KEY, M, (1.0,), 2000, noise)
        return problem.loss(truth)

    noises = jnp.array([0.1, 0.4])
    found = jax.jit(jax.vmap(loss_at_the_truth))(noises)
    np.testing.assert_allclose(found, noises**2 / 4, rtol=0.15)


def test_signs_are_recovered_from_squares():
    problem, truth = phase.gaussian(KEY, M, (1.0,), P)
    step = nys.solvers.gradient_step(problem, nys.precgd(0.2))
    start = nys.initializers.small(jax.random.key(1), M, R, 0.1)
    found = nys.solvers.run(step, start, 300).params
    np.testing.assert_allclose(found @ found.T, truth @ truth.T, atol=1e-3)


def test_rank_one_measurements_give_the_same_run_as_their_matrices():
    vectors, x = normal(0, (P, M)) / P**0.25, 0.3 * normal(1, (M, R))
    rank_one = phase.RankOne(vectors)
    b = rank_one.forward(x, x) + 0.1
    runs = [
        nys.solvers.run(
            nys.solvers.gradient_step(problem, optax.sgd(0.01)), x, 5, problem.loss
        ).history
        for problem in (
            nys.problems.Sensing(rank_one, b),
            nys.problems.Sensing(jnp.einsum("pi,pj->pij", vectors, vectors), b),
        )
    ]
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: phase.RankOne(jnp.ones(3)), r"expected \(p, m\)"),
        (lambda: phase.RankOne(jnp.ones((0, 3))), r"expected \(p, m\)"),
        (lambda: phase.RankOne(jnp.full((4, 3), jnp.nan)), "vectors has NaN"),
        (lambda: phase.gaussian(KEY, M, (1.0, -1.0), P), "positive"),
        (lambda: phase.gaussian(KEY, M, (1.0,), 0), "num_measurements is 0"),
        (lambda: phase.gaussian(KEY, M, (1.0,), P, -1.0), "noise is -1"),
    ],
)
def test_bad_problems_are_refused_with_a_reason(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
