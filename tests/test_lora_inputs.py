"""Starts from the inputs of layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_cases import KEY, LAYERS, WIDTH, apply, base_of, call, inputs, net, square

import nyscaled as nys

RANK = 2
# The rows of a batch differ in size, so that leading directions are distinct.
BATCHES = [inputs() * jnp.geomspace(1, 9, WIDTH), inputs(7) * jnp.geomspace(9, 1, WIDTH)]


def inputs_of(block, x):
    """The inputs of the layers of a block by name, and its output."""
    up = jnp.tanh(block.up(x))
    query = block.query(up)
    return {"up": x, "query": up, "out": query.reshape(*x.shape)}, x + block.out(query)


def directions(rows):
    """The projector on the leading right singular vectors of all rows, in float64."""
    x = np.concatenate([np.asarray(r, np.float64).reshape(-1, WIDTH) for r in rows])
    leading = np.linalg.svd(x)[2][:RANK]
    return leading.T @ leading


def expected(base, batches):
    """Projectors for the layers of the block, and for those of each layer of the stack."""
    rows = [{name: [] for name in ("up", "query", "out")} for _ in range(1 + LAYERS)]
    blocks = [base.blocks[0]]
    graphdef, state = nnx.split(base.layers)
    blocks += [nnx.merge(graphdef, jax.tree.map(lambda v, i=i: v[i], state)) for i in range(LAYERS)]
    for x in batches:
        for block, of_block in zip(blocks, rows, strict=True):
            by_name, x = inputs_of(block, x)
            for name, value in by_name.items():
                of_block[name].append(value)
    return [{name: directions(value) for name, value in r.items()} for r in rows]


def started(model=None, loss=square, batches=BATCHES, **options):
    model = net() if model is None else model
    apply(model, "pissa")
    nys.lora.initialize(model, "eva", key=KEY, loss=loss, batches=batches, **options)
    return model


def assert_spans(a, projector):
    np.testing.assert_allclose(a.T @ a, np.eye(RANK), atol=1e-5)
    np.testing.assert_allclose(a @ a.T, projector, atol=2e-3)


def assert_is_eva(model, projectors):
    for name in ("up", "query", "out"):
        first = getattr(model.blocks[0], name).adapters["default"]
        assert_spans(first.lora_a[...], projectors[0][name])
        stack = getattr(model.layers, name).adapters["default"]
        for i in range(LAYERS):
            assert_spans(stack.lora_a[i], projectors[1 + i][name])
        assert not jnp.any(first.lora_b[...])
        assert not jnp.any(stack.lora_b[...])
        assert first.start is None


@pytest.mark.long
def test_eva_has_the_leading_directions_of_the_inputs_of_every_layer():
    model = started()
    assert_is_eva(model, expected(net(), BATCHES))
    assert jnp.array_equal(call(model), call(net()))
    assert model.layers.up.adapters["default"].init == ("eva", ())


@pytest.mark.long
def test_inputs_that_the_loss_does_not_read_are_left_out():
    model = started(loss=lambda model, x: jnp.mean((model(x)[:, :2] - 1) ** 2))
    assert_is_eva(model, expected(net(), [x[:, :2] for x in BATCHES]))


@pytest.mark.long
def test_subspace_iteration_finds_the_directions_in_a_wide_layer():
    width, spectrum = 64, jnp.geomspace(1, 1e-3, 64)
    model = nnx.Sequential(nnx.Linear(width, 4, rngs=nnx.Rngs(0)))
    x = nys.spectra.rectangular(KEY, 200, width, spectrum)[0]
    nys.lora.apply(model, RANK, targets=".*", key=KEY)
    nys.lora.initialize(model, "eva", key=KEY, loss=square, batches=[x[:120], x[120:]])
    a = model.layers[0].adapters["default"].lora_a[...]
    leading = np.linalg.svd(np.asarray(x, np.float64))[2][:RANK]
    np.testing.assert_allclose(a @ a.T, leading.T @ leading, atol=2e-3)


@pytest.mark.long
def test_fewer_inputs_than_columns_give_a_finite_orthonormal_start():
    model = nnx.Sequential(nnx.Linear(32, 4, rngs=nnx.Rngs(0)))
    nys.lora.apply(model, 4, targets=".*", key=KEY)
    x = jax.random.normal(KEY, (1, 32))
    nys.lora.initialize(model, "eva", key=KEY, loss=square, batches=[x])
    a = model.layers[0].adapters["default"].lora_a[...]
    np.testing.assert_allclose(a.T @ a, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(a @ (a.T @ x[0]), x[0], atol=1e-5)


def test_a_folder_of_peft_has_the_start_and_its_record(tmp_path):
    model = nnx.Sequential(nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)))
    again = nnx.clone(model)
    nys.lora.apply(model, RANK, targets=".*", key=KEY)
    nys.lora.initialize(model, "eva", key=KEY, loss=square, batches=BATCHES, niter=1)
    model.layers[0].adapters["default"].lora_b[...] += 0.3
    nys.lora.save_peft(model, tmp_path, base_model="mine")
    nys.lora.load_peft(again, tmp_path)
    chex.assert_trees_all_equal(again(inputs()), model(inputs()))
    assert again.layers[0].adapters["default"].init == ("eva", (("niter", 1),))


def test_adapters_measure_only_while_they_are_started():
    model, other = started(), net()
    apply(other, "lora")
    nys.lora.initialize(other, "lora", key=KEY)
    graphs = [nnx.graphdef(m.layers.up.adapters["default"]) for m in (model, other)]
    assert not any("measures" in str(graph) for graph in graphs)
    base, fresh = base_of(model), base_of(net())
    chex.assert_trees_all_equal(base, fresh)


@pytest.mark.long
def test_language_models_leave_padding_out():
    """Rows that are padded on the right have the start of the same rows without padding."""
    config = nys.models.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=2, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip

    def loss(model, batch):
        tokens, mask = batch
        logits = jax.nn.log_softmax(model(tokens, mask).astype(jnp.float32))
        return -jnp.mean(logits[:, :4, 0])

    starts = []
    for padding in (0, 3):
        model = nys.models.Llama(config, rngs=nnx.Rngs(0))
        nys.lora.apply(model, RANK, targets=r".*\.(q_proj|down_proj)", key=KEY)
        tokens = jnp.pad(jax.random.randint(KEY, (3, 4), 1, 30), ((0, 0), (0, padding)))
        batch = tokens, jnp.arange(4 + padding) < jnp.full((3, 1), 4)
        nys.lora.initialize(model, "eva", key=KEY, loss=loss, batches=[batch])
        a = [x[...] for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
        starts.append([x @ x.mT for x in a if x.shape[-1] == RANK])
    chex.assert_trees_all_close(*starts, atol=2e-3)


def test_what_has_no_inputs_is_refused():
    model = net()
    apply(model)
    with pytest.raises(ValueError, match=r"init is 'eva'; expected `loss`, a function of"):
        nys.lora.initialize(model, "eva", key=KEY)
    with pytest.raises(ValueError, match=r"inputs of .* have second moments of norm 0\.0"):
        nys.lora.initialize(
            model, "eva", key=KEY, loss=lambda model, x: jnp.sum(x), batches=BATCHES
        )
    flax = nnx.LoRALinear(8, 4, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model has an adapter of flax, which cannot read the"):
        nys.lora.initialize(flax, "eva", key=KEY, loss=square, batches=BATCHES)
    with pytest.raises(ValueError, match=r"'eva' \(from inputs\)"):
        nys.lora.apply(net(), targets=".*", key=KEY, init="eva")
