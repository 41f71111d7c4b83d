"""precgd: ScaledGD(λ) with the λ of the loss, and the rates that this is for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import nyscaled as nys

M, R, P = 12, 4, 150
KEY = jax.random.key(0)


def pair():
    return nys.Factors(normal(1, (M, R)), normal(2, (9, R)))


@pytest.mark.parametrize("point", [normal(1, (M, R)), pair()], ids=["single", "pair"])
@pytest.mark.parametrize(("factor", "noise"), [(1.0, 0.0), (0.5, 0.3), (2.0, 5.0)])
def test_step_is_that_of_scaled_gd_with_the_damping_of_the_loss(point, factor, noise):
    grads = jax.tree.map(lambda x: x + 1, point)
    damping = factor * abs(1.7 - noise) ** 0.5
    expected = nys.scaled_gd(0.4, damping).update(grads, nys.scaled_gd(0.4).init(point), point)[0]
    tx = nys.precgd(0.4, factor, noise)
    actual = tx.update(grads, tx.init(point), point, value=1.7)[0]
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@pytest.mark.long
def test_solver_loop_passes_the_loss_of_the_current_iterate():
    problem, _ = nys.problems.sensing.gaussian(KEY, M, (1.0, 0.5), P)
    start, tx = normal(3, (M, R)), nys.precgd(0.5)
    actual = nys.solvers.run(nys.solvers.gradient_step(problem, tx), start, 3).params
    x, state = start, tx.init(start)
    for _ in range(3):
        loss, grads = jax.value_and_grad(problem.loss)(x)
        updates, state = tx.update(grads, state, x, value=loss)
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(actual, x, rtol=1e-4, atol=1e-5)


def test_schedules_outer_chains_and_low_precision():
    x = normal(1, (M, R)).astype(jnp.bfloat16)
    tx = optax.chain(optax.clip(10.0), nys.precgd(optax.constant_schedule(0.5)))
    updates, _ = tx.update(x, tx.init(x), x, value=1.0)
    assert updates.dtype == jnp.bfloat16
    plain = nys.precgd(0.5)
    expected, _ = plain.update(x, plain.init(x), x, value=1.0)
    np.testing.assert_allclose(updates.astype(float), expected.astype(float), rtol=1e-2)


def errors(tx, rank, steps, scale=1e-3, spectrum=(1.0, 0.1)):
    """‖XXᵀ − M‖_F from a small start with `rank` columns, for M of rank two."""
    problem, truth = nys.problems.sensing.gaussian(KEY, M, spectrum, P)
    full = nys.problems.Symmetric(truth @ truth.T)
    start = nys.initializers.small(jax.random.key(1), M, rank, scale)
    step = nys.solvers.gradient_step(problem, tx)
    return np.asarray(nys.solvers.run(step, start, steps, full.residual, throw=False).history)


@pytest.mark.long
def test_too_many_columns_leave_precgd_linear_and_make_the_others_slow_or_unstable():
    prec = errors(nys.precgd(0.5), R, 60)
    assert prec.max() < 1.1 * prec[0]
    assert prec[60] < 0.3 * prec[50] < 0.3**2 * prec[40] < 1e-4
    # Without damping the first step divides by the small start.
    assert errors(nys.scaled_gd(0.5), R, 1)[1] > 100 * prec[0]
    # With a constant one the error falls as 1/t: halving it takes twice the steps.
    damped = errors(nys.scaled_gd(0.5, 0.01), R, 200)
    assert 0.35 * damped[100] < damped[200] < 0.6 * damped[100]
    for slow in (damped, errors(optax.sgd(0.3), R, 60)):
        assert slow[60] > 100 * prec[60]


@pytest.mark.long
@pytest.mark.parametrize("kappa", [1.0, 10.0, 100.0])
def test_rate_does_not_depend_on_the_condition_number(kappa):
    actual = errors(nys.precgd(0.7), 2, 40, spectrum=(1.0, 1 / kappa))
    assert actual[40] < 1e-5


@pytest.mark.long
def test_noise_floor_is_reached_whether_or_not_its_level_is_known():
    problem, truth = nys.problems.sensing.gaussian(KEY, M, (1.0, 0.5), P, noise=0.1)
    start = nys.initializers.small(jax.random.key(1), M, R, 0.1)
    full = nys.problems.Symmetric(truth @ truth.T)
    for level in (0.0, 0.1**2 / 4):
        step = nys.solvers.gradient_step(problem, nys.precgd(0.5, noise_level=level))
        actual = nys.solvers.run(step, start, 100, full.residual).history[-1]
        # σ√(degrees of freedom / p), of R columns
        assert actual < 2 * 0.1 * np.sqrt((M * R) / P)


def test_value_of_a_missing_or_batched_loss_is_refused():
    x, tx = normal(1, (M, R)), nys.precgd(0.5)
    with pytest.raises(ValueError, match="value is None; expected the loss"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(ValueError, match=r"value is of shape \(3,\)"):
        tx.update(x, tx.init(x), x, value=jnp.ones(3))
    with pytest.raises(ValueError, match="params is None"):
        tx.update(x, tx.init(x), value=1.0)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((0.0,), "learning_rate is 0"),
        ((0.5, 0.0), "damping_scale is 0"),
        ((0.5, 1.0, -1.0), "noise_level is -1"),
    ],
)
def test_bad_constants_are_refused(args, expected):
    with pytest.raises(ValueError, match=expected):
        nys.precgd(*args)


def test_orphans_are_named_by_init():
    with pytest.raises(ValueError, match="lora_a"):
        nys.precgd(0.5).init({"lora_a": jnp.ones((3, 1))})


def test_derivatives_are_finite_at_a_loss_of_zero():
    x, tx = normal(1, (M, R)), nys.precgd(0.5)

    def moved(x, root_value):
        updates, _ = tx.update(x, tx.init(x), x, value=root_value**2, root_value=root_value)
        return jnp.sum(updates)

    for gradient in jax.jit(jax.grad(moved, (0, 1)))(x, jnp.float32(0.0)):
        assert bool(jnp.all(jnp.isfinite(gradient)))
