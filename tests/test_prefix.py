"""Prefix tuning: virtual tokens that every token sees, in every layer."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from flax import nnx
from model_cases import DECODERS, arrays, call, expected, load

import nyscaled as nys
from nyscaled.models.cache import Context, Past, attend_causally
from nyscaled.models.prefix import Prefix

KEY = jax.random.key(0)
B, T, CAPACITY, VIRTUAL, HEADS, KV, WIDTH = 2, 4, 7, 3, 4, 2, 3


def by_hand(query, keys, values, prefix, visible):
    """Attention in NumPy, one head and one token at a time."""
    out = np.zeros((B, T, HEADS, WIDTH))
    for b, t, h in itertools.product(range(B), range(T), range(HEADS)):
        g = h * KV // HEADS
        seen = np.flatnonzero(visible[b, t])
        k = np.concatenate([np.asarray(prefix.key)[:, g], np.asarray(keys)[b, seen, g]])
        v = np.concatenate([np.asarray(prefix.value)[:, g], np.asarray(values)[b, seen, g]])
        scores = k @ np.asarray(query)[b, t, h] / WIDTH**0.5
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v / weights.sum()
    return out.reshape(B, T, -1)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("filled", [None, 3])
def test_attention_sees_the_prefix_and_what_it_saw_without(window, filled):
    query = normal(0, (B, T, HEADS, WIDTH))
    key, value = normal(1, (B, T, KV, WIDTH)), normal(2, (B, T, KV, WIDTH))
    prefix = Prefix(normal(3, (VIRTUAL, KV, WIDTH)), normal(4, (VIRTUAL, KV, WIDTH)))
    slots = T if filled is None else CAPACITY
    start = filled or 0
    mask = np.ones((B, slots), bool)
    mask[1, 0] = False
    keys, values, past = key, value, None
    if filled is not None:
        before = normal(5, (B, CAPACITY, KV, WIDTH)), normal(6, (B, CAPACITY, KV, WIDTH))
        past = Past(*before, jnp.int32(filled))
        keys, values = (
            x.at[:, filled : filled + T].set(n) for x, n in zip(before, (key, value), strict=True)
        )
    own, slot = start + np.arange(T)[:, None], np.arange(slots)
    visible = (slot <= own) & (slot > own - (window or slots)) & mask[:, None]
    context = Context(jnp.asarray(mask), past, None if window is None else jnp.int32(window))
    out, kept = attend_causally(query, key, value, context, prefix)
    np.testing.assert_allclose(out, by_hand(query, keys, values, prefix, visible), atol=1e-5)
    assert (kept is None) == (filled is None)


def prefixed(name, virtual_tokens=VIRTUAL):
    model = load(name)
    nys.models.add_prefix(model, virtual_tokens, key=KEY)
    return model


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["llama", "opt", *(n for n in DECODERS if n not in ("llama", "opt"))]
)
def test_a_decoder_reads_one_token_at_a_time_as_it_reads_the_text(name):
    model, (tokens, mask, logits) = prefixed(name), expected(name)
    whole = call(model, tokens, mask)
    assert not jnp.allclose(whole[mask], jnp.asarray(logits)[mask], atol=1e-2)

    @nnx.jit
    def read(model, token, mask, cache):
        x, cache = model.hidden(token, mask, cache)
        return model.logits(x), cache

    cache, steps = model.new_cache(*tokens.shape), []
    for t in range(tokens.shape[1]):
        step, cache = read(model, tokens[:, t : t + 1], mask[:, t : t + 1], cache)
        steps.append(step)
    np.testing.assert_allclose(jnp.concatenate(steps, 1)[mask], whole[mask], atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_padding_moves_no_text_away_from_the_prefix(name):
    model, count = prefixed(name), 5
    tokens = jax.random.randint(KEY, (2, count), 0, model.config.vocab_size)
    mask = jnp.arange(count) >= jnp.asarray([[0], [2]])
    new = nys.models.generate(model, tokens, mask, max_new_tokens=4, stop_tokens=[])
    for text, own, start in zip(tokens, new, (0, 2), strict=True):
        whole = jnp.concatenate([text[start:], own])[None]
        logits = call(model, whole)
        for width in (1, 7):
            padded = jnp.pad(whole, ((0, 0), (width, 0)))
            found = call(model, padded, jnp.arange(padded.shape[1])[None] >= width)
            np.testing.assert_allclose(found[:, width:], logits, atol=2e-4)
        before = logits[0, -len(own) - 1 : -1]  # the most probable tokens, ties aside
        assert jnp.all(before[jnp.arange(len(own)), own] >= before.max(-1) - 1e-3)


def test_the_start_is_keys_and_values_of_tokens_and_the_base_is_what_it_was():
    model = prefixed("llama")
    prefix = model.layers.self_attn.prefix
    tokens = jax.random.randint(KEY, (1, VIRTUAL), 0, model.config.vocab_size)
    base = load("llama")
    _, cache = base.hidden(tokens, cache=base.new_cache(1, VIRTUAL))
    chex.assert_trees_all_close(prefix.key[...], cache.keys[:, 0])
    chex.assert_trees_all_close(prefix.value[...], cache.values[:, 0])
    own = {path: x for path, x in arrays(model).items() if "prefix" not in path}
    chex.assert_trees_all_equal(own, arrays(base))
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model, nys.models.PrefixParam))} == {
        jnp.dtype("float32")
    }


def encoder():
    config = nys.models.BertConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = nys.models.Bert(config, rngs=nnx.Rngs(0))
    return nys.models.BertClassifier(model, ["no", "yes"], rngs=nnx.Rngs(1))


@pytest.mark.long
def test_an_encoder_sees_its_prefix_and_no_padding():
    model, base = encoder(), encoder()
    nys.models.add_prefix(model, VIRTUAL, key=KEY)
    own = base.bert.encoder.layer.attention.self
    tokens = jax.random.randint(KEY, (1, VIRTUAL), 0, 30)
    x = base.bert.embeddings(tokens, jnp.zeros_like(tokens), None)[0]
    first = (x @ own.key.kernel[0] + own.key.bias[0]).reshape(VIRTUAL, 2, 4)
    prefix = model.bert.encoder.layer.attention.self.prefix
    np.testing.assert_allclose(prefix.key[0], first, atol=1e-5)
    text = jax.random.randint(jax.random.key(1), (2, 5), 1, 30)
    padded, mask = jnp.pad(text, ((0, 0), (0, 3))), jnp.arange(8) < jnp.full((2, 1), 5)
    np.testing.assert_allclose(model(padded, mask), model(text), atol=1e-5)
    assert not jnp.allclose(model(text), base(text), atol=1e-6)


def test_what_cannot_have_a_prefix_is_refused(tmp_path):
    model = prefixed("llama")
    with pytest.raises(ValueError, match="the model has a prefix; expected one without"):
        nys.models.add_prefix(model, key=KEY)
    with pytest.raises(ValueError, match="virtual_tokens is 0; expected an integer ≥ 1"):
        nys.models.add_prefix(load("llama"), 0, key=KEY)
    for name in ("opt", "bert"):  # tables of 64 positions
        with pytest.raises(ValueError, match="virtual_tokens is 65; expected at most 64, the pos"):
            nys.models.add_prefix(load(name), 65, key=KEY)
    with pytest.raises(ValueError, match="model is a Linear; expected a causal language model"):
        nys.models.add_prefix(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), key=KEY)
    with pytest.raises(ValueError, match=r"prefix"):
        nys.models.save(model, tmp_path)
