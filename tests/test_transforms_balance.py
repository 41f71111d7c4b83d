"""RefLoRA: the scaled gradients are those of balanced factors, and finite for all factors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, N, R, conditioned, normal

import nyscaled as nys


@functools.partial(jax.jit, static_argnames="scalar")
def scaled(params, grads, scalar=False):
    tx = nys.scale_by_balance(warmup_steps=0, scalar=scalar)
    return tx.update(grads, tx.init(params), params)[0]


def matrices(params, **kwargs):
    """S⁻¹ and S as the transform has them: unit gradients, scaled."""
    grads = jax.tree.map(lambda x: jnp.eye(*x.shape), params)
    actual = scaled(params, grads, **kwargs)
    return tuple(np.asarray(x[: x.shape[1]], np.float64) for x in actual)


def power(a, p):
    values, vectors = np.linalg.eigh(a)
    return (vectors * values**p) @ vectors.T


def mean(a, b):
    """The geometric mean A # B, by its definition."""
    root, inverse = power(a, 0.5), power(a, -0.5)
    return root @ power(inverse @ b @ inverse, 0.5) @ root


@pytest.mark.parametrize("kappa", [3.0, 1e3])
def test_gradients_are_scaled_by_the_geometric_mean_to_rounding(kappa):
    """Through Gram matrices in float32 the second case would have no digit."""
    x, y = conditioned(1, M, R, kappa), 2 * conditioned(2, N, R, 3.0)
    x, y = x.astype(np.float32), y.astype(np.float32)
    gram_x, gram_y = (np.asarray(f, np.float64).T @ f for f in (x, y))
    inverse, s = matrices(nys.Factors(jnp.asarray(x), jnp.asarray(y)))
    expected = mean(np.linalg.inv(gram_x), gram_y)
    for actual, exact, bound in (
        (s, expected, 1e-5),
        (inverse, np.linalg.inv(expected), 1e-5),
        (s @ gram_x @ s, gram_y, 1e-6 * kappa),
    ):
        assert np.linalg.norm(actual - exact) < bound * np.linalg.norm(exact)


def test_the_mean_balances_the_factors():
    x, y = normal(1, (M, R)), 5 * normal(2, (N, R))
    _, s = matrices(nys.Factors(x, y))
    p = np.linalg.cholesky((s + s.T) / 2)
    left, right = np.asarray(x) @ p, np.asarray(y) @ np.linalg.inv(p).T
    np.testing.assert_allclose(left.T @ left, right.T @ right, rtol=1e-4, atol=1e-3)


def test_the_change_of_the_product_does_not_depend_on_the_factors_it_is_given_as():
    """GL(R): X → XT, Y → YT⁻ᵀ leaves X Yᵀ, and its first-order change, where they were."""
    x, y, g = normal(1, (M, R)), normal(2, (N, R)), normal(3, (M, N))
    t = conditioned(4, R, R, 10.0, np.float32)

    def change(x, y, **kwargs):
        actual = scaled(nys.Factors(x, y), nys.Factors(g @ y, g.T @ x), **kwargs)
        return actual.left @ y.T + x @ actual.right.T

    moved = x @ t, y @ np.linalg.inv(t).T
    np.testing.assert_allclose(change(*moved), change(x, y), atol=2e-4 * jnp.max(change(x, y)))
    assert jnp.max(jnp.abs(change(*moved, scalar=True) - change(x, y, scalar=True))) > 1


def test_scalar_form_is_the_ratio_of_norms():
    x, y = normal(1, (M, R)), 5 * normal(2, (N, R))
    ratio = float(jnp.linalg.norm(y) / jnp.linalg.norm(x))
    inverse, s = matrices(nys.Factors(x, y), scalar=True)
    np.testing.assert_allclose(s, ratio * np.eye(R), rtol=1e-6)
    np.testing.assert_allclose(inverse, np.eye(R) / ratio, rtol=1e-6)


@pytest.mark.parametrize("alias", [nys.reflora, nys.reflora_s])
def test_the_first_updates_are_those_of_the_optimizer(alias):
    params = nys.Factors(normal(1, (M, R)), 3 * normal(2, (N, R)))
    tx = alias(optax.sgd(1.0), warmup_steps=2)
    update, state = jax.jit(tx.update), tx.init(params)
    grads = jax.tree.map(lambda x: -x, params)
    for _ in range(2):
        actual, state = update(grads, state, params)
        chex.assert_trees_all_equal(actual, params)
    actual, state = update(grads, state, params)
    expected = scaled(params, params, scalar=alias is nys.reflora_s)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(actual.left, params.left, rtol=0.1)


def test_a_zero_factor_scales_nothing_and_a_deficient_one_has_the_scalar_form():
    x, y = normal(1, (M, R)), normal(2, (N, R))
    grads = nys.Factors(normal(3, (M, R)), normal(4, (N, R)))
    for zero in (nys.Factors(x, 0 * y), nys.Factors(0 * x, y), nys.Factors(0 * x, 0 * y)):
        chex.assert_trees_all_equal(scaled(zero, grads), grads)
        chex.assert_trees_all_equal(scaled(zero, grads, scalar=True), grads)
    repeated = y[:, [0, 0, *range(2, R)]]
    for deficient in (repeated, y.at[:, 1].set(0), y.at[:, 1].set(1e-12)):
        params = nys.Factors(x, deficient)
        chex.assert_trees_all_close(scaled(params, grads), scaled(params, grads, scalar=True))


def test_negative_warmup_raises():
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        nys.reflora(optax.sgd(1.0), warmup_steps=-1)


@pytest.mark.parametrize(
    "tx",
    [
        nys.reflora(optax.sgd(1.0)),
        nys.reflora_s(optax.sgd(1.0)),
        optax.chain(nys.scale_by_balance(), optax.sgd(1.0)),
    ],
    ids=["reflora", "reflora_s", "scale_by_balance"],
)
def test_default_warmup_passes_a_hundred_gradients_through(tx):
    params = nys.Factors(3 * normal(1, (M, R)), normal(2, (N, R)))
    grads = nys.Factors(normal(3, (M, R)), normal(4, (N, R)))

    @jax.jit
    def after(count):
        state = tx.init(params)
        step = lambda _, state: tx.update(grads, state, params)[1]  # noqa: E731
        return tx.update(grads, jax.lax.fori_loop(0, count, step, state), params)[0]

    raw = jax.tree.map(jnp.negative, grads)
    chex.assert_trees_all_equal(after(99), raw)
    change = after(100).left - raw.left
    assert jnp.linalg.norm(change) > 0.1 * jnp.linalg.norm(raw.left)
