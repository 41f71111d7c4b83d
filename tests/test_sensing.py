"""problems.sensing: the losses against their definitions, and the steps that run on them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import nyscaled as nys

M, N, R, P = 12, 9, 3, 150
SPECTRUM = (1.0, 0.5)
sensing = nys.problems.sensing
CASES = ("symmetric", "asymmetric")


def case(kind, noise=0.1):
    """A noisy problem, its truth and a point elsewhere."""
    key = jax.random.key(0)
    if kind == "symmetric":
        problem, truth = sensing.gaussian(key, M, SPECTRUM, P, noise)
        return problem, truth, normal(1, (M, R))
    problem, truth = sensing.gaussian_factors(key, M, N, SPECTRUM, P, noise)
    return problem, truth, nys.Factors(normal(1, (M, R)), normal(2, (N, R)))


def product(point):
    x, y = point if isinstance(point, nys.Factors) else (point, point)
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64).T


@pytest.mark.parametrize("kind", CASES)
def test_truth_is_optimal_without_noise_and_at_the_noise_level_with_it(kind):
    problem, truth, _ = case(kind, noise=0.0)
    assert problem.loss(truth) < 1e-10
    chex.assert_trees_all_close(
        problem.gradient(truth), jax.tree.map(jnp.zeros_like, truth), atol=1e-5
    )
    problem, truth, _ = case(kind, noise=0.2)
    level = 0.2**2 / (4 if kind == "symmetric" else 2)
    np.testing.assert_allclose(problem.loss(truth), level, rtol=0.5)


@pytest.mark.long
def test_unit_measurements_give_the_problems_of_the_paper():
    """With 𝒜 the identity sensing is (1) and (4)."""
    x, y = normal(1, (M, R)), normal(2, (N, R))
    for point, target in ((x, product(normal(3, (M, 2)))), (nys.Factors(x, y), normal(4, (M, N)))):
        target = jnp.asarray(target, jnp.float32)
        problem = nys.problems.Sensing(
            jnp.eye(target.size).reshape(-1, *target.shape), target.ravel()
        )
        full = nys.problems.Asymmetric if isinstance(point, nys.Factors) else nys.problems.Symmetric
        np.testing.assert_allclose(problem.loss(point), full(target).loss(point), rtol=1e-5)
        chex.assert_trees_all_close(
            problem.gradient(point), full(target).gradient(point), rtol=1e-4, atol=1e-3
        )


@pytest.mark.long
def test_target_is_the_matrix_on_average():
    problems = jax.vmap(lambda key: sensing.gaussian(key, 4, (1.0,), 3000))
    problem, truth = problems(jax.random.split(jax.random.key(0), 2))
    found = jax.vmap(lambda p: p.target())(problem)
    np.testing.assert_allclose(found, truth @ truth.mT, atol=0.15)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("make", ["gradient", "alternating"])
def test_scaled_gd_recovers_a_rectangular_matrix(make):
    problem, truth, _ = case("asymmetric", noise=0.0)
    start = jax.tree.map(lambda f: f + 0.1, truth)
    step = {"gradient": nys.solvers.gradient_step, "alternating": nys.solvers.alternating_step}
    solution = nys.solvers.run(step[make](problem, nys.scaled_gd(0.4)), start, 100, problem.loss)
    assert solution.history[-1] < 1e-9
    np.testing.assert_allclose(product(solution.params), product(truth), atol=1e-4)


@pytest.mark.long
def test_trials_in_a_batch_are_those_one_by_one():
    def trial(key):
        problem, truth = sensing.gaussian(key, M, SPECTRUM, P)
        step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.4))
        return nys.solvers.run(step, truth + 0.1, 20, problem.loss).history

    keys = jax.random.split(jax.random.key(3), 2)
    batch = jax.vmap(trial)(keys)
    assert batch.shape == (2, 21)
    for key, history in zip(keys, batch, strict=True):
        np.testing.assert_allclose(history, trial(key), rtol=1e-3, atol=1e-9)


@pytest.mark.long
def test_nystrom_start_of_the_target_leads_to_the_matrix():
    problem, truth = sensing.gaussian_factors(jax.random.key(0), M, N, SPECTRUM, 600)
    start = nys.initializers.nystrom_factors(jax.random.key(1), problem.target(), 2)
    step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
    solution = nys.solvers.run(step, start, 60, problem.loss)
    np.testing.assert_allclose(product(solution.params), product(truth), atol=1e-4)


def key_and(*args, make=sensing.gaussian, **kwargs):
    return lambda: make(jax.random.key(0), *args, **kwargs)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nys.problems.Sensing(jnp.ones((3, 4)), jnp.ones(3)), r"expected \(p, m, n\)"),
        (lambda: nys.problems.Sensing(jnp.ones((3, 0, 4)), jnp.ones(3)), r"expected \(p, m, n\)"),
        (lambda: nys.problems.Sensing(jnp.ones((3, 4, 4), int), jnp.ones(3)), "dtype int32"),
        (lambda: nys.problems.Sensing(jnp.ones((3, 4, 4)), jnp.ones(4)), r"expected \(3,\)"),
        (lambda: nys.problems.Sensing(jnp.ones((3, 4, 4)), jnp.ones(3, int)), "int32"),
        (lambda: nys.problems.Sensing(jnp.full((3, 4, 4), jnp.nan), jnp.ones(3)), "NaN"),
        (lambda: nys.problems.Sensing(jnp.ones((3, 4, 4)), jnp.full(3, jnp.inf)), "b has NaN"),
        (key_and(M, (1.0, -1.0), P), "positive"),
        (key_and(M, SPECTRUM, 0), "num_measurements is 0"),
        (key_and(M, SPECTRUM, P, noise=-1.0), "noise is -1"),
    ],
)
def test_bad_problems_are_refused_with_a_reason(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


def test_bad_points_are_refused_with_a_reason():
    square, _, x = case("symmetric")
    wide, _, _ = case("asymmetric")
    step = nys.solvers.gradient_step(wide, optax.sgd(0.1))
    with pytest.raises(ValueError, match="expected Factors"):
        step.init(x)
    with pytest.raises(ValueError, match="expected \\(12, r\\)"):
        nys.solvers.gradient_step(square, optax.sgd(0.1)).init(x[1:])
    with pytest.raises(ValueError, match="expected Factors, to alternate"):
        nys.solvers.alternating_step(square, optax.sgd(0.1)).init(x)
