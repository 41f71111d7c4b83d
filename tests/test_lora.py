"""Adapters in NNX models: put in and trained."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from lora_cases import (
    HEADS,
    KERNEL_INITS,
    KEY,
    LAYERS,
    WIDTH,
    apply,
    assert_base_is,
    base_of,
    call,
    inputs,
    net,
    square,
    train,
)

import nyscaled as nys


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("init", KERNEL_INITS)
def test_at_step_0_output_and_base_are_unchanged_to_the_last_bit(init):
    model, base = net(), base_of(net())
    expected = call(model)
    apply(model, init)
    assert jnp.array_equal(call(model), expected)
    assert_base_is(model, base)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("init", ["nora", "pissa"])
def test_training_changes_only_the_adapters(init):
    model, base = net(), base_of(net())
    apply(model, init, rank_stabilized=True)
    before = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    losses = train(model, steps=4)
    assert losses[-1] < losses[0]
    assert_base_is(model, base)
    after = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    assert all(
        not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )


def test_apply_returns_the_adapted_layers_and_factors_have_their_shapes():
    model = net()
    touched = apply(model, rank=3)
    head = WIDTH // HEADS
    assert set(touched) == {
        f"{p}.{n}" for p in ("blocks.0", "layers") for n in ("up", "query", "out")
    }
    adapter = touched["blocks.0.query"].adapters["default"]
    chex.assert_shape([adapter.lora_a, adapter.lora_b], [(WIDTH, 3), (3, HEADS * head)])
    stacked = touched["layers.out"].adapters["default"]
    chex.assert_shape([stacked.lora_a, stacked.lora_b], [(LAYERS, WIDTH, 3), (LAYERS, 3, WIDTH)])
    assert isinstance(adapter.lora_a, nnx.LoRAParam)
    assert isinstance(touched["blocks.0.query"], nnx.Einsum)
    assert list(nys.lora.adapted_layers(model)) == list(touched)


def test_the_start_is_the_papers_in_a_linear_layer():
    """X_0 = W_0Ω/s: in range(W_0), linear in ξ, divided by the scale s; Y_0 = 0."""
    layer = nnx.Linear(20, 12, rngs=nnx.Rngs(0))
    left = jnp.linalg.qr(jax.random.normal(KEY, (20, 3)))[0]
    layer.kernel[...] = left @ jax.random.normal(KEY, (3, 12))
    model = nnx.Sequential(layer)
    for name, alpha, scale in (("one", 2, 0.1), ("two", 8, 0.3)):
        nys.lora.apply(model, 2, alpha, targets="layers.0", key=KEY, scale=scale, name=name)
    one, two = (layer.adapters[n].lora_a[...] for n in ("one", "two"))
    assert jnp.linalg.norm(one - left @ (left.T @ one)) < 1e-6 * jnp.linalg.norm(one)
    np.testing.assert_allclose(two, one * 3 / 4, rtol=1e-4)
    assert not jnp.any(layer.adapters["one"].lora_b[...])


def test_a_layers_start_depends_on_its_path_and_not_on_the_other_layers():
    alone, together = net(), net()
    apply(alone, targets=r"blocks\.0\.up")
    apply(together)
    a, b = (m.blocks[0].up.adapters["default"].lora_a[...] for m in (alone, together))
    assert jnp.array_equal(a, b)
    twins = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)])
    apply(nnx.Sequential(*twins))
    a, b = (m.adapters["default"].lora_a[...] for m in twins)
    assert not jnp.allclose(a, b)


def test_layers_of_a_stack_have_different_starts():
    model = net()
    apply(model, "lora")
    a = model.layers.up.adapters["default"].lora_a[...]
    assert not jnp.allclose(a[0], a[1])


def test_two_seeds_share_a_compilation():
    """The key is kept as data: models that differ only in it are one program."""
    graphs = []
    for seed in range(2):
        model = net()
        apply(model, key=jax.random.key(seed))
        graphs.append(nnx.graphdef(model))
    assert graphs[0] == graphs[1]


def test_patterns_with_ranks_of_their_own_and_alpha():
    model = net()
    nys.lora.apply(
        model, alpha=8, targets={r".*\.query": 4, r"blocks\..*": 2}, key=KEY, rank_stabilized=True
    )
    ranks = {p: m.adapters["default"].rank for p, m in nys.lora.adapted_layers(model).items()}
    expected = {"blocks.0.up": 2, "blocks.0.query": 4, "blocks.0.out": 2, "layers.query": 4}
    assert ranks == expected
    assert model.layers.query.adapters["default"].scaling == 4
    model = net()
    apply(model, rank=4, alpha=8)
    assert model.layers.query.adapters["default"].scaling == 2


@pytest.mark.long
def test_dropout_acts_in_training_and_not_in_evaluation():
    model = net()
    apply(model, dropout=0.5)
    train(model)
    first, second = call(model), call(model)
    assert not jnp.allclose(first, second)
    model.eval()
    assert jnp.array_equal(call(model), call(model))
    keys = model.layers.up.adapters["default"].dropout.rngs.key[...]
    assert keys.shape == (LAYERS,)


@pytest.mark.parametrize("init", ["pissa", "olora", "nora"])
def test_dropout_is_of_the_trained_factors_input_and_not_of_the_subtracted_start(init):
    """base(x) + s·dropout(x)·a·b − s·x·a₀·b₀, as PEFT with a base less the start."""
    model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)))
    base = nnx.clone(model)
    apply(model, init, alpha=3.0, dropout=0.5)
    train(model, steps=1)
    adapter, x = model.layers[0].adapters["default"], inputs()
    dropped = nnx.clone(adapter.dropout)(x)  # with the mask that the next call draws
    assert 0 < jnp.mean(dropped == 0) < 1
    expected = base(x) + 1.5 * dropped @ adapter.lora_a[...] @ adapter.lora_b[...]
    if adapter.start is not None:
        expected -= 1.5 * x @ adapter.start["a"][...] @ adapter.start["b"][...]
    np.testing.assert_allclose(model(x), expected, atol=1e-5)


def test_an_embedding_has_no_dropout():
    """It would drop tokens."""
    model = nnx.Sequential(nnx.Embed(WIDTH, WIDTH, rngs=nnx.Rngs(0)))
    tokens = jnp.arange(WIDTH)
    base = model(tokens)
    apply(model, dropout=0.9, embeddings=True)
    adapter = model.layers[0].adapters["default"]
    adapter.lora_b[...] += 1
    expected = base + adapter.lora_a[...] @ adapter.lora_b[...]
    np.testing.assert_allclose(model(tokens), expected, atol=1e-5)


@pytest.mark.long
def test_adapters_have_a_dtype_of_their_own_over_a_bfloat16_base():
    model = net(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    expected = call(model)
    apply(model, "pissa")
    adapter = model.blocks[0].up.adapters["default"]
    assert adapter.lora_a.dtype == jnp.float32
    actual = call(model)
    assert actual.dtype == expected.dtype
    assert jnp.array_equal(actual, expected)
    losses = train(model)
    assert losses[-1] < losses[0]
    narrow = net()
    apply(narrow, dtype=jnp.bfloat16)
    assert narrow.blocks[0].up.adapters["default"].lora_a.dtype == jnp.bfloat16
    assert call(narrow).dtype == jnp.float32


def test_apply_can_be_traced_so_that_large_models_need_not_exist():
    def build():
        model = net()
        apply(model, "pissa")
        return model

    shapes = nnx.state(nnx.eval_shape(build), nnx.LoRAParam)
    model = build()
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, nnx.state(model, nnx.LoRAParam))


@pytest.mark.long
def test_split_once_and_plain_jit_agree_with_nnx():
    model = net()
    apply(model)
    expected = train(model, steps=3, tx=nys.nora_plus(optax.adam(1e-2)))
    model = net()
    apply(model)
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    tx = nys.nora_plus(optax.adam(1e-2))

    @jax.jit
    def step(params, state, x):
        loss, grads = jax.value_and_grad(
            lambda p: square(nnx.merge(graphdef, p, rest, copy=True), x)
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(3):
        params, state, loss = step(params, state, inputs())
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
