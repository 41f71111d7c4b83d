"""The two loops: what they record, where they stop, and how they end."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, R, normal, psd
from hypothesis import strategies as st
from jax.tree_util import Partial

import nyscaled as nys
from nyscaled.solvers import Status

seeds = st.integers(0, 2**31 - 1)


def solve(a, x0, num_steps, learning_rate=0.5, **kwargs):
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), learning_rate, **kwargs)
    return nys.solvers.run(step, x0, num_steps).params


# --- The loops -----------------------------------------------------------------------------------


def test_run_is_the_plain_loop_over_update():
    a, _ = psd()
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    state = step.init(x0)
    rows = [step.params(state)]
    for _ in range(5):
        state = step.update(state)
        rows.append(step.params(state))
    solution = nys.solvers.run(step, x0, 5, lambda x: x)
    np.testing.assert_allclose(solution.history, jnp.stack(rows), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(solution.history[-1], solution.params)
    assert solution.status is Status.MAX_STEPS
    assert solution.num_steps == 5


def test_run_until_stops_at_the_first_iterate_that_meets_the_tolerance():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    step = nys.solvers.scaled_step(problem, 0.5)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    errors = np.asarray(nys.solvers.run(step, x0, 20, problem.residual).history)
    solution = nys.solvers.run_until(step, x0, problem.residual, tol=1e-3)
    assert solution.status is Status.CONVERGED
    assert solution.num_steps == np.argmax(errors <= 1e-3) > 0
    assert solution.value <= 1e-3
    assert solution.params.shape == (M, R)


def test_run_until_makes_no_step_where_none_is_needed_and_no_more_than_allowed():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    step = nys.solvers.scaled_step(problem, 0.5)
    done = nys.solvers.run_until(step, problem.optimum(R), problem.residual, tol=1e-3)
    assert (done.status, int(done.num_steps)) == (Status.CONVERGED, 0)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    cut = nys.solvers.run_until(step, x0, problem.residual, tol=0.0, max_steps=4)
    assert (cut.status, int(cut.num_steps)) == (Status.MAX_STEPS, 4)
    equal = nys.solvers.run_until(step, x0, lambda x: 0.5, tol=0.5)
    assert (equal.status, int(equal.num_steps)) == (Status.CONVERGED, 0)
    endless = nys.solvers.run_until(step, x0, lambda x: 0.5, tol=0.0)
    assert (endless.status, int(endless.num_steps)) == (Status.MAX_STEPS, 1000)


def test_run_of_no_steps_returns_the_start():
    a, _ = psd()
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    step = nys.solvers.gradient_step(nys.problems.Symmetric(a), optax.sgd(0.1))
    solution = nys.solvers.run(step, x0, 0, jnp.linalg.norm)
    chex.assert_trees_all_equal(solution.params, x0)
    chex.assert_shape(solution.history, (1,))


@pytest.mark.long
def test_history_may_be_any_tree_or_nothing():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    step = nys.solvers.scaled_step(problem, 0.5)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    record = Partial(lambda p, x: {"loss": p.loss(x), "row": x[0]}, problem)
    history = nys.solvers.run(step, x0, 3, record).history
    chex.assert_shape(history["loss"], (4,))
    chex.assert_shape(history["row"], (4, R))
    assert nys.solvers.run(step, x0, 3).history is None


def test_learning_rate_schedule_is_read_at_the_step_count():
    a, _ = psd()
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    problem = nys.problems.Symmetric(a)
    rates = [0.5, 0.05, 0.005]
    scheduled = nys.solvers.scaled_step(problem, nys.solvers.staircase(0.5, every=1))
    found = nys.solvers.run(scheduled, x0, 3).params
    x = x0
    for rate in rates:
        x = solve(a, x, 1, rate)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)
    by_gradient = nys.solvers.gradient_step(
        problem, nys.scaled_gd(nys.solvers.staircase(0.5, every=1))
    )
    np.testing.assert_allclose(nys.solvers.run(by_gradient, x0, 3).params, x, rtol=1e-3, atol=1e-4)


def test_staircase_lowers_the_step_size_level_by_level():
    schedule = nys.solvers.staircase(0.2, every=5, factor=0.5)
    np.testing.assert_allclose(
        [schedule(t) for t in (0, 4, 5, 9, 10)], [0.2, 0.2, 0.1, 0.1, 0.05], rtol=1e-6
    )


def test_levels_of_no_steps_are_refused():  # optax makes them a constant step size
    with pytest.raises(ValueError, match=r"every is 0; expected a number in \[1, inf\)"):
        nys.solvers.staircase(every=0)
    for name in ("initial", "factor"):
        with pytest.raises(ValueError, match=rf"{name} is 0; expected a number in \(0, inf\)"):
            nys.solvers.staircase(**{name: 0})


@pytest.mark.long
def test_a_small_constant_step_size_comes_closer_to_weak_optimality():
    spectrum = jnp.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.1])
    a, basis = psd(3, spectrum)
    problem = nys.problems.Symmetric(a)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, 3, scale=0.5)

    def errors(learning_rate, num_steps):
        step = nys.solvers.scaled_step(problem, learning_rate)
        record = Partial(lambda q, s, x: nys.optimality.weak_optimality(x, q, s), basis, spectrum)
        return np.asarray(nys.solvers.run(step, x0, num_steps, record).history)

    # Once through the first phase, the error is O(ηr): ten times smaller for a tenth of η.
    coarse, fine = errors(0.5, 10)[10], errors(0.05, 100)[100]
    assert fine < 0.5 * coarse


# --- Outcomes ------------------------------------------------------------------------------------


def test_diverging_gradient_descent_raises_and_says_why():
    a, _ = psd()
    step = nys.solvers.gradient_step(nys.problems.Symmetric(a), optax.sgd(10.0))
    x0 = 3 * normal(0, (M, R))
    with pytest.raises(ValueError, match="learning rate is too large"):
        nys.solvers.run(step, x0, 30)
    solution = nys.solvers.run(step, x0, 30, throw=False)
    assert solution.status in (Status.NON_FINITE, Status.DIVERGED)


def test_a_factor_that_grows_past_the_range_of_the_loss_has_diverged():
    a, _ = psd()
    step = nys.solvers.gradient_step(nys.problems.Symmetric(a), optax.sgd(10.0))
    x0 = 3 * normal(0, (M, R))
    solution = nys.solvers.run_until(step, x0, jnp.linalg.norm, tol=0.0, throw=False)
    assert solution.status is Status.DIVERGED
    assert jnp.all(jnp.isfinite(solution.params))


def test_nan_in_the_measure_ends_the_loop_as_non_finite():
    a, _ = psd()
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    solution = nys.solvers.run_until(step, x0, lambda x: x[0, 0] * jnp.nan, 1e-3, throw=False)
    assert (solution.status, int(solution.num_steps)) == (Status.NON_FINITE, 0)


@pytest.mark.long
def test_run_until_has_forward_mode_and_says_that_it_has_no_reverse_mode():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    step = nys.solvers.scaled_step(problem, 0.5)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)

    def error(scale):
        return nys.solvers.run_until(step, scale * x0, problem.residual, 1e-1).value

    assert abs(jax.jacfwd(error)(1.0)) > 0
    for gradient in (jax.grad(error), jax.jit(jax.grad(error))):
        with pytest.raises(ValueError, match="run_until has no reverse-mode derivative"):
            gradient(1.0)


def test_status_is_an_array_under_vmap_and_one_failure_does_not_raise():
    a, _ = psd()
    starts = jnp.stack([nys.initializers.nystrom(jax.random.key(1), a, R), jnp.full((M, R), 1e30)])
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    status = jax.vmap(lambda x: nys.solvers.run(step, x, 3).status)(starts)
    assert status.shape == (2,)
    assert status[0] == Status.MAX_STEPS
    assert status[1] in (Status.DIVERGED, Status.NON_FINITE)


@pytest.mark.long
def test_run_until_under_vmap_stops_each_member_at_its_own_count():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    step = nys.solvers.scaled_step(problem, 0.5)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)
    starts = jnp.stack([x0, 1000 * x0])

    def count(x):
        return nys.solvers.run_until(step, x, problem.residual, tol=1e-3).num_steps

    together = jax.vmap(count)(starts)
    assert together[0] < together[1]
    chex.assert_trees_all_equal(together, jnp.array([count(x) for x in starts], jnp.int32))
