"""Other numbers of tokens for a model: in its embedding and its head."""

from __future__ import annotations

import dataclasses
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float

from nyscaled.validation import require_count


def resize_token_embeddings(
    model: Any,
    size: SupportsIndex,
    *,
    rows: Float[ArrayLike, "new width"] | None = None,
    head_rows: Float[ArrayLike, "new width"] | None = None,
) -> None:
    """Change a model's number of tokens, in place: its embedding, head and configuration.

    New rows are the mean of the old ones. The logits of new tokens then do not exceed those of all
    others (Hewitt, 2021). transformers' method of this name samples them around that mean.

    Args:
        model: model of this package, without adapters on its embedding or head.
        size: number of tokens. The first ones stay; the others are new, or are removed.
        rows: rows of the new tokens in the embedding, instead of the mean.
        head_rows: rows of the new tokens in a separate head, instead of the mean.

    Raises:
        ValueError: on a size that is not a positive integer, rows of another shape or without new
            tokens, head_rows where the head is the embedding or there is none, and on adapters.

    Examples:
        >>> from flax import nnx
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> model = Llama(LlamaConfig(**sizes, **heads), rngs=nnx.Rngs(0))
        >>> resize_token_embeddings(model, 18)
        >>> model.embed_tokens.embedding.shape, model.lm_head.kernel.shape, model.config.vocab_size
        ((18, 8), (8, 18), 18)
    """
    size = require_count("size", size, low=1)
    owner = getattr(model, "bert", model)
    if not hasattr(owner, "embed_tokens") and not hasattr(owner, "embeddings"):
        raise ValueError(f"model is a {type(model).__name__}; expected one of this package")
    embeddings = getattr(owner, "embeddings", None)
    embed = owner.embed_tokens if embeddings is None else embeddings.word_embeddings
    head = getattr(owner, "lm_head", None)
    for layer in (embed, head):
        if hasattr(layer, "adapters"):
            raise ValueError(
                f"the {type(layer).__name__} has adapters; expected the size changed before "
                "`nys.lora.apply` or `load_peft`"
            )
    if head is None and head_rows is not None:
        raise ValueError("head_rows is set and the model has no separate head; expected only rows")
    table = _resized("rows", embed.embedding[...], size, rows)
    if head is not None:
        kernel = _resized("head_rows", head.kernel[...].T, size, head_rows).T
        head.kernel = head.kernel.replace(_placed(kernel, head.kernel[...]))
        head.out_features = size
    embed.embedding = embed.embedding.replace(_placed(table, embed.embedding[...]))
    embed.num_embeddings = size
    for part in {id(part): part for part in (model, owner)}.values():
        part.config = dataclasses.replace(part.config, vocab_size=size)


def _resized(name: str, table: Array, size: int, rows: Any) -> Array:
    added = size - len(table)
    if rows is None:
        if added <= 0:
            return table[:size]
        mean = jnp.mean(table.astype(jnp.float32), axis=0)
        rows = jnp.broadcast_to(mean, (added, *mean.shape))
    rows = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.number):
        raise ValueError(f"{name} has dtype {rows.dtype}; expected numbers")
    rows = jnp.asarray(rows)
    shape = max(added, 0), table.shape[1]
    if rows.shape != shape or added <= 0:
        raise ValueError(
            f"{name} has shape {rows.shape}; expected {shape}, a row for each new token"
        )
    return jnp.concatenate([table, rows.astype(table.dtype)])


def _placed(value: Array, old: Array) -> Array:
    """Return the value on the devices of the old one, split along the axes that still can be."""
    sharding = old.sharding
    if not isinstance(sharding, NamedSharding):
        return value
    axes = (*sharding.spec, *(None,) * (value.ndim - len(sharding.spec)))
    counts = [1 if axis is None else sharding.mesh.shape[axis] for axis in axes]
    spec = (
        None if length % count else axis
        for axis, length, count in zip(axes, value.shape, counts, strict=True)
    )
    return jax.device_put(value, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
