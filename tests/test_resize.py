"""Another number of tokens, in the embedding, the head and the configuration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import arrays, call, expected, load

import nyscaled as nys
from nyscaled.models import BertClassifier, resize_token_embeddings


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_old_tokens_keep_their_logits_and_new_ones_have_their_mean(name, tmp_path):
    model, (tokens, mask, logits) = load(name), expected(name)
    old = model.config.vocab_size
    resize_token_embeddings(model, old + 3)
    got = call(model, tokens, mask)
    assert got.shape[-1] == old + 3
    np.testing.assert_allclose(got[..., :old][mask], logits[mask], atol=1e-4)
    mean = jnp.broadcast_to(jnp.mean(got[..., :old], -1, keepdims=True), got[..., old:].shape)
    np.testing.assert_allclose(got[..., old:][mask], mean[mask], atol=1e-4)
    assert jnp.isfinite(call(model, jnp.full_like(tokens, old + 2), mask)).all()
    nys.models.save(model, tmp_path)
    again, _ = nys.models.load(tmp_path)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    np.testing.assert_array_equal(call(again, tokens, mask), got)
    resize_token_embeddings(model, old)
    assert nnx.graphdef(model) == nnx.graphdef(load(name))
    jax.tree.map(np.testing.assert_array_equal, arrays(model), arrays(load(name)))


def test_rows_of_ones_own():
    model = load("llama")
    old, width = model.embed_tokens.embedding.shape
    rows = np.arange(2 * width, dtype=np.float64).reshape(2, width)
    resize_token_embeddings(model, np.int64(old + 2), rows=rows, head_rows=-rows)
    np.testing.assert_array_equal(model.embed_tokens.embedding[...][old:], rows)
    np.testing.assert_array_equal(model.lm_head.kernel[...][:, old:].T, -rows)
    assert model.embed_tokens.embedding.dtype == jnp.float32
    assert type(model.config.vocab_size) is int


def test_bert_and_its_classifier():
    for name in ("bert", "bert_encoder"):
        model = load(name)
        owner = model.bert if isinstance(model, BertClassifier) else model
        old = model.config.vocab_size
        resize_token_embeddings(model, old + 1)
        assert model.config.vocab_size == owner.config.vocab_size == old + 1
        assert jnp.isfinite(model(jnp.full((1, 3), old))).all()


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("llama", {"size": 0}, "size is 0"),
        ("llama", {"size": True}, "size is True"),
        ("llama", {"size": 2**31}, "size is 2147483648"),
        ("llama", {"size": 5, "rows": np.ones((1, 16))}, "a row for each new token"),
        ("gemma", {"size": 5, "head_rows": np.ones((1, 16))}, "no separate head"),
    ],
)
def test_sizes_refused(name, options, match):
    model = load(name)
    with pytest.raises(ValueError, match=match):
        resize_token_embeddings(model, **options)
    assert nnx.graphdef(model) == nnx.graphdef(load(name))


def test_adapters_of_the_embedding_refused():
    model = load("llama")
    nys.lora.apply(model, 2, targets="lm_head", key=jax.random.key(0))
    with pytest.raises(ValueError, match="has adapters; expected the size changed before"):
        resize_token_embeddings(model, 5)


@pytest.mark.parametrize("name", ["gemma", "opt"])
def test_a_head_of_its_own_is_saved_and_loaded(name, tmp_path):
    model, (tokens, mask, logits) = load(name), expected(name)
    model.untie()
    np.testing.assert_allclose(call(model, tokens, mask)[mask], logits[mask], atol=1e-4)
    model.lm_head.kernel[...] *= 2
    nys.models.save(model, tmp_path)
    again, _ = nys.models.load(tmp_path)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    np.testing.assert_allclose(call(again, tokens, mask)[mask], 2 * logits[mask], atol=2e-4)
    before = arrays(again)
    again.untie()  # which it is
    jax.tree.map(np.testing.assert_array_equal, arrays(again), before)
