"""The linear layer of A.2: its figure shows the claims, and training the layer is problem (4)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from experiment_cases import ROOT, read_errors, record
from flax import nnx

import nyscaled as nys

M, N, BASE_RANK, RANK, STEPS = 40, 30, 8, 3, 12


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return record(tmp_path_factory, "linear_lora")


def steps(curve, target=1e-6):
    assert curve.min() <= target
    return int(np.argmax(curve <= target))


def assert_shown(folder, factor):
    """By GD, NoRA arrives first in (a) and does not in (b), in the median over the seeds."""
    curves = read_errors(folder / "linear_lora.csv")
    assert steps(curves["a"]["NoRA, GD"]) * factor <= steps(curves["a"]["LoRA, GD"])
    assert steps(curves["b"]["NoRA, GD"]) >= steps(curves["b"]["LoRA, GD"])
    # Adam is held up by its momentum, b1ᵗ = 0.9ᵗ, from either start.
    for panel in ("a", "b"):
        count = [steps(curves[panel][f"{start}, Adam"]) for start in ("LoRA", "NoRA")]
        assert 0.9 < count[0] / count[1] < 1.1
        assert min(count) > 110


@pytest.mark.long
def test_quick_figure_shows_it(quick):
    assert_shown(quick, 1.1)


def test_committed_figure_shows_it():
    assert_shown(ROOT / "figures", 1.3)
    curves = read_errors(ROOT / "figures" / "linear_lora.csv")
    # At every size of the start at which GD arrives from LoRA, it arrives sooner from NoRA.
    lora, nora = (curves["c, as a"][f"{start}, GD"] for start in ("LoRA", "NoRA"))
    both = np.isfinite(lora)
    assert both.sum() >= 3
    assert (nora[both] < lora[both]).all()


def test_committed_record_is_of_the_full_run_and_was_tuned_inside_the_grid():
    how = json.loads((ROOT / "figures" / "linear_lora.json").read_text())
    assert not how["config"]["quick"]
    assert how["config"]["seeds"] >= 5
    assert {"jax", "optax", "nyscaled"} <= set(how["versions"])
    curves = read_errors(ROOT / "figures" / "linear_lora.csv")
    for panel in ("a", "b"):
        assert list(how["chosen"][panel]) == list(curves[panel])
        for chosen in how["chosen"][panel].values():
            assert chosen["inside_grid"]
            assert len(chosen["steps"]) == how["config"]["seeds"]
            assert np.isfinite(chosen["steps"]).all()


class Model(nnx.Module):
    def __init__(self, w):
        self.linear = nnx.Linear(*w.shape, use_bias=False, rngs=nnx.Rngs(0))
        self.linear.kernel[...] = w

    def __call__(self, x):
        return self.linear(x)


@functools.cache
def layer(base_rank):
    """An adapted layer, whitened data (xᵀx = I), and A = B − W_0 in range(W_0)."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((M, base_rank)) @ rng.standard_normal((base_rank, N)) / N
    a = w @ rng.standard_normal((N, RANK)) @ rng.standard_normal((RANK, N)) / N
    x = np.linalg.qr(rng.standard_normal((2 * M, M)))[0]
    w, a, x = (jnp.asarray(v, jnp.float32) for v in (w, a, x))
    model = Model(w)
    # α = 2r, so that s = 2 is not the identity
    nys.lora.apply(model, RANK, 2 * RANK, targets="linear", key=jax.random.key(0), scale=0.3)
    return model, w, a, x


def iterates(model, a, x, tx, count):
    """(a, b) of each step of training through the layer, s·a·b = XYᵀ with X = s·a, Y = bᵀ."""
    graph, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    target = x @ (model.linear.kernel[...] + a)

    def loss(params):
        return 0.5 * jnp.sum((nnx.merge(graph, params, rest)(x) - target) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, out = tx.init(params), []
    for t in range(count + 1):
        adapter = params["linear"]["adapters"]["default"]
        out.append((adapter["lora_a"][...], adapter["lora_b"][...].T))
        if t < count:
            params, state = step(params, state)
    return out


def assert_same(through_layer, factors, rtol):
    for left, right in zip(through_layer, factors, strict=True):
        scale = float(jnp.linalg.norm(right))
        np.testing.assert_allclose(left, right, rtol=0, atol=rtol * max(scale, 1e-6))


def trajectory(step, start, count):
    history = nys.solvers.run(step, start, count, record=lambda f: f).history
    return [nys.Factors(x, y) for x, y in zip(*history, strict=True)]


def unscaled(base_rank):
    """The same layer with s = 1, for which (a, bᵀ) are X and Y themselves."""
    model, w, a, x = layer(base_rank)
    plain = Model(w)
    nys.lora.apply(plain, RANK, targets="linear", key=jax.random.key(0), scale=0.3)
    np.testing.assert_allclose(
        2 * model.linear.adapters["default"].lora_a[...],
        plain.linear.adapters["default"].lora_a[...],
        rtol=1e-6,
    )
    return plain, a, x


@pytest.mark.long
@pytest.mark.parametrize("tx", [optax.sgd(0.5), nys.nora_plus(optax.sgd(0.05))], ids=["gd", "nora"])
def test_training_the_layer_is_the_gradient_step_of_problem_4(tx):
    model, a, x = unscaled(BASE_RANK)
    mine = iterates(model, a, x, tx, STEPS)
    step = nys.solvers.gradient_step(nys.problems.Asymmetric(a), tx)
    theirs = trajectory(step, nys.Factors(*mine[0]), STEPS)
    for left, right in zip(mine, theirs, strict=True):
        assert_same(left, right, 1e-4)
    assert float(jnp.linalg.norm(mine[-1][1])) > 1e-2  # it did move


@pytest.mark.long
def test_scaled_gd_through_the_layer_is_the_fused_step():
    model, a, x = unscaled(BASE_RANK)
    mine = iterates(model, a, x, nys.scaled_gd(0.5), STEPS)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 0.5)
    theirs = trajectory(step, nys.Factors(*mine[0]), STEPS)
    for (p, q), (x_t, y_t) in zip(mine, theirs, strict=True):
        assert_same((p @ q.T,), (x_t @ y_t.T,), 1e-4)
    assert float(jnp.linalg.norm(mine[-1][0] @ mine[-1][1].T - a)) < 1e-3 * float(
        jnp.linalg.norm(a)
    )


@pytest.mark.long
def test_one_step_when_the_start_spans_the_range_of_the_change():
    """Theorem 3 through the layer: rank(W_0) = r, so that W_0Ω spans range(B − W_0)."""
    model, a, x = unscaled(RANK)
    (p, q) = iterates(model, a, x, nys.scaled_gd(1.0), 1)[1]
    assert float(jnp.linalg.norm(p @ q.T - a) / jnp.linalg.norm(a)) < 1e-5
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 1.0)
    fused = trajectory(step, nys.Factors(*iterates(model, a, x, optax.sgd(0.1), 0)[0]), 1)[1]
    assert_same((p, q), fused, 1e-5)


def test_one_step_is_not_enough_when_it_does_not():
    """The control: rank(W_0) > r, and the start misses part of the range."""
    model, a, x = unscaled(BASE_RANK)
    (p, q) = iterates(model, a, x, nys.scaled_gd(1.0), 1)[1]
    assert float(jnp.linalg.norm(p @ q.T - a) / jnp.linalg.norm(a)) > 1e-2


def test_scaling_does_not_change_the_product_of_the_first_step():
    """s·a·b after one GD step from b = 0: with a_0 = W_0Ω/s, s·a_0 = W_0Ω, and b moves s-fold."""
    model, _, a, x = layer(BASE_RANK)
    plain, _, _ = unscaled(BASE_RANK)
    (p, q), (u, v) = (iterates(m, a, x, optax.sgd(0.1), 1)[1] for m in (model, plain))
    assert_same((2 * p @ q.T,), (u @ v.T,), 1e-5)
