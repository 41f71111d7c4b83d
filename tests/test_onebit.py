"""problems.onebit: the loss against its definition in float64, its generators, and recovery."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import nyscaled as nys

M, N, R, P = 12, 9, 3, 150
SPECTRUM = (1.0, 0.5)
KEY = jax.random.key(0)
onebit = nys.problems.onebit
CASES = ("symmetric", "asymmetric")


def case(kind, trials=None):
    """A problem, its truth and a point elsewhere."""
    if kind == "symmetric":
        problem, truth = onebit.gaussian(KEY, M, SPECTRUM, P, trials)
        return problem, truth, normal(1, (M, R))
    problem, truth = onebit.gaussian_factors(KEY, M, N, SPECTRUM, P, trials)
    return problem, truth, nys.Factors(normal(1, (M, R)), normal(2, (N, R)))


def product(point):
    x, y = point if isinstance(point, nys.Factors) else (point, point)
    return np.asarray(x, np.float64) @ np.asarray(y, np.float64).T


def exact_loss(problem, point):
    """4τ² Σ KL, halved for X, in float64."""
    matrices, b = (np.asarray(v, np.float64) for v in (problem.map.matrices, problem.b))
    z = np.einsum("pij,ij->p", matrices, product(point)) / problem.noise_scale

    def times_log(weight, q):
        kept = weight > 0
        return np.sum(weight[kept] * np.log(weight[kept] / q[kept]))

    divergence = times_log(b, 1 / (1 + np.exp(-z))) + times_log(1 - b, 1 / (1 + np.exp(z)))
    weight = 4 if isinstance(point, nys.Factors) else 2
    return weight * problem.noise_scale**2 * divergence


@pytest.mark.long
@pytest.mark.parametrize("kind", CASES)
def test_loss_and_gradient_follow_their_definitions_where_frequencies_are_0_or_1(kind):
    problem, _, point = case(kind, trials=3)
    assert {0.0, 1.0} <= set(np.asarray(problem.b).tolist())
    np.testing.assert_allclose(problem.loss(point), exact_loss(problem, point), rtol=1e-4)
    automatic = jax.grad(problem.loss)(point)
    chex.assert_trees_all_close(problem.gradient(point), automatic, rtol=1e-3, atol=1e-4)


def test_loss_near_the_truth_is_not_lost_in_rounding():
    """As √f is the damping of PrecGD: a plain difference of float32 is 1e-7 at best."""
    problem, truth, _ = case("symmetric")
    for size in (1e-2, 1e-3):
        near = truth + size * normal(5, truth.shape)
        np.testing.assert_allclose(problem.loss(near), exact_loss(problem, near), rtol=0.02)
    assert problem.loss(truth) < 1e-11


def test_near_one_half_it_is_sensing():
    """σ is linear there: loss, gradient and so step sizes are those of `Sensing`."""
    exact, truth = nys.problems.sensing.gaussian(KEY, M, SPECTRUM, P)
    problem = onebit.OneBit(exact.map, jax.nn.sigmoid(exact.b / 30), 30.0)
    point = truth + 0.3
    np.testing.assert_allclose(problem.loss(point), exact.loss(point), rtol=0.02)
    np.testing.assert_allclose(problem.gradient(point), exact.gradient(point), rtol=0.02, atol=0.02)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("kind", CASES)
def test_matrix_is_recovered_from_exact_frequencies(kind):
    problem, truth, _ = case(kind)
    step = nys.solvers.gradient_step(problem, nys.precgd(0.5))
    start = jax.tree.map(lambda f: f + 0.1, truth)
    found = nys.solvers.run(step, start, 150).params
    np.testing.assert_allclose(product(found), product(truth), atol=1e-3)


@pytest.mark.long
def test_coins_give_frequencies_and_a_loss_of_one_over_their_number():
    @jax.jit
    def thrown(trials):
        problem, truth = onebit.gaussian(KEY, M, SPECTRUM, 1000, trials)
        return problem.b, problem.loss(truth)

    exact = onebit.gaussian(KEY, M, SPECTRUM, 1000)[0].b
    for trials in (10, 1000):
        found, loss = thrown(trials)
        np.testing.assert_allclose(found * trials, np.round(found * trials), atol=1e-3)
        np.testing.assert_allclose(loss, 1 / trials, rtol=0.2)
        deviations = (found - exact) / np.sqrt(exact * (1 - exact) / trials)
        np.testing.assert_allclose(np.std(deviations), 1, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: onebit.OneBit(jnp.ones((1, 4, 4)), jnp.full(1, 1.5)), "frequencies"),
        (lambda: onebit.OneBit(jnp.ones((1, 4, 4)), jnp.full(1, 0.5), 0.0), "noise_scale is 0"),
        (lambda: onebit.gaussian(KEY, M, SPECTRUM, P, trials=0), "trials is 0"),
        (lambda: onebit.gaussian(KEY, M, SPECTRUM, 0), "num_measurements is 0"),
    ],
)
def test_bad_problems_are_refused_with_a_reason(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()
