"""Methods of fine-tuning: what each puts into a model, trains and takes as hyperparameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nyscaled as nys
from nyscaled.finetune import METHODS, method

KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (4, 6), 1, 30)
TARGETS = r".*\.(query|value|q_proj|v_proj)"
FROZEN_AT_FIRST = ("full", "linear-probe")


@functools.cache
def _classifier():
    config = nys.models.BertConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    encoder = nys.models.Bert(config, rngs=nnx.Rngs(0))
    return nys.models.BertClassifier(encoder, ["no", "yes"], rngs=nnx.Rngs(1))


def classifier():
    return nnx.clone(_classifier())


def llama(tie=False):
    config = nys.models.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=2, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    return nys.models.Llama(config, rngs=nnx.Rngs(0))


def loss(model, tokens):
    logits = model(tokens)
    labels = jnp.arange(len(tokens)) % 2
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def prepared(name, model=None, **options):
    """A model, the filter of what is trained, and the values of both parts."""
    model = classifier() if model is None else model
    wrt = method(name).prepare(
        model, rank=2, alpha=4.0, targets=TARGETS, key=KEY, loss=loss, batches=[TOKENS], **options
    )
    return model, wrt


def trained_paths(model, wrt):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, wrt))}


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("name", METHODS)
def test_methods_train_what_they_say_and_a_step_lowers_the_loss(name):
    entry = METHODS[name]
    model, wrt = prepared(name)
    before = nnx.to_pure_dict(nnx.state(model))
    paths = trained_paths(model, wrt)
    adapters = {path for path in paths if ".adapters." in path or ".prefix." in path}
    assert bool(adapters) == (entry.trains in ("adapters", "prefix"))
    assert {"classifier.kernel", "classifier.bias"} <= paths
    assert (len(paths - adapters) > 2) == (entry.trains == "everything")
    optimizer = nnx.Optimizer(model, entry.optimizer(1e-2), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model, TOKENS)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]
    after = nnx.to_flat_state(nnx.state(model))
    flat = {".".join(map(str, k)): v for k, v in nnx.traversals.flatten_mapping(before).items()}
    for path, value in after:
        path = ".".join(map(str, path))
        if path not in paths:
            np.testing.assert_array_equal(value[...], flat[path])


@pytest.mark.long
def test_the_output_does_not_change_before_the_first_step():
    expected = classifier()(TOKENS)
    for name in METHODS:
        model, _ = prepared(name)
        same = jnp.allclose(model(TOKENS), expected, atol=1e-6)
        assert same == (name not in ("lora-one", "lora-one-p", "prefix")), name


@pytest.mark.long
def test_hyperparameters_are_arrays_in_the_state_and_change_the_update():
    params = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.full((2, 4), 0.1)}
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), params)

    def update(state):
        return jax.jit(tx.update)(grads, state, params)[0]

    for name, entry in METHODS.items():
        tx = entry.optimizer(inner=optax.sgd)
        state = tx.init(params)
        assert set(state.hyperparams) == {"learning_rate", *entry.hyperparameters}, name
        chex.assert_trees_all_close(state.hyperparams["learning_rate"], entry.learning_rate)
        assert state.hyperparams["learning_rate"].dtype == jnp.float32
        doubled = state.hyperparams | {"learning_rate": 2 * state.hyperparams["learning_rate"]}
        chex.assert_trees_all_close(
            update(state._replace(hyperparams=doubled)),
            jax.tree.map(lambda x: 2 * x, update(state)),
            rtol=1e-5,
        )
    tx = method("lora-p").optimizer(1.0, optax.sgd)
    state = tx.init(params)
    damped = state._replace(hyperparams=state.hyperparams | {"damping": jnp.float32(100.0)})
    assert optax.global_norm(update(damped)) < 0.1 * optax.global_norm(update(state))


def test_schedules_are_learning_rates():
    tx = method("nora+").optimizer(optax.linear_schedule(1.0, 0.0, 2), optax.sgd)
    params = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.full((2, 4), 0.1)}
    state, sizes, update = tx.init(params), [], jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(params, state, params)
        sizes.append(float(optax.global_norm(updates)))
    assert sizes[0] > sizes[1] > sizes[2] == 0


def test_options_of_the_start_reach_it():
    small, _ = prepared("nora", scale=0.1)
    large, _ = prepared("nora", scale=0.2)
    a, b = (
        m.bert.encoder.layer.attention.self.query.adapters["default"].lora_a[...]
        for m in (small, large)
    )
    np.testing.assert_allclose(2 * a, b, rtol=1e-5)
    assert method("nora").options["scale"] == 0.1
    assert method("lora-one").options == {"gamma": 16.0, "niter": 2}
    assert method("full").options == {}
    assert method("prefix").options == {"virtual_tokens": 5}
    assert [m.needs for m in map(method, ("nora", "nora-grad", "eva", "full"))] == [
        "kernel", "gradient", "inputs", None,
    ]  # fmt: skip


@pytest.mark.long
def test_starts_from_batches_are_made_without_dropout():
    for name in ("nora-grad",):
        plain, _ = prepared(name)
        dropping, _ = prepared(name, dropout=0.7)
        a, b = (
            m.bert.encoder.layer.attention.self.query.adapters["default"].lora_a[...]
            for m in (plain, dropping)
        )
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        dropouts = [m for _, m in nnx.iter_modules(dropping) if isinstance(m, nnx.Dropout)]
        assert dropouts
        assert not any(m.deterministic for m in dropouts)  # as before


@pytest.mark.long
def test_lora_rite_clips_and_decays():
    params = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.full((2, 4), 0.1)}
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), params)

    def second_update(first_scale, **options):
        tx = method("lora-rite").optimizer(0.1, optax.sgd, **options)
        state, update = tx.init(params), jax.jit(tx.update)
        scaled = jax.tree.map(lambda x: first_scale * x, grads)
        return update(grads, update(scaled, state, params)[1], params)[0]

    # A gradient a hundred times as large is clipped to the same one.
    limit = float(optax.global_norm(grads))
    clipped = second_update(100.0, clip=limit)
    chex.assert_trees_all_close(clipped, second_update(1.0), rtol=1e-4, atol=1e-6)
    assert optax.global_norm(second_update(100.0)) < 0.5 * optax.global_norm(clipped)
    decayed = second_update(1.0, weight_decay=0.5)
    expected = jax.tree.map(lambda u, p: u - 0.1 * 0.5 * p, second_update(1.0), params)
    chex.assert_trees_all_close(decayed, expected, rtol=1e-5, atol=1e-6)


def test_rslora_scales_by_the_root_of_the_rank():
    model, _ = prepared("rslora")
    layer = model.bert.encoder.layer.attention.self.query
    assert layer.adapters["default"].scaling == pytest.approx(4 / 2**0.5)


def test_a_language_model_trains_adapters_alone_and_probes_its_own_head():
    model = llama()
    wrt = method("nora").prepare(model, rank=2, targets=TARGETS, key=KEY)
    assert all(".adapters." in path for path in trained_paths(model, wrt))
    model = llama()
    wrt = method("linear-probe").prepare(model, targets=TARGETS, key=KEY)
    assert trained_paths(model, wrt) == {"lm_head.kernel"}


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"method is 'dora'; expected one of lora, .*nora\+"):
        method("dora")
    with pytest.raises(ValueError, match=r"option is 'scal'; expected one of scale, sketch, side"):
        prepared("nora", scal=1)
    with pytest.raises(ValueError, match="option is 'scale'; expected none for this method"):
        prepared("full", scale=1)
    with pytest.raises(ValueError, match="hyperparameter is 'damping'; expected none for this"):
        method("lora").optimizer(damping=1.0)
    with pytest.raises(ValueError, match=r"Llama has no module .*lm_head; .*model\.untie\(\)"):
        method("linear-probe").prepare(llama(tie=True), targets=TARGETS, key=KEY)
