"""Keys and values of the tokens a model has seen, so that a new token costs only its own products."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nyscaled.models import blocks
from nyscaled.models.blocks import Mask
from nyscaled.typing import pytree_dataclass


class Kept(NamedTuple):
    """What a layer computed for new tokens and attends to later."""

    key: Float[Array, "batch length kv_heads head_dim"]
    value: Float[Array, "batch length kv_heads head_dim"]


class Past(NamedTuple):
    """The part of a cache that one layer reads."""

    keys: Float[Array, "batch capacity kv_heads head_dim"]
    values: Float[Array, "batch capacity kv_heads head_dim"]
    length: Int[Array, ""]


@pytree_dataclass
class Cache:
    """One slot a token or a padding, filled in the same order in all rows.

    Attributes:
        keys: of each layer, rotated where the model rotates them.
        values: of each layer.
        mask: which slots hold tokens.
        length: how many slots are filled.
    """

    keys: Float[Array, "layers batch capacity kv_heads head_dim"]
    values: Float[Array, "layers batch capacity kv_heads head_dim"]
    mask: Bool[Array, "batch capacity"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: Any) -> Cache:
        """With (layers, batch, capacity, kv_heads, head_dim) zeros."""
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, jnp.zeros(shape[1:3], bool), jnp.zeros((), jnp.int32))

    def marked(self, mask: Mask) -> Cache:
        """With the next slots marked as tokens or padding, not yet filled."""
        length, capacity = mask.shape[1], self.mask.shape[1]
        if length > capacity:
            raise ValueError(f"tokens have length {length}; wanted at most {capacity}, the cache's")
        slots = jax.lax.dynamic_update_slice(self.mask, mask, (0, self.length))
        return Cache(self.keys, self.values, slots, self.length)

    def filled(self, kept: Kept) -> Cache:
        """With the keys and values of all layers in the next slots."""
        at = (0, 0, self.length, 0, 0)
        keys = jax.lax.dynamic_update_slice(self.keys, kept.key, at)
        values = jax.lax.dynamic_update_slice(self.values, kept.value, at)
        return Cache(keys, values, self.mask, self.length + kept.key.shape[2])


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    mask: Bool[Array, "batch slots"] | None,
    past: Past | None,
) -> tuple[Float[Array, "batch length width"], Kept | None]:
    """Causal attention over the past and the new tokens, and what is to be kept of these.

    Args:
        query: of the new tokens, as key and value.
        key: of the new tokens.
        value: of the new tokens.
        mask: which tokens, or with a past which slots of the cache, may be seen.
        past: of this layer, or None: then this is `blocks.attend`, and nothing is kept.
    """
    if past is None:
        return blocks.attend(query, key, value, mask), None
    # The layer's slots with the new ones in place; the cache itself is written once, after the
    # last layer: as an output of the scan, all of it would be copied.
    at = (0, past.length, 0, 0)
    keys = jax.lax.dynamic_update_slice(past.keys, key, at)
    values = jax.lax.dynamic_update_slice(past.values, value, at)
    own = past.length + jnp.arange(query.shape[1])
    visible = jnp.arange(keys.shape[1]) <= own[:, None]
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    out = jax.nn.dot_product_attention(query, keys, values, mask=visible)
    return out.reshape(*out.shape[:-2], -1), Kept(key, value)


def run(
    layers: Any,
    x: Float[Array, "batch length width"],
    mask: Mask | None,
    cache: Cache | None,
    *shared: Any,
    remat: bool,
) -> tuple[Float[Array, "batch length width"], Cache | None]:
    """`x, kept = layer(x, mask, past, *shared)` through a stack, and the cache with what was kept."""

    def step(x: Array, layer: Any, past: Past | None, mask: Any, *shared: Any) -> Any:
        return layer(x, mask, past, *shared)

    if cache is None:
        x, _ = blocks.scan(step, x, layers, None, mask, *shared, remat=remat)
        return x, None
    cache = cache.marked(jnp.ones(x.shape[:2], bool) if mask is None else mask)
    lengths = jnp.full(cache.keys.shape[0], cache.length)
    past = Past(cache.keys, cache.values, lengths)
    x, kept = blocks.scan(step, x, layers, past, cache.mask, *shared, remat=remat)
    return x, cache.filled(kept)
