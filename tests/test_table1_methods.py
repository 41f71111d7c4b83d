"""The other methods of Table 1: against NumPy in the variables of their papers, and their rates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, N, R, exact_residual, normal, rectangular

import nyscaled as nys
from nyscaled import Factors

# --- Modified GD (Xiong, Ding, Du 2024) ----------------------------------------------------------


def pair(seed, scale=1.0, columns=R):
    return Factors(scale * normal(seed, (M, columns)), scale * normal(seed + 1, (N, columns)))


def test_unbalance_keeps_the_product_and_makes_the_left_factor_orthonormal_times_beta():
    before = pair(3)
    x, y = nys.solvers.unbalance(before, 0.25)
    expected = np.asarray(before.left) @ np.asarray(before.right).T
    np.testing.assert_allclose(x @ y.T, expected, atol=1e-4)
    np.testing.assert_allclose(x.T @ x, 0.25**2 * np.eye(R), atol=1e-6)


def test_unbalance_keeps_the_product_of_deficient_factors():
    x, y = pair(3)
    before = Factors(x.at[:, 1:].set(x[:, :1]), y)
    new = nys.solvers.unbalance(before, 2.0)
    np.testing.assert_allclose(new.left.T @ new.left, 4 * np.eye(R), atol=1e-5)
    np.testing.assert_allclose(new.left @ new.right.T, before.left @ before.right.T, atol=1e-4)


def numpy_modified(a, x, y, rate, at, beta, steps):
    for step in range(steps):
        if step == at:
            p, sigma, qt = np.linalg.svd(x, full_matrices=False)
            x, y = x @ qt.T @ np.diag(beta / sigma), y @ qt.T @ np.diag(sigma / beta)
            assert np.allclose(x, beta * p)
        rest = x @ y.T - a
        x, y = x - rate * rest @ y, y - rate * rest.T @ x
    return x, y


@pytest.mark.parametrize("at", [0, 7, -1, 99])
def test_modified_step_is_descent_with_one_refactoring(at):
    a = rectangular()[0]
    start, rate, beta, steps = pair(5, 0.1), 0.2, 0.9, 20
    step = nys.solvers.modified_step(nys.problems.Asymmetric(a), optax.sgd(rate), at, beta)
    found = nys.solvers.run(step, start, steps).params
    arrays = [np.asarray(v, np.float64) for v in (a, *start)]
    x, y = numpy_modified(*arrays, rate, at, beta, steps)
    # The signs of singular vectors are free; the product and the Gram matrices' spectra are not.
    np.testing.assert_allclose(found.left @ found.right.T, x @ y.T, atol=1e-4)
    for mine, expected in zip(found, (x, y), strict=True):
        values = [np.linalg.svd(v, compute_uv=False) for v in (np.asarray(mine), expected)]
        np.testing.assert_allclose(*values, atol=1e-4)


def test_memory_of_the_transformation_starts_anew_after_the_refactoring():
    problem = nys.problems.Asymmetric(rectangular()[0])
    tx, start = optax.sgd(0.05, momentum=0.9), pair(5, 0.1)
    step = nys.solvers.modified_step(problem, tx, 10, 0.9)
    found = nys.solvers.run(step, start, 25).params
    plain = nys.solvers.gradient_step(problem, tx)
    middle = nys.solvers.unbalance(nys.solvers.run(plain, start, 10).params, 0.9)
    chex.assert_trees_all_close(found, nys.solvers.run(plain, middle, 15).params, atol=1e-4)


@pytest.mark.long
def test_rate_of_modified_descent_does_not_depend_on_the_scale_of_the_start():
    """Over-parametrized: plain descent takes about 1/α² steps, the modified one as many always."""
    a = rectangular(spectrum=(1.0, 0.7))[0]
    problem = nys.problems.Asymmetric(a)
    scales = jnp.array([0.1, 0.05, 0.025])
    x, y = pair(8)

    @jax.jit
    def counts(at):
        def count(scale):
            step = nys.solvers.modified_step(problem, optax.sgd(0.4), at, 0.8)
            start = Factors(scale * x, scale / 3 * y)
            return nys.solvers.run_until(step, start, problem.residual, 1e-4, 20_000)

        found = jax.vmap(count)(scales)
        return found.num_steps, found.status

    (modified, reached), (plain, _) = counts(30), counts(-1)
    assert (reached == nys.solvers.Status.CONVERGED).all()
    assert modified.max() < 1.5 * modified.min()
    assert (plain[1:] > 2 * plain[:-1]).all()
    assert plain[-1] > 5 * modified[-1]


def test_modified_step_refuses_what_it_cannot_use():
    asymmetric = nys.problems.Asymmetric(jnp.eye(3))
    with pytest.raises(ValueError, match="beta"):
        nys.solvers.modified_step(asymmetric, optax.sgd(0.1), 5, 0.0)
    with pytest.raises(ValueError, match="beta"):
        nys.solvers.unbalance(pair(1), -1.0)


# --- Nesterov's method from a Nyström start (Xu et al. 2024) --------------------------------------


def numpy_nesterov(a, x, y, rate, momentum, steps):
    """The method as it is written: a step from the extrapolated point, then the extrapolation."""
    look_x, look_y = x, y
    for _ in range(steps):
        rest = look_x @ look_y.T - a
        new_x, new_y = look_x - rate * rest @ look_y, look_y - rate * rest.T @ look_x
        look_x, look_y = new_x + momentum * (new_x - x), new_y + momentum * (new_y - y)
        x, y = new_x, new_y
    return look_x, look_y


def test_optax_sgd_is_nesterovs_method_at_its_extrapolated_points():
    a = rectangular()[0]
    start = nys.initializers.nystrom_factors(jax.random.key(2), a, R, 2.0)
    rate, momentum = nys.solvers.nesterov_parameters(start.left)
    tx = optax.sgd(rate, momentum, nesterov=True)
    step = nys.solvers.gradient_step(nys.problems.Asymmetric(a), tx)
    found = nys.solvers.run(step, start, 30).params
    arrays = [np.asarray(v, np.float64) for v in (a, *start)]
    expected = numpy_nesterov(*arrays, float(rate), float(momentum), 30)
    for mine, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-4 * np.abs(reference).max())
    assert exact_residual(found.left, a, found.right) < exact_residual(
        *(start.left, a, start.right)
    )


def test_nesterov_parameters_are_those_of_the_singular_values_that_are_not_zero():
    x0 = np.diag([4.0, 2.0, 1.0]).astype(np.float32)
    rate, momentum = nys.solvers.nesterov_parameters(jnp.asarray(x0))
    np.testing.assert_allclose((rate, momentum), (1 / 16, (4 - 1) / (4 + 1)), rtol=1e-5)
    mixed = x0 @ np.asarray(normal(1, (3, 6)))  # rank 3 in six columns
    rate, momentum = nys.solvers.nesterov_parameters(jnp.asarray(np.pad(mixed, ((0, 9), (0, 0)))))
    large, *_, least = np.linalg.svd(mixed, compute_uv=False)
    np.testing.assert_allclose(
        (rate, momentum), (1 / large**2, (large - least) / (large + least)), rtol=1e-4
    )


def test_rates_of_a_matrix_without_entries_are_refused():
    with pytest.raises(ValueError, match=r"x0 is zero.*; expected X_0 = AΩ"):
        nys.solvers.nesterov_parameters(jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"norm is 0; expected a number in \(0, inf\)"):
        nys.solvers.altgd_learning_rate(0.0)


@functools.partial(jax.jit, static_argnums=1)
def steps_to_1e_3(kappas, accelerated):
    """Iterations from X_0 = AΩ, Ω orthonormal, with the step size and momentum of X_0."""

    def count(kappa):
        a = nys.spectra.rectangular(jax.random.key(0), M, N, kappa ** -jnp.linspace(0.0, 1.0, R))[0]
        problem = nys.problems.Asymmetric(a)
        start = nys.initializers.nystrom_factors(jax.random.key(1), a, 3 * R, 20.0)
        rate, momentum = nys.solvers.nesterov_parameters(start.left)
        tx = optax.sgd(rate, momentum if accelerated else None, nesterov=accelerated)
        step = nys.solvers.gradient_step(problem, tx)
        return nys.solvers.run_until(step, start, problem.residual, 1e-3, 30_000).num_steps

    return jax.vmap(count)(kappas)


@pytest.mark.long
def test_nesterov_is_linear_in_kappa_where_descent_is_quadratic():
    kappas = jnp.array([4.0, 8.0, 16.0])
    fast, slow = (np.log2(steps_to_1e_3(kappas, which)) for which in (True, False))
    np.testing.assert_allclose(np.diff(fast), 1.0, atol=0.4)
    np.testing.assert_allclose(np.diff(slow), 2.0, atol=0.4)
    assert (fast < slow - 1).all()
