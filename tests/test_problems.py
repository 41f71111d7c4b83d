"""problems: loss, gradient and optimum, for every form of A."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMS, M, N, R, exact_residual, normal, psd, rectangular

import nyscaled as nys

SPECTRUM = np.array([1.0, 0.8, 0.5, 0.2])


@pytest.fixture(params=["symmetric", "asymmetric"])
def case(request):
    """What makes a problem, its matrix, and a point."""
    if request.param == "symmetric":
        return nys.problems.Symmetric, psd()[0], normal(1, (M, R))
    point = nys.Factors(normal(1, (M, R)), normal(2, (N, R)))
    return nys.problems.Asymmetric, rectangular()[0], point


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_follow_their_definitions_for_every_form(case, form):
    make, a, point = case
    problem = make(FORMS[form](a))
    a = np.asarray(a, np.float64)
    if make is nys.problems.Symmetric:
        x = np.asarray(point, np.float64)
        loss, residual = exact_residual(x, a) ** 2 / 4, exact_residual(x, a)
        gradient = (x @ x.T - a) @ x
    else:
        x, y = (np.asarray(f, np.float64) for f in point)
        loss, residual = exact_residual(x, a, y) ** 2 / 2, exact_residual(x, a, y)
        gradient = nys.Factors((x @ y.T - a) @ y, (x @ y.T - a).T @ x)
    np.testing.assert_allclose(problem.loss(point), loss, rtol=1e-5)
    np.testing.assert_allclose(problem.residual(point), residual, rtol=1e-5)
    chex.assert_trees_all_close(problem.gradient(point), gradient, rtol=1e-4, atol=1e-3)
    assert (problem.shape, problem.dtype) == (a.shape, jnp.float32)


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("form", FORMS)
def test_automatic_derivative_of_the_loss_is_the_gradient(case, form):
    make, a, point = case
    problem = make(FORMS[form](a))
    found = jax.grad(problem.loss)(point)
    chex.assert_trees_all_close(found, problem.gradient(point), rtol=1e-3, atol=1e-3)


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("rank", [1, R - 1, R])
def test_optimum_reaches_the_best_loss_and_is_stationary(case, rank):
    make, a, _ = case
    problem = make(a)
    best = problem.optimum(rank)
    divisor = 4 if make is nys.problems.Symmetric else 2
    np.testing.assert_allclose(
        problem.loss(best), np.sum(SPECTRUM[rank:] ** 2) / divisor, rtol=1e-4, atol=1e-11
    )
    gradient = problem.gradient(best)
    chex.assert_trees_all_close(gradient, jax.tree.map(jnp.zeros_like, best), atol=3e-6)


def test_residual_of_a_solution_is_at_rounding():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    assert problem.residual(problem.optimum(R)) < 5e-6


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_scaled_gd_by_a_dense_gradient_converges_at_a_large_condition_in_float32(kind):
    spectrum, keys = jnp.geomspace(1, 1e-4, 3), jax.random.split(jax.random.key(0))
    if kind == "symmetric":
        a, _ = nys.spectra.psd(keys[0], 60, spectrum)
        problem, start = nys.problems.Symmetric(a), nys.initializers.nystrom(keys[1], a, 3)
    else:
        a = nys.spectra.rectangular(keys[0], 60, 40, spectrum)[0]
        problem = nys.problems.Asymmetric(a)
        start = nys.initializers.nystrom_factors(keys[1], a, 3)
    step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
    solution = nys.solvers.run(step, start, 60, record=problem.residual)
    assert solution.history[-1] <= (1e-6 if kind == "symmetric" else 1e-4)
