"""Training an adapted layer on whitened data is the solver's iteration on problem (4)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nyscaled as nys

M, N, RANK, STEPS = 40, 30, 3, 12


def setting():
    """A layer W_0 + ab with W_0 of rank 8, inputs x with xᵀx = I, and A = B − W_0 in range(W_0)."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((M, 8)) @ rng.standard_normal((8, N)) / N
    a = w @ rng.standard_normal((N, RANK)) @ rng.standard_normal((RANK, N)) / N
    x = np.linalg.qr(rng.standard_normal((2 * M, M)))[0]
    model = nnx.Linear(M, N, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.asarray(w)
    model = nnx.Sequential(model)
    nys.lora.apply(model, RANK, targets=".*", key=jax.random.key(0), dtype=jnp.float64)
    return model, jnp.asarray(a), jnp.asarray(x)


def trained(model, a, x, tx):
    """The factors X = a and Y = bᵀ at each step, by autodiff through the layer."""
    target = x @ (model.layers[0].kernel[...] + a)
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(params):
        return 0.5 * jnp.sum((nnx.merge(graphdef, params, rest, copy=True)(x) - target) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rows = tx.init(params), []
    for _ in range(STEPS + 1):
        adapter = params["layers"][0]["adapters"]["default"]
        rows.append((adapter["lora_a"][...], adapter["lora_b"][...].T))
        params, state = step(params, state)
    return jax.tree.map(lambda *f: jnp.stack(f), *rows)


@pytest.mark.parametrize("name", ["NoRA+ without Adam", "ScaledGD"])
def test_layer_and_solver_agree_to_rounding(name):
    model, a, x = setting()
    problem = nys.problems.Asymmetric(a)
    if name == "ScaledGD":
        tx, step = nys.scaled_gd(0.5), nys.solvers.scaled_step(problem, 0.5)
    else:
        tx = nys.nora_plus(optax.sgd(0.05))
        step = nys.solvers.gradient_step(problem, tx)
    found = trained(model, a, x, tx)
    start = nys.Factors(*(f[0] for f in found))
    expected = nys.solvers.run(step, start, STEPS, record=lambda f: f).history
    for mine, other in zip(found, expected, strict=True):
        size = jnp.max(jnp.linalg.norm(other, axis=(1, 2)))
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12 * size)
    assert jnp.linalg.norm(found[1][-1]) > 1e-2  # it did move
