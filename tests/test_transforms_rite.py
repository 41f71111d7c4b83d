"""LoRA-RITE: the published rule, and its independence of the factors of a product."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from test_contracts import PARAMS, gradients

import nyscaled as nys

M, N, R, STEPS = 12, 9, 3, 6
RATE, B1, B2 = 0.05, 0.8, 0.9
TARGET = np.asarray(normal(0, (M, N)), np.float64)
MIX = np.array([[2.0, 0.5, 0.0], [0.0, 0.4, 0.3], [0.7, 0.0, 1.5]])


def gradient(a, b):
    """Of ¼‖ABᵀ − T‖⁴ in the product, whose size changes from step to step."""
    error = a @ b.T - TARGET
    return np.sum(error**2) * error


def factors(kind="full"):
    a, b = (np.asarray(normal(s, (side, R)), np.float64) for s, side in ((1, M), (2, N)))
    return a, b * (0.0 if kind == "zero" else 1.0)


class Transcription:
    """The algorithm in NumPy, in float64, with QR factorizations and plain inverses."""

    def __init__(self, m, n):
        self.basis = np.zeros((n, R))
        self.v, self.rho, self.moment, self.t = np.zeros((R, R)), 0.0, np.zeros((m, R)), 0

    def __call__(self, grad, partner):
        self.t += 1
        decays = [b * (1 - b ** (self.t - 1)) / (1 - b**self.t) for b in (B1, B2)]
        u, r = np.linalg.qr(partner) if partner.any() else (np.zeros_like(partner), None)
        inverse = np.zeros((R, R)) if r is None else np.linalg.inv(r)
        plain, turn = grad @ inverse, u.T @ self.basis
        turned = turn @ self.v @ turn.T
        lost = np.abs(np.linalg.eigvalsh(self.v) - np.linalg.eigvalsh(turned)).max()
        self.v = decays[1] * turned + (1 - decays[1]) * plain.T @ plain / len(grad)
        self.rho = decays[1] * (self.rho + lost)
        total = self.v + self.rho * np.eye(R)
        if total.any():
            values, q = np.linalg.eigh(total)
            scaled = plain @ (q / np.sqrt(values)) @ q.T
        else:
            scaled = 0 * plain
        self.moment = decays[0] * self.moment @ turn.T + (1 - decays[0]) * scaled
        self.basis = u
        return -RATE * self.moment @ inverse.T


def transcribed(a, b):
    """The products A Bᵀ of the transcription's steps."""
    of_a, of_b = Transcription(M, N), Transcription(N, M)
    products = []
    for _ in range(STEPS):
        g = gradient(a, b)
        a, b = a + of_a(g @ b, b), b + of_b(g.T @ a, a)
        products.append(a @ b.T)
    return products


def products(a, b, spec=None):
    """The products A Bᵀ of the library's steps, from gradients in float64."""
    tx = nys.lora_rite(RATE, B1, B2)
    params = nys.Factors(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for _ in range(STEPS):
        a, b = (np.asarray(x, np.float64) for x in params)
        g = gradient(a, b)
        grads = nys.Factors(jnp.asarray(g @ b, jnp.float32), jnp.asarray(g.T @ a, jnp.float32))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(np.asarray(params.left, np.float64) @ np.asarray(params.right).T)
    return history


@pytest.mark.parametrize("kind", ["full", "zero"])
def test_steps_are_those_of_the_published_rule(kind):
    actual, expected = products(*factors(kind)), transcribed(*factors(kind))
    assert np.abs(expected[-1] - expected[0]).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["full", "zero"])
def test_steps_of_the_product_do_not_depend_on_its_factors(kind):
    a, b = factors(kind)
    mixed = products(a @ MIX, b @ np.linalg.inv(MIX).T)
    np.testing.assert_allclose(mixed, products(a, b), atol=2e-3)


def test_adam_does_depend_on_the_factors():
    """The control: the same steps by Adam."""

    def moved(a, b):
        tx = optax.adam(RATE)
        g = gradient(a, b)
        grads = (g @ b, g.T @ a)
        (da, db), _ = tx.update(grads, tx.init(grads))
        return (a + da) @ (b + db).T - a @ b.T

    a, b = factors()
    assert np.abs(moved(a @ MIX, b @ np.linalg.inv(MIX).T) - moved(a, b)).max() > 0.05


@pytest.mark.long
def test_gradients_of_another_size_give_the_same_steps():
    params = PARAMS["factors"]()
    tx = nys.lora_rite(RATE)

    def two_steps(scale):
        state = tx.init(params)
        for seed in (1, 2):
            grads = jax.tree.map(lambda g: scale * g, gradients(params, seed))
            updates, state = tx.update(grads, state, params)
        return updates

    chex.assert_trees_all_close(two_steps(2.0**30), two_steps(1.0), rtol=1e-5)


def test_zero_gradients_and_deficient_partners_give_finite_updates():
    left = jnp.ones((6, 2))  # of rank 1
    params = nys.Factors(left, normal(0, (5, 2)))
    tx = nys.lora_rite(RATE)
    state = tx.init(params)
    for scale in (0.0, 1.0, 0.0):
        grads = nys.Factors(scale * normal(3, (6, 2)), scale * normal(4, (5, 2)))
        updates, state = tx.update(grads, state, params)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((updates, state)))
    np.testing.assert_allclose(updates.right[:, 0], updates.right[:, 1], atol=1e-6)
    assert jnp.any(updates.left)


def test_other_leaves_have_the_steps_of_adam():
    params = {"q": PARAMS["lora"](), "head": {"kernel": normal(3, (4, 2)), "bias": jnp.ones(2)}}
    tx, adam = nys.lora_rite(RATE, B1, B2), optax.adam(RATE, B1, B2)
    state, expected = tx.init(params), adam.init(params["head"])
    for seed in range(3):
        grads = gradients(params, seed)
        updates, state = tx.update(grads, state, params)
        by_adam, expected = adam.update(grads["head"], expected)
        chex.assert_trees_all_close(updates["head"], by_adam, rtol=1e-6)


def test_map_params_reaches_what_has_the_shape_of_the_parameters():
    params = PARAMS["stacked"]()
    tx = nys.scale_by_rite()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    ones = jax.tree.map(jnp.ones_like, params)
    assert state.second_moments.size == 2 * 3 * 2 * 2
    expected = state._replace(moments=ones, bases=ones)
    chex.assert_trees_all_equal(mapped, expected)


def test_decays_outside_their_range_are_refused():
    with pytest.raises(ValueError, match=r"b1 is -0\.1; expected a number in \[0, 1\]"):
        nys.lora_rite(b1=-0.1)
    with pytest.raises(ValueError, match=r"b2 is 1\.5; expected a number in \[0, 1\]"):
        nys.scale_by_rite(b2=1.5)
    with pytest.raises(ValueError, match=r"b1 is 1, .* expected it in \[0, 1\)"):
        nys.lora_rite(b1=1.0)


def test_a_rank_above_a_side_gives_the_steps_of_the_factors_without_zeros():
    x, y = normal(1, (M, 4)), normal(2, (2, 4))  # as of a start that is subtracted
    q = jnp.linalg.qr(y.T)[0]  # (X, Y) has the product of (XQ, YQ), of rank 2
    wide, thin = nys.Factors(x, y), nys.Factors(x @ q, y @ q)
    tx = nys.lora_rite(RATE)
    for grad in (normal(3, (M, 2)), normal(4, (M, 2))):
        updates, narrow = (
            tx.update(nys.Factors(grad @ p.right, grad.T @ p.left), tx.init(p), p)[0]
            for p in (wide, thin)
        )
        np.testing.assert_allclose(updates.left @ q, narrow.left, rtol=1e-4, atol=1e-5)
