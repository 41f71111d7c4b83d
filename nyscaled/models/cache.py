"""Keys and values of the tokens a model has seen, so that a new token costs only its own products."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nyscaled.models import blocks
from nyscaled.typing import pytree_dataclass

_put = jax.lax.dynamic_update_slice_in_dim


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
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> Cache:
        """With (layers, batch, capacity, kv_heads, head_dim) zeros."""
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, jnp.zeros(shape[1:3], bool), jnp.zeros((), jnp.int32))

    def marked(self, mask: Bool[Array, "batch length"]) -> Cache:
        """With the next slots marked as tokens or padding, not yet filled."""
        length, capacity = mask.shape[1], self.mask.shape[1]
        known = not isinstance(self.length, jax.core.Tracer)
        room = capacity - int(self.length) if known else capacity
        if length > room:
            raise ValueError(
                f"tokens have length {length}; expected at most {room}, the cache's room"
            )
        slots = _put(self.mask, mask, self.length, axis=1)
        return Cache(self.keys, self.values, slots, self.length)

    def filled(self, kept: Kept) -> Cache:
        """With the keys and values of all layers in the next slots."""
        keys = _put(self.keys, kept.key, self.length, axis=2)
        values = _put(self.values, kept.value, self.length, axis=2)
        return Cache(keys, values, self.mask, self.length + kept.key.shape[2])


def attend_causally(
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
        past: of this layer, or None: then nothing is kept.
    """
    if past is None:
        tokens = None if mask is None else mask[:, None, None, :]
        return blocks.attend(query, key, value, tokens, causal=True), None
    # The layer's slots with the new ones in place; the cache itself is written once, after the
    # last layer: as an output of the scan, all of it would be copied.
    keys, values = _put(past.keys, key, past.length, 1), _put(past.values, value, past.length, 1)
    own = past.length + jnp.arange(query.shape[1])
    visible = jnp.arange(keys.shape[1]) <= own[:, None]
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    return blocks.attend(query, keys, values, visible, causal=False), Kept(key, value)


def run_causal(
    layers: Any,
    x: Float[Array, "batch length width"],
    mask: Bool[Array, "batch length"] | None,
    cache: Cache | None,
    *shared: Any,
    remat: bool,
) -> tuple[Float[Array, "batch length width"], Cache | None]:
    """`x, kept = layer(x, mask, past, *shared)` through a stack, and the cache with what was kept."""

    if cache is None:
        x, _ = blocks.scan(_step, x, layers, None, mask, *shared, remat=remat)
        return x, None
    cache = cache.marked(jnp.ones(x.shape[:2], bool) if mask is None else mask)
    lengths = jnp.full(cache.keys.shape[0], cache.length)
    past = Past(cache.keys, cache.values, lengths)
    x, kept = blocks.scan(_step, x, layers, past, cache.mask, *shared, remat=remat)
    return x, cache.filled(kept)


def _step(x: Array, layer: Any, past: Past | None, mask: Any, *shared: Any) -> Any:
    return layer(x, mask, past, *shared)
