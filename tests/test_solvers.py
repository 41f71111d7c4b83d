"""solvers: steps converge as the theorems say, keep float32's digits, compile once, end typed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMS, M, N, R, exact_residual, normal, psd, rectangular
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.tree_util import Partial

import nyscaled as nys

seeds = st.integers(0, 2**31 - 1)


def solve(a, x0, num_steps, learning_rate=0.5, **kwargs):
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), learning_rate, **kwargs)
    return nys.solvers.run(step, x0, num_steps).params


# --- What the theorems promise -------------------------------------------------------------------


def test_symmetric_step_is_the_papers_update():
    a, _ = psd()
    x = normal(1, (M, R))
    gram = np.linalg.inv(np.asarray(x, np.float64).T @ x)
    expected = 0.7 * x + 0.3 * np.asarray(a, np.float64) @ x @ gram
    np.testing.assert_allclose(solve(a, x, 1, 0.3), expected, rtol=1e-4, atol=1e-5)


def test_damped_symmetric_step_is_the_damped_update():
    a, _ = psd()
    x, lam = normal(1, (M, R)), 0.3
    wide = np.asarray(x, np.float64)
    gram = np.linalg.inv(wide.T @ wide + lam * np.eye(R))
    expected = wide - 0.5 * (wide @ wide.T - a) @ wide @ gram
    np.testing.assert_allclose(solve(a, x, 1, damping=lam), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_asymmetric_step_updates_both_factors_from_the_old_ones(damping):
    a, _, _ = rectangular()
    x, y = normal(1, (M, R)), normal(2, (N, R))
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 0.5, damping)
    found = nys.solvers.run(step, nys.Factors(x, y), 1).params
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
    rest, lam = x64 @ y64.T - a, damping * np.eye(R)
    expected = nys.Factors(
        x64 - 0.5 * rest @ y64 @ np.linalg.inv(y64.T @ y64 + lam),
        y64 - 0.5 * rest.T @ x64 @ np.linalg.inv(x64.T @ x64 + lam),
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [R, R + 3])
def test_asymmetric_problem_is_solved_in_one_step_at_full_step_size(rank):
    a, _, _ = rectangular()
    start = nys.initializers.nystrom_factors(jax.random.key(1), a, rank)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 1.0)
    x, y = nys.solvers.run(step, start, 1).params
    assert exact_residual(x, a, y) < 3e-6
    np.testing.assert_allclose(x, start.left, atol=1e-5)  # X_1 = X_0, (6a)


def test_convergence_is_quadratic_from_nystrom_and_linear_from_a_small_start():
    a, basis = psd()
    problem = nys.problems.Symmetric(a)
    spectrum = jnp.array([1.0, 0.8, 0.5, 0.2])
    record = Partial(lambda q, s, x: nys.optimality.residual_in_basis(x, q, s), basis, spectrum)
    step = nys.solvers.scaled_step(problem, 0.5)
    quick = nys.initializers.nystrom(jax.random.key(1), a, R)
    slow = nys.initializers.small(jax.random.key(1), M, R, scale=1.0)
    quick, slow = (np.asarray(nys.solvers.run(step, x, 40, record).history) for x in (quick, slow))
    first = int(np.argmax(quick < 1e-1))
    assert quick[first + 3] < 3e-6  # 1e-1, 1e-2, 1e-4, rounding
    ratio = slow[11:16] / slow[10:15]
    np.testing.assert_allclose(ratio, 0.5, rtol=0.02)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("rank", [R - 2, R, R + 3])
@given(seed=seeds)
def test_fused_step_is_equivariant_under_rotations(rank, seed):
    a, _ = psd()
    u = jax.random.orthogonal(jax.random.key(seed), M)
    v = jax.random.orthogonal(jax.random.key(seed // 2), rank)
    x = nys.initializers.nystrom(jax.random.key(1), a, rank)
    rotated = u @ a @ u.T
    found = solve((rotated + rotated.T) / 2, u @ x @ v, 3)
    expected = u @ solve(a, x, 3) @ v
    # Over-parametrized, X is compared through XXᵀ: its small directions are those of rounding.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)
    if rank <= R:
        np.testing.assert_allclose(found, expected, atol=1e-3)


# --- Accuracy in float32 -------------------------------------------------------------------------


def ill_conditioned(kappa):
    return np.append(np.linspace(1.0, 0.82, 19), 1 / kappa)


def inverse_gram_run(a, x, num_steps):
    """The update as textbooks write it."""

    def body(_, x):
        return 0.5 * x + 0.5 * (a @ x) @ jnp.linalg.inv(x.T @ x)

    return lax.fori_loop(0, num_steps, body, x)


@pytest.mark.long
@pytest.mark.parametrize("kappa", [1e2, 1e3, 1e4, 1e5])
def test_float32_floor_does_not_depend_on_the_condition_number(kappa):
    a, _ = psd(int(kappa), ill_conditioned(kappa), m=1000)
    for seed in range(3):
        x0 = nys.initializers.nystrom(jax.random.key(seed), a, 20)
        assert exact_residual(solve(a, x0, 40), a) <= 2e-6


def test_inverse_gram_update_loses_the_digits_that_the_fused_step_keeps():
    a, _ = psd(100000, ill_conditioned(1e5), m=1000)
    x0 = nys.initializers.nystrom(jax.random.key(0), a, 20)
    assert exact_residual(jax.jit(inverse_gram_run, static_argnums=2)(a, x0, 40), a) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize(("kappa", "num_steps"), [(1e2, 1000), (1e4, 1000), (1e5, 10_000)])
def test_over_parametrized_run_stays_at_the_float32_floor(kappa, num_steps):
    a, _ = psd(1, ill_conditioned(kappa), m=300)
    x0 = nys.initializers.nystrom(jax.random.key(2), a, 60)
    x = solve(a, x0, num_steps)
    assert x.shape == (300, 60)
    assert exact_residual(x, a) <= 3e-6


@pytest.mark.long
@pytest.mark.parametrize(("kappa", "num_steps"), [(1e2, 1000), (1e5, 1000)])
def test_over_parametrized_asymmetric_run_stays_at_the_float32_floor(kappa, num_steps):
    a, _, _ = nys.spectra.rectangular(jax.random.key(1), 300, 200, ill_conditioned(kappa))
    start = nys.initializers.nystrom_factors(jax.random.key(2), a, 60)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 0.5)
    x, y = nys.solvers.run(step, start, num_steps).params
    assert exact_residual(x, a, y) <= 3e-6


# --- Compilation and memory ----------------------------------------------------------------------


def test_a_second_run_on_another_matrix_does_not_compile():
    traces = []

    def record(x):
        traces.append(None)  # runs only while tracing
        return jnp.sum(x)

    def once(seed, learning_rate):
        a, _ = psd(seed)
        x0 = nys.initializers.nystrom(jax.random.key(seed), a, R)
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), learning_rate)
        nys.solvers.run(step, x0, 7, record)
        nys.solvers.run_until(step, x0, record, tol=0.0, max_steps=seed + 3)

    once(0, 0.5)
    compiled = len(traces)
    assert compiled > 0
    once(1, 0.4)
    assert len(traces) == compiled


def test_methods_of_a_problem_as_record_do_not_compile_again():
    step = nys.solvers.gradient_step
    tx = nys.scaled_gd(0.5)
    sizes = []
    for seed in range(3):
        a, _ = psd(seed)
        problem = nys.problems.Symmetric(a)
        x0 = nys.initializers.nystrom(jax.random.key(seed), a, R)
        nys.solvers.run(step(problem, tx), x0, 7, problem.loss)
        sizes.append(nys.solvers.loops._scan._cache_size())
    assert sizes[1] == sizes[2]


@pytest.mark.parametrize("form", ["dense", "operator"])
def test_loop_holds_no_matrix_as_large_as_a(form):
    m, r = 1000, 20

    def loop(a, x):
        step = nys.solvers.scaled_step(nys.problems.Symmetric(FORMS[form](a)), 0.5)
        state, _ = lax.scan(lambda s, _: (step.update(s), None), step.init(x), length=40)
        return step.params(state)

    shapes = jax.ShapeDtypeStruct((m, m), jnp.float32), jax.ShapeDtypeStruct((m, r), jnp.float32)
    memory = jax.jit(loop).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * m * m * 4


# --- Rank decisions ------------------------------------------------------------------------------


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(("m", "true_rank"), [(12, 9), (8, 5)])
def test_init_cuts_the_zero_directions_of_ill_conditioned_starts_too(m, true_rank):
    """QᵀΩ is nearly singular at times, and then the noise of X_0 points into range(A)."""

    def live(key):
        a, _ = nys.spectra.psd(key, m, jnp.geomspace(1.0, 0.5, true_rank))
        x0 = nys.initializers.nystrom(jax.random.fold_in(key, 1), a, m)
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a))
        return jnp.sum(jnp.any(step.init(x0).factors != 0, axis=0))

    counts = jax.jit(jax.vmap(live))(jax.random.split(jax.random.key(0), 400))
    np.testing.assert_array_equal(counts, true_rank)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(("rank", "live"), [(R - 2, R - 2), (R, R), (R + 3, R)])
def test_init_cuts_the_zero_directions_of_an_over_parametrized_start_only(rank, live):
    a, _ = psd()
    x0 = nys.initializers.nystrom(jax.random.key(1), a, rank)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    state = step.init(x0)
    assert int(jnp.sum(jnp.any(state.factors != 0, axis=0))) == live
    np.testing.assert_allclose(step.params(state), x0, atol=1e-5)
    undamped = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5, damping=0.1).init(x0)
    chex.assert_trees_all_equal(undamped.factors, x0)


def test_default_step_size_is_the_quadratic_one():
    assert nys.solvers.scaled_step(nys.problems.Symmetric(jnp.eye(3))).learning_rate == 0.5


def test_direction_that_is_tiny_in_the_start_but_large_in_a_is_not_cut():
    a, _ = psd()
    x0 = normal(1, (M, R)) * jnp.array([1.0, 1.0, 1.0, 1e-9])
    x = solve(a, x0, 60)
    assert exact_residual(x, a) < 1e-4


def test_alternating_step_uses_the_new_left_factor():
    a, _, _ = rectangular()
    problem = nys.problems.Asymmetric(a)
    start = nys.Factors(normal(1, (M, R)), normal(2, (N, R)))
    step = nys.solvers.alternating_step(problem, optax.sgd(0.01))
    found = nys.solvers.run(step, start, 1).params
    x = start.left - 0.01 * problem.gradient(start).left
    y = start.right - 0.01 * problem.gradient(nys.Factors(x, start.right)).right
    chex.assert_trees_all_close(found, nys.Factors(x, y), rtol=1e-4, atol=1e-5)


def test_alternating_gradient_descent_converges_from_its_own_start():
    a, _, _ = rectangular()
    problem = nys.problems.Asymmetric(a)
    start = nys.initializers.altgd(jax.random.key(0), a, 2 * R, norm=1.0)
    rate = nys.solvers.altgd_learning_rate(1.0)
    step = nys.solvers.alternating_step(problem, optax.sgd(rate))
    errors = np.asarray(nys.solvers.run(step, start, 400, problem.residual).history)
    assert errors[-1] < 0.02 * errors[0]


@pytest.mark.parametrize("pairs", [True, False])
def test_lbfgs_searches_along_its_direction(pairs):
    a, _ = psd()
    if pairs:
        problem, start = (
            nys.problems.Asymmetric(a),
            nys.Factors(normal(1, (M, R)), normal(2, (M, R))),
        )
    else:
        problem, start = nys.problems.Symmetric(a), normal(1, (M, R))
    step = nys.solvers.gradient_step(problem, optax.lbfgs())
    losses = np.asarray(nys.solvers.run(step, start, 60, problem.loss).history)
    assert losses[-1] < 1e-3 * losses[0]
    assert np.all(losses[1:] <= losses[:-1] + 1e-6 * losses[0])


# --- Forms of A ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("form", ["bcoo", "operator"])
@pytest.mark.parametrize("kind", ["scaled", "gradient"])
def test_runs_agree_for_every_form_of_a_symmetric_matrix(form, kind):
    a, _ = psd()
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R)

    def final(a):
        problem = nys.problems.Symmetric(a)
        if kind == "scaled":
            step = nys.solvers.scaled_step(problem, 0.5)
        else:
            step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
        return nys.solvers.run(step, x0, 4, problem.loss)

    found, expected = final(FORMS[form](a)), final(a)
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.history, expected.history, rtol=1e-3, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("form", ["bcoo", "operator"])
@pytest.mark.parametrize("kind", ["scaled", "gradient", "alternating"])
def test_runs_agree_for_every_form_of_a_rectangular_matrix(form, kind):
    a, _, _ = rectangular()
    start = nys.Factors(normal(1, (M, R)), normal(2, (N, R)))

    def final(a):
        problem = nys.problems.Asymmetric(a)
        if kind == "scaled":
            step = nys.solvers.scaled_step(problem, 0.5)
        elif kind == "gradient":
            step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5))
        else:
            step = nys.solvers.alternating_step(problem, optax.sgd(0.005))
        return nys.solvers.run(step, start, 4, problem.loss)

    found, expected = final(FORMS[form](a)), final(a)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.history, expected.history, rtol=1e-3, atol=1e-6)
