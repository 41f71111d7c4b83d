"""How a run ends says what is so: for matrices of any size, and with the cause that was seen."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, N, R, exact_residual, normal, psd, rectangular

import nyscaled as nys
from nyscaled._pytree import pytree_dataclass
from nyscaled.solvers import Status

SIZES = (1e-30, 1e-19, 1e-17, 1e-15, 1e10, 1e18, 1e30)


@pytest.mark.parametrize("size", SIZES)
def test_converged_means_a_true_relative_error_within_the_tolerance(size):
    a = psd()[0] * jnp.float32(size)
    problem, tol = nys.problems.Symmetric(a), 1e-5 * float(nys.numerics.norm(a))
    start = nys.initializers.rescaled(nys.initializers.nystrom(jax.random.key(1), a, R), a)
    step = nys.solvers.scaled_step(problem)
    solution = nys.solvers.run_until(step, start, problem.residual, tol=tol)
    assert solution.status is Status.CONVERGED
    scaled = np.asarray(solution.params, np.float64) / size**0.5
    assert exact_residual(scaled, np.asarray(a, np.float64) / size) < 1.1e-5 * np.linalg.norm(
        psd()[0]
    )


@pytest.mark.parametrize("size", SIZES)
def test_rectangular_matrix_of_any_size_is_solved_in_one_step(size):
    a = rectangular()[0] * jnp.float32(size)
    problem = nys.problems.Asymmetric(a)
    start = nys.initializers.nystrom_factors(jax.random.key(0), a, R)
    step, norm = nys.solvers.scaled_step(problem, 1.0), nys.numerics.norm(a)
    assert nys.solvers.run(step, start, 1).status is Status.MAX_STEPS
    solution = nys.solvers.run_until(step, start, problem.residual, tol=1e-5 * norm)
    assert (solution.status, int(solution.num_steps)) == (Status.CONVERGED, 1)
    x, y = (np.asarray(f, np.float64) for f in solution.params)
    assert exact_residual(x / size, np.asarray(a, np.float64) / size, y) < 1e-5 * np.sqrt(R)


@pytest.mark.parametrize("size", [1e12, 1e25])
def test_start_that_is_far_too_large_is_no_failure(size):
    a = psd()[0] * jnp.float32(size)
    problem = nys.problems.Symmetric(a)
    start = nys.initializers.nystrom(jax.random.key(1), a, R)  # AΩ, about √‖A‖ times too large
    step = nys.solvers.scaled_step(problem)
    assert nys.solvers.run(step, start, 1).status is Status.MAX_STEPS
    tol = 1e-5 * float(nys.numerics.norm(a))
    solution = nys.solvers.run_until(step, start, problem.residual, tol=tol)
    assert solution.status is Status.CONVERGED


def test_growth_from_a_small_start_to_the_solution_is_no_divergence():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    start = nys.initializers.small(jax.random.key(1), M, R, 1e-12)
    step = nys.solvers.gradient_step(problem, optax.sgd(0.5))
    solution = nys.solvers.run_until(step, start, problem.residual, 1e-3, 2000)
    assert solution.status is Status.CONVERGED
    # Without damping ScaledGD divides by the start, and halves what comes of it in each step.
    for tx in (nys.scaled_gd(0.5), nys.scale_by_gram()):
        step = nys.solvers.gradient_step(problem, optax.chain(tx, optax.scale(1.0)))
        assert nys.solvers.run(step, start, 1).status is Status.MAX_STEPS


@pytree_dataclass
class Plain:
    """A problem of somebody else: what `gradient_step` asks for and no more."""

    inner: object

    gradient = property(lambda self: self.inner.gradient)
    loss = property(lambda self: self.inner.loss)
    check = property(lambda self: self.inner.check)


def test_growth_is_no_divergence_where_the_size_of_solutions_is_not_known():
    problem = nys.problems.Symmetric(psd()[0])
    step = nys.solvers.gradient_step(Plain(problem), optax.sgd(0.5))
    start = nys.initializers.small(jax.random.key(1), M, R, 1e-12)
    solution = nys.solvers.run_until(step, start, problem.residual, 1e-3, 2000)
    assert solution.status is Status.CONVERGED


def test_infinite_measure_does_not_end_a_run_and_nan_does():
    a, _ = psd()
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a))
    start = nys.initializers.nystrom(jax.random.key(1), a, R)
    solution = nys.solvers.run_until(step, start, lambda x: jnp.inf * jnp.max(x**2), 1.0, 3)
    assert (solution.status, int(solution.num_steps)) == (Status.MAX_STEPS, 3)
    with pytest.raises(ValueError, match=r"NON_FINITE by step 0: .* the measure is NaN"):
        nys.solvers.run_until(step, start, lambda x: jnp.nan * x[0, 0], 1.0, 3)


def test_message_names_the_cause():
    a, _ = psd()
    gd = nys.solvers.gradient_step(nys.problems.Symmetric(a), optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"DIVERGED .* grew to 1/eps .* learning rate") as error:
        nys.solvers.run_until(gd, normal(0, (M, R)), lambda x: x[0, 0] ** 2, tol=0.0)
    assert "semidefinite" not in str(error.value)
    indefinite = nys.problems.Symmetric(a - 0.5 * jnp.eye(M))
    with pytest.raises(ValueError, match=r"INDEFINITE .* not positive semidefinite") as error:
        nys.solvers.run(nys.solvers.scaled_step(indefinite), normal(0, (M, R)), 3)
    assert "learning rate" not in str(error.value)


def test_a_measure_within_the_tolerance_does_not_make_a_failed_run_converged():
    step = nys.solvers.scaled_step(nys.problems.Symmetric(psd()[0] - 0.5 * jnp.eye(M)))
    solution = nys.solvers.run_until(
        step, normal(0, (M, R)), lambda x: 0 * x[0, 0], 1.0, throw=False
    )
    assert solution.status is Status.INDEFINITE


@pytest.mark.long
def test_a_matrix_that_is_a_little_indefinite_is_seen():
    with pytest.raises(ValueError, match="not positive semidefinite"):
        nys.initializers.nystrom(jax.random.key(0), psd()[0] - 3e-4 * jnp.eye(M), R + 1)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(psd()[0] - 3e-4 * jnp.eye(M)))
    assert step.status(step.init(normal(0, (M, R + 1)))) == Status.INDEFINITE
    step = nys.solvers.scaled_step(nys.problems.Symmetric(psd()[0]))
    assert step.status(step.init(normal(0, (M, R + 1)))) == Status.MAX_STEPS


@pytest.mark.long
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_a_semidefinite_matrix_is_not_called_indefinite_from_a_start_outside_its_range(size):
    a, basis = psd()
    outside = jnp.linalg.svd(basis)[0][:, R:]
    rounding = jnp.finfo(a.dtype).eps * normal(3, (M, M)) / M
    noisy = size * (a + rounding + rounding.T)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(noisy))
    for start in (outside[:, :1], outside[:, :R], outside[:, :R] + 1e-4 * basis):
        assert step.status(step.init(start)) == Status.MAX_STEPS


@pytest.mark.long
def test_tolerance_that_the_measure_meets_exactly_is_reached():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    step, start = nys.solvers.scaled_step(problem), normal(1, (M, R))
    first = nys.solvers.run(step, start, 2, problem.residual).history[1]
    solution = nys.solvers.run_until(step, start, problem.residual, tol=first)
    assert (solution.status, int(solution.num_steps)) == (Status.CONVERGED, 1)
    zero = nys.solvers.run_until(step, start, lambda x: 0 * x[0, 0], tol=0.0)
    assert (zero.status, int(zero.num_steps)) == (Status.CONVERGED, 0)


def test_zero_matrix_is_refused_and_a_small_one_is_not():
    nys.problems.Asymmetric(jnp.full((M, N), 1e-30))
    with pytest.raises(ValueError, match="is the zero matrix"):
        nys.problems.Asymmetric(jnp.zeros((M, N)))


def refused(message, *args, **kwargs):
    with pytest.raises(ValueError, match=message):  # without the tests' check of annotations
        inspect.unwrap(nys.solvers.run_until)(*args, **kwargs)


def test_measures_and_tolerances_that_are_no_real_numbers_are_refused():
    a, _ = psd()
    step, x = nys.solvers.scaled_step(nys.problems.Symmetric(a)), normal(1, (M, R))
    for measure, got in {
        (lambda x: x[0, 0] > 1): r"bool of shape \(\)",  # False is no distance of 0
        (lambda x: 1j * x[0, 0]): "complex64 of shape",
        (lambda x: x[0, :1]): r"float32 of shape \(1,\)",
        (lambda x: (x[0, 0],)): r"float32 of shape \(1,\)",
        (lambda x: None): "a NoneType",
    }.items():
        refused(f"the measure is {got}.*expected a real number", step, x, measure, 1e-3)
    for tol in (None, "tight", jnp.ones(1), 1j, True):
        refused("tol is .*expected a real number", step, x, jnp.sum, tol)
    solution = nys.solvers.run_until(step, x, lambda x: jnp.int32(3), 3, np.int64(2))
    assert solution.status is Status.CONVERGED


def test_what_is_in_another_s_place_is_named():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    step, x = nys.solvers.scaled_step(problem), normal(1, (M, R))
    for bad in (None, problem, optax.sgd(0.1)):
        refused("step is a .*; expected one of nyscaled.solvers", bad, x, jnp.sum, 1.0)
    refused("a GradientTransform.*has no params, no status;", optax.sgd(0.1), x, jnp.sum, 1.0)
    refused("the start is a NoneType", step, None, jnp.sum, 1.0)
    refused("measure is a float; expected a function", step, x, 1e-3, jnp.sum)
    for steps in (2**31, 10**30, True, 3.0, None):
        refused("max_steps is .*; expected an integer", step, x, jnp.sum, 1.0, steps)
    pair = nys.solvers.scaled_step(nys.problems.Asymmetric(a))
    refused("factors are an array; expected nyscaled.Factors", pair, x, jnp.sum, 1.0)


class Distance:
    """‖X − 1‖², without `check`."""

    def loss(self, x):
        return jnp.sum((x - 1) ** 2)

    def gradient(self, x):
        return 2 * (x - 1)


class CheckedDistance(Distance):
    """The same, not a pytree."""

    def check(self, x):
        return x


def test_a_problem_of_the_caller_is_refused_with_what_it_lacks():
    gradient_step = inspect.unwrap(nys.solvers.gradient_step)
    with pytest.raises(ValueError, match=r"problem is a Distance; expected .* and check"):
        gradient_step(Distance(), optax.sgd(0.1))
    step = gradient_step(CheckedDistance(), optax.sgd(0.1))
    refused(r"step.problem is a CheckedDistance; expected a pytree", step, jnp.ones(3), jnp.sum, 0)
    for make in (gradient_step, inspect.unwrap(nys.solvers.alternating_step)):
        with pytest.raises(ValueError, match="tx is a float; expected an optax transformation"):
            make(nys.problems.Asymmetric(psd()[0]), 0.1)
