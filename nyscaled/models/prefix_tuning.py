"""Prefix tuning: virtual tokens in front of every text, in every layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from nyscaled.models import blocks
from nyscaled.models.bert import Bert, Layer
from nyscaled.models.causal import CausalLM
from nyscaled.models.classify import BertClassifier
from nyscaled.models.prefix import Prefix, PrefixedAttention
from nyscaled.numerics import full_precision
from nyscaled.validation import require_count, require_key

KeysValues = tuple[
    Float[Array, "*layers 1 virtual kv_heads head_dim"],
    Float[Array, "*layers 1 virtual kv_heads head_dim"],
]


def add_prefix(model: nnx.Module, virtual_tokens: int = 5, *, key: Key[Array, ""]) -> None:
    """Put a prefix into all layers of a model, in place: keys and values that are `PrefixParam`s.

    They start as the keys and values of random tokens, without reparametrization. Every token sees
    them, and the positions of the text are what they were: from 0 at its first token, wherever
    padding is.

    Args:
        model: a causal language model or an encoder of this package.
        virtual_tokens: number of the virtual tokens.
        key: PRNG key, which draws the random tokens.

    Raises:
        ValueError: on a model of another package, one that has a prefix, no virtual tokens or more
            than the model has positions for, and on a key that is not one key.

    References:
        Li, Liang, Prefix-tuning: Optimizing continuous prompts for generation, ACL 2021. The start
        is that of Malladi et al., MeZO, NeurIPS 2023.

    Examples:
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> add_prefix(model, 5, key=jax.random.key(0))
        >>> model.layers.self_attn.prefix.key.shape
        (3, 5, 2, 2)
    """
    require_count("virtual_tokens", virtual_tokens, low=1)
    if not isinstance(model, CausalLM | Bert | BertClassifier):
        raise ValueError(
            f"the model is a {type(model).__name__}; expected a causal language model or an "
            "encoder of nys.models"
        )
    causal = isinstance(model, CausalLM)
    longest = model.max_length if causal else model.config.max_position_embeddings
    if longest is not None and virtual_tokens > longest:
        raise ValueError(
            f"virtual_tokens is {virtual_tokens}; expected at most {longest}, the positions that "
            "the model knows"
        )
    key = require_key("key", key)
    (attention,) = (m for _, m in nnx.iter_modules(model) if isinstance(m, PrefixedAttention))
    if attention.prefix is not None:
        raise ValueError("the model has a prefix; expected one without")
    tokens = jax.random.randint(key, (1, virtual_tokens), 0, model.config.vocab_size)
    if causal:
        keys, values = _of_decoder(model, tokens)
    else:
        keys, values = _of_encoder(model, tokens)
    attention.prefix = Prefix(*(x[:, 0].astype(jnp.float32) for x in (keys, values)))


def _of_decoder(model: CausalLM, tokens: Array) -> KeysValues:
    _, cache = model.hidden(tokens, cache=model.new_cache(1, tokens.shape[1]))
    assert cache is not None
    return cache.keys, cache.values


@full_precision
def _of_encoder(model: Bert | BertClassifier, tokens: Array) -> KeysValues:
    encoder = model.bert if isinstance(model, BertClassifier) else model
    x = encoder.embeddings(tokens, jnp.zeros_like(tokens), None)
    return blocks.scan(_kept, x, encoder.encoder.layer, None, remat=False)[1]


def _kept(x: Array, layer: Layer, _: None) -> tuple[Array, KeysValues]:
    own = layer.attention.self
    key, value = own.key(x), own.value(x)
    kept = blocks.split_heads(key, own.head_dim), blocks.split_heads(value, own.head_dim)
    return layer(x, None), kept
