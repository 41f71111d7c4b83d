"""Models against what transformers computed (`tests/fixtures/make_models.py`)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import DECODERS, MODELS, arrays, call, expected, load

import nyscaled as nys
from nyscaled.models import blocks, rope

ADAPTED = [("gemma", "nora"), ("llama", "pissa"), ("llama_bias", "nora"), ("opt", "nora")]
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_transformers(name):
    tokens, mask, logits = expected(name)
    got = np.asarray(call(load(name), tokens, mask))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[mask], logits[mask], atol=2e-5, rtol=0)
    last = mask[:, -1]
    np.testing.assert_array_equal(got[last, -1].argmax(-1), logits[last, -1].argmax(-1))
    assert not mask[1:].all(1).any()  # both sides of padding have been seen
    whole = call(load(name), tokens[:1])
    np.testing.assert_allclose(whole, logits[:1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_saved_and_loaded_again(name, tmp_path):
    model = load(name)
    nys.models.save(model, tmp_path)
    again, tokenizer = nys.models.load(tmp_path)
    assert tokenizer is None
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(model))


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(("name", "init"), ADAPTED)
def test_adapters_leave_the_output_and_go_through_files(name, init, tmp_path):
    tokens, mask, _ = expected(name)
    model = load(name)
    before = call(model, tokens, mask)
    targets = r".*(q_proj|v_proj|down_proj|fc2)"
    touched = nys.lora.apply(model, 2, targets=targets, init=init, key=KEY)
    assert len(touched) == 3
    np.testing.assert_array_equal(call(model, tokens, mask), before)
    for layer in touched.values():
        layer.adapters["default"].lora_b[...] += 0.1
    after = call(model, tokens, mask)
    assert jnp.max(jnp.abs(after - before)) > 1e-2
    nys.lora.save_peft(model, tmp_path, base_model=name)
    again = load(name)
    nys.lora.load_peft(again, tmp_path)
    np.testing.assert_allclose(call(again, tokens, mask), after, atol=2e-5)


def test_merged_adapters_are_saved_and_others_refused(tmp_path):
    tokens, mask, _ = expected("llama")
    model = load("llama")
    layers = nys.lora.apply(model, 2, targets=".*[qv]_proj", key=KEY)
    for layer in layers.values():
        layer.adapters["default"].lora_b[...] += 0.1
    reference = call(model, tokens, mask)
    with pytest.raises(ValueError, match=r"has layers\.self_attn.*adapters.*nys\.lora\.merge"):
        nys.models.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="model is a Linear; expected one of Bert, BertClassifier, Gemma"
    ):
        nys.models.save(model.lm_head, tmp_path)
    nys.lora.merge(model)
    nys.lora.remove(model)
    nys.models.save(model, tmp_path)
    again, _ = nys.models.load(tmp_path)
    np.testing.assert_allclose(call(again, tokens, mask), reference, atol=2e-5)


def test_calls_outside_of_jit_compile_once():
    tokens, mask, logits = expected("opt")
    model = load("opt")
    model(tokens, mask)
    before = blocks._scan._cache_size()
    got = model(tokens, np.asarray(mask, int))
    assert blocks._scan._cache_size() == before
    np.testing.assert_allclose(got[mask], logits[mask], atol=2e-5, rtol=0)
    assert jax.eval_shape(model, tokens).shape == logits.shape
    np.testing.assert_allclose(jax.jit(model)(tokens, mask), got, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_ids_from_outside_do_not_reach_tokens_from_padding(name):
    tokens, mask, logits = expected(name)
    for outside in (32, -100):
        got = call(load(name), jnp.where(mask, tokens, outside), mask)
        np.testing.assert_allclose(got[mask], logits[mask], atol=2e-5, rtol=0)
        assert np.isnan(
            call(load(name), tokens.at[:, -1].set(outside), mask)[mask[:, -1], -1]
        ).all()


def test_ids_beyond_int32_are_no_others():
    tokens, _ = blocks.prepare(np.array([[2**32 + 3, 3], [-(2**40), 2**63 - 1]]), None, 32)
    np.testing.assert_array_equal(tokens, [[32, 3], [32, 32]])


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.ones((2, 3)), None, "tokens are float"),
        (np.ones((2, 0), int), None, r"of shape \(2, 0\); expected integers"),
        (np.ones(3, int), None, r"of shape \(3,\); expected integers \(batch, length\)"),
        (np.ones((2, 3), int), np.ones((2, 2), int), r"mask has shape \(2, 2\); expected \(2, 3\)"),
    ],
)
def test_inputs_that_are_refused(tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        blocks.prepare(jnp.asarray(tokens), mask, 32)


def test_dropout_of_adapters_in_a_stack_is_drawn_anew():
    tokens, _, _ = expected("llama")
    model = load("llama")
    layers = nys.lora.apply(model, 2, targets=".*q_proj", key=KEY, dropout=0.5)
    for layer in layers.values():
        layer.adapters["default"].lora_b[...] += 0.3
    first, second = call(model, tokens), call(model, tokens)
    assert jnp.max(jnp.abs(first - second)) > 1e-3
    model.eval()
    np.testing.assert_array_equal(call(model, tokens), call(model, tokens))


def test_norms_keep_their_digits():
    """In float32 whatever the dtype of x, and about a mean that is large."""
    x = np.random.default_rng(0).standard_normal((32, 256))
    narrow = jnp.asarray(x * np.linspace(0.3, 30, 32)[:, None], jnp.bfloat16)
    norm = blocks.RMSNorm(256, 1e-6, nys.models.Numerics(jnp.bfloat16))
    wide = np.asarray(narrow, float)
    reference = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(norm(narrow), float), reference, rtol=1.01 * 2**-8)
    large = jnp.asarray(x + 1e3, jnp.float32)
    wide = np.asarray(large, float)
    wide = wide - wide.mean(-1, keepdims=True)
    reference = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-5)
    norm = blocks.layer_norm(256, 1e-5, nys.models.Numerics(), nnx.Rngs(0))
    np.testing.assert_allclose(norm(large), reference, atol=1e-3)


@pytest.mark.long
def test_dtypes(tmp_path):
    tokens, mask, logits = expected("llama")
    narrow, _ = nys.models.load(MODELS / "llama", dtype=jnp.bfloat16)
    mixed, _ = nys.models.load(MODELS / "llama", compute_dtype=jnp.bfloat16)
    assert {str(v.dtype) for v in arrays(narrow).values()} == {"bfloat16"}
    assert {str(v.dtype) for v in arrays(mixed).values()} == {"float32"}
    half, _ = nys.models.load(MODELS / "llama", dtype=jnp.float16)
    for model, dtype in ((narrow, jnp.bfloat16), (mixed, jnp.bfloat16), (half, jnp.float16)):
        got = call(model, tokens, mask)
        assert got.dtype == dtype
        error = np.abs(np.asarray(got, np.float32) - logits)[np.asarray(mask)].max()
        assert 1e-4 < error < 0.1
    nys.models.save(narrow, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide, _ = nys.models.load(tmp_path)
    for path, value in arrays(wide).items():
        np.testing.assert_array_equal(value, arrays(narrow)[path].astype(np.float32))
    # What is written is what the parameters are, whatever they were loaded as.
    graphdef, state = nnx.split(wide)
    cast = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float16), state))
    nys.models.save(cast, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
    for dtype in (jnp.int32, "bogus", jnp.float64):
        with pytest.raises(
            ValueError, match=r"dtype is .*; expected a floating dtype, float64 only"
        ):
            nys.models.load(MODELS / "llama", dtype=dtype)


def gradients(model, tokens, mask):
    """Of the sum of squares: the lowered program, and what it is called with."""
    graphdef, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graphdef, state)(tokens, mask)
        return jnp.sum(jnp.where(mask[..., None], logits, 0) ** 2)

    return jax.jit(jax.grad(loss)).lower(state), state


@pytest.mark.long
def test_remat_has_the_same_gradients():
    tokens, mask, _ = expected("llama")
    reference, got = (
        lowered.compile()(state)
        for lowered, state in (
            gradients(model, tokens, mask)
            for model in (load("llama"), nys.models.load(MODELS / "llama", remat=True)[0])
        )
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), reference, got
    )


def test_the_program_does_not_grow_with_depth():
    model = load("llama")

    def lines(depth):
        config = model.config.__class__(**vars(model.config) | {"num_hidden_layers": depth})
        deep = nnx.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(deep)
        tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        text = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t)).lower(state, tokens).as_text()
        return len(text.splitlines())

    assert lines(2) == lines(9)


def test_inverse_frequencies_of_llama3():
    """One rotation of each kind: kept, between, slowed."""
    scaling = rope.RopeScaling(8.0, 1.0, 4.0, 100)
    # 100 positions turn each pair 16, 1.6 and 0.16 times.
    got = rope.inverse_frequencies(6, 1e3, scaling)
    turns = 100 / (2 * np.pi) * 0.1
    kept = (turns - 1) / 3
    np.testing.assert_allclose(got, [1, 0.1 * (kept + (1 - kept) / 8), 0.01 / 8], rtol=1e-12)
