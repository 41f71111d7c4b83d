"""Gram preconditioners: updates are the formulas of the paper; specs say what a leaf is."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, N, R, normal, psd, rectangular

import nyscaled as nys
from nyscaled import FactorSpec


def updates(tx, grads, params):
    return tx.update(grads, tx.init(params), params)[0]


def inverse_gram(x, damping=0.0):
    x = np.asarray(x, np.float64)
    return np.linalg.inv(x.T @ x + damping * np.eye(x.shape[1]))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_single_factor_is_scaled_by_its_own_gram_matrix(damping):
    x, g = normal(1, (M, R)), normal(2, (M, R))
    actual = updates(nys.scale_by_gram(damping), g, x)
    np.testing.assert_allclose(actual, g @ inverse_gram(x, damping), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_each_factor_of_a_pair_is_scaled_by_the_gram_matrix_of_the_other(damping):
    x, y = normal(1, (M, R)), normal(2, (N, R))
    gx, gy = normal(3, (M, R)), normal(4, (N, R))
    expected = nys.Factors(gx @ inverse_gram(y, damping), gy @ inverse_gram(x, damping))
    actual = updates(nys.scale_by_gram(damping), nys.Factors(gx, gy), nys.Factors(x, y))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    lora = updates(
        nys.scale_by_gram(damping),
        {"lora_a": gx, "lora_b": gy.T},
        {"lora_a": x, "lora_b": y.T},
    )
    chex.assert_trees_all_close(
        lora, {"lora_a": expected.left, "lora_b": expected.right.T}, rtol=1e-4, atol=1e-6
    )


def test_scaled_gd_is_the_scaled_gradient_times_minus_the_learning_rate():
    x, g = normal(1, (M, R)), normal(2, (M, R))
    expected = -0.3 * updates(nys.scale_by_gram(0.1), g, x)
    np.testing.assert_allclose(updates(nys.scaled_gd(0.3, 0.1), g, x), expected, rtol=1e-5)


def test_pseudo_inverse_form_is_the_pseudo_inverse_of_a_deficient_factor():
    x = normal(1, (M, R)) @ normal(2, (R, R + 3))
    g = normal(3, (M, R)) @ normal(2, (R, R + 3))
    wide = np.asarray(x, np.float64)
    expected = g @ np.linalg.pinv(wide.T @ wide, rcond=1e-8)
    actual = updates(nys.scale_by_gram_pinv(), g, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_pseudo_inverse_keeps_small_columns_that_are_not_rounding():
    x, g = jnp.eye(M)[:, :2] * jnp.array([1.0, 1e-5]), normal(3, (M, 2))
    np.testing.assert_allclose(
        updates(nys.scale_by_gram_pinv(), g, x), g * jnp.array([1.0, 1e10]), rtol=1e-4
    )


@pytest.mark.parametrize("pseudo_inverse", [False, True])
def test_left_factor_does_not_move_while_the_right_one_is_zero(pseudo_inverse):
    a, _, _ = rectangular()
    problem = nys.problems.Asymmetric(a)
    start = nys.initializers.nystrom_factors(jax.random.key(0), a, R)
    tx = nys.scaled_gd(1.0, pseudo_inverse=pseudo_inverse)
    step = updates(tx, problem.gradient(start), start)
    chex.assert_trees_all_equal(step.left, jnp.zeros((M, R)))
    np.testing.assert_allclose(start.left @ step.right.T, a, atol=1e-5)  # Theorem 3


@pytest.mark.long
def test_over_parametrized_gradient_descent_converges_with_the_pseudo_inverse():
    a, _ = psd()
    problem = nys.problems.Symmetric(a)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, R + 3)
    step = nys.solvers.gradient_step(problem, nys.scaled_gd(0.5, pseudo_inverse=True))
    errors = nys.solvers.run(step, x0, 15, problem.residual).history
    assert errors[-1] < 1e-5 < errors[0]


@pytest.mark.long
def test_spec_may_put_the_axes_anywhere():
    """Heads as a batch axis in the middle, the long side split over two axes, rank first."""
    a, b = normal(1, (2, 5, 3, 4)), normal(2, (7, 3, 2))
    ga, gb = normal(3, (2, 5, 3, 4)), normal(4, (7, 3, 2))
    spec = {
        "down": FactorSpec(pair="p", rank_axis=0, batch_axes=(2,)),
        "up": FactorSpec(pair="p", rank_axis=2, batch_axes=(1,)),
    }
    actual = updates(nys.scale_by_gram(spec=spec), {"down": ga, "up": gb}, {"down": a, "up": b})
    for head in range(3):
        x, gx = (jnp.moveaxis(t[:, :, head], 0, -1).reshape(20, 2) for t in (a, ga))
        y, gy = b[:, head], gb[:, head]
        wanted_x = jnp.moveaxis((gx @ inverse_gram(y)).reshape(5, 4, 2), -1, 0)
        np.testing.assert_allclose(actual["down"][:, :, head], wanted_x, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            actual["up"][:, head], gy @ inverse_gram(x), rtol=1e-3, atol=1e-5
        )


def test_leaves_without_a_spec_pass_through():
    params = {"x": normal(1, (M, R)), "bias": jnp.ones(3)}
    grads = {"x": normal(2, (M, R)), "bias": jnp.full(3, 2.0)}
    tx = nys.scale_by_gram(spec={"x": FactorSpec(), "bias": None})
    actual = updates(tx, grads, params)
    chex.assert_trees_all_equal(actual["bias"], grads["bias"])
    chex.assert_trees_all_close(actual["x"], updates(nys.scale_by_gram(), grads["x"], params["x"]))


def test_default_spec_reads_names():
    x, y = jnp.ones((4, 2)), jnp.ones((2, 3))
    spec = nys.default_spec({"layer": {"lora_a": x, "lora_b": y}, "other": jnp.ones((5, 4, 2))})
    assert spec["layer"]["lora_a"].pair == spec["layer"]["lora_b"].pair is not None
    assert (spec["layer"]["lora_a"].rank_axis, spec["layer"]["lora_b"].rank_axis) == (-1, -2)
    assert spec["other"] == FactorSpec(batch_axes=(0,))


def test_bfloat16_factors_are_preconditioned_in_float32():
    x, g = normal(1, (M, R)), normal(2, (M, R))
    x16, g16 = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    actual = updates(nys.scale_by_gram(), g16, x16)
    expected = np.asarray(g16, np.float64) @ inverse_gram(x16)
    # One rounding to bfloat16, at the end.
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-6)


def algorithm_2(gradients, x, y, t, damping):
    """Lines 5 to 8 of Algorithm 2, in plain NumPy and float64."""
    gx, gy = (np.asarray(g, np.float64) for g in gradients)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    eye = damping * np.eye(x.shape[1])
    if t > 0:
        inverse = np.linalg.inv(y.T @ y + eye)
        gx = gx @ inverse / np.linalg.norm(inverse)
    inverse = np.linalg.inv(x.T @ x + eye)
    return gx, gy @ inverse / np.linalg.norm(inverse)


@pytest.mark.parametrize("zero_start", [True, False])
def test_nora_plus_is_algorithm_2(zero_start):
    x, y = normal(1, (9, 3)), normal(2, (7, 3))
    y = 0 * y if zero_start else y
    tx = nys.nora_plus(optax.sgd(0.3), damping=1e-6)
    params = {"lora_a": x, "lora_b": y.T, "bias": normal(3, (7,))}
    state = tx.init(params)
    for t in range(3):
        grads = {k: normal(10 + t, v.shape) for k, v in params.items()}
        if zero_start and t == 0:
            grads["lora_a"] = 0 * grads["lora_a"]
        given = grads["lora_a"], grads["lora_b"].T
        expected = algorithm_2(given, params["lora_a"], params["lora_b"].T, t, 1e-6)
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(updates["lora_a"], -0.3 * expected[0], rtol=2e-4, atol=2e-6)
        np.testing.assert_allclose(updates["lora_b"].T, -0.3 * expected[1], rtol=2e-4, atol=2e-6)
        np.testing.assert_allclose(updates["bias"], -0.3 * grads["bias"], rtol=1e-6)
        params = optax.apply_updates(params, updates)


def test_nora_plus_keeps_the_gradient_of_the_started_factor_on_either_side():
    """With the zero factor first, it is the second whose gradient passes in the first update."""
    params = {"lora_a": jnp.zeros((9, 3)), "lora_b": normal(2, (3, 7))}
    grads = {"lora_a": normal(3, (9, 3)), "lora_b": normal(4, (3, 7))}
    tx = nys.scale_by_normalized_gram()
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["lora_b"], grads["lora_b"])
    assert not np.allclose(updates["lora_a"], grads["lora_a"])
    updates, _ = tx.update(grads, state, params)  # the partner is still zero: M = λI
    np.testing.assert_allclose(updates["lora_b"], grads["lora_b"] / 3**0.5, rtol=1e-5)


def test_nora_plus_names_an_orphan_and_requires_positive_damping():
    with pytest.raises(ValueError, match="lora_a"):
        nys.nora_plus(optax.sgd(1.0)).init({"q": {"lora_a": jnp.ones((4, 2))}})
    with pytest.raises(ValueError, match="damping"):
        nys.nora_plus(optax.sgd(1.0), damping=0.0)


@pytest.mark.long
def test_default_dampings_are_those_of_the_papers():
    # Columns so small that the damping decides.
    x, y = 1e-3 * normal(1, (M, R)), 1e-3 * normal(2, (N, R))
    gx, gy = normal(3, (M, R)), normal(4, (N, R))
    params, grads = nys.Factors(x, y), nys.Factors(gx, gy)
    gram_y, gram_x = inverse_gram(y, 1e-6), inverse_gram(x, 1e-6)
    expected = nys.Factors(
        -gx @ gram_y / np.linalg.norm(gram_y), -gy @ gram_x / np.linalg.norm(gram_x)
    )
    plain = optax.chain(nys.scale_by_normalized_gram(), optax.sgd(1.0))
    for tx in (nys.nora_plus(optax.sgd(1.0)), plain):
        _, state = tx.update(grads, tx.init(params), params)
        actual, _ = tx.update(grads, state, params)
        chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-5)
    actual = updates(nys.lora_p(optax.sgd(1.0)), grads, nys.Factors(30 * x, 30 * y))
    expected = nys.Factors(-gx @ inverse_gram(30 * y, 1e-2), -gy @ inverse_gram(30 * x, 1e-2))
    chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_factor_with_fewer_rows_than_its_rank_has_a_pseudo_inverse_and_is_else_refused():
    """As an adapter of rank 6 on a layer of 4 outputs has."""
    x, y = normal(1, (M, 6)), normal(2, (4, 6))
    grads = nys.Factors(normal(3, (M, 6)), normal(4, (4, 6)))
    actual = updates(nys.scale_by_gram_pinv(), grads, nys.Factors(x, y))
    wide = np.asarray(y, np.float64)
    expected = grads.left @ np.linalg.pinv(wide.T @ wide, rcond=1e-8)
    np.testing.assert_allclose(actual.left, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(actual.right, grads.right @ inverse_gram(x), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"leaf .right .*4 rows for a rank of 6"):
        nys.scaled_gd(0.5).init(nys.Factors(x, y))
    nys.scaled_gd(0.5, damping=0.1).init(nys.Factors(x, y))


@pytest.mark.long
@pytest.mark.parametrize(("m", "n", "r", "rank"), [(2, 5, 3, 1), (3, 5, 4, 2), (2, 2, 5, 2)])
def test_pseudo_inverses_of_factors_of_fewer_rows_and_of_less_rank(m, n, r, rank):
    common = normal(0, (rank, r))
    pair = nys.Factors(normal(1, (m, rank)) @ common, normal(2, (n, rank)) @ common)
    grads = nys.Factors(normal(3, (m, r)), normal(4, (n, r)))
    tx = nys.scale_by_gram_pinv()
    updates, _ = tx.update(grads, tx.init(pair), pair)
    for found, g, partner in zip(updates, grads, (pair.right, pair.left), strict=True):
        y = np.asarray(partner, np.float64)
        exact = np.asarray(g, np.float64) @ np.linalg.pinv(y.T @ y, rcond=1e-8)
        np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())


def test_the_pseudo_inverse_of_one_factor_of_fewer_rows():
    x, g = normal(0, (2, 4)), normal(1, (2, 4))
    tx = nys.scale_by_gram_pinv()
    found, _ = tx.update(g, tx.init(x), x)
    y = np.asarray(x, np.float64)
    exact = np.asarray(g, np.float64) @ np.linalg.pinv(y.T @ y, rcond=1e-8)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())
