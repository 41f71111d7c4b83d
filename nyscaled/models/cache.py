"""Keys and values of the tokens that a model has seen, and attention to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nyscaled._pytree import pytree_dataclass
from nyscaled.models import blocks
from nyscaled.models.prefix import Prefix

_put = jax.lax.dynamic_update_slice_in_dim


class Kept(NamedTuple):
    """Keys and values that a layer computed for new tokens."""

    key: Float[Array, "batch length kv_heads head_dim"]
    value: Float[Array, "batch length kv_heads head_dim"]


class Past(NamedTuple):
    """The part of a cache that one layer reads."""

    keys: Float[Array, "batch capacity kv_heads head_dim"]
    values: Float[Array, "batch capacity kv_heads head_dim"]
    length: Int[Array, ""]


class Context(NamedTuple):
    """What the tokens of a layer may see.

    Attributes:
        mask: which tokens, or with a past which slots of the cache, hold tokens; None for all.
        past: the layer's part of a cache, None without one.
        window: number of tokens that a token sees, itself and the ones before it; None for all.
    """

    mask: Bool[Array, "batch slots"] | None
    past: Past | None
    window: Int[Array, ""] | None


@pytree_dataclass
class Cache:
    """Slots for tokens and padding, filled in the same order in all rows.

    Attributes:
        keys: keys of each layer, rotated where the model rotates them.
        values: values of each layer.
        mask: which slots hold tokens.
        length: how many slots are filled.
    """

    keys: Float[Array, "layers batch capacity kv_heads head_dim"]
    values: Float[Array, "layers batch capacity kv_heads head_dim"]
    mask: Bool[Array, "batch capacity"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> Cache:
        """Return a cache without tokens.

        Args:
            shape: layers, batch, capacity, kv_heads and head_dim.
            dtype: dtype of keys and values.
        """
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, jnp.zeros(shape[1:3], bool), jnp.zeros((), jnp.int32))

    def marked(self, mask: Bool[Array, "batch length"]) -> Cache:
        """Return the cache with its next slots marked as tokens or padding, not yet filled.

        Args:
            mask: which of the new slots hold tokens.

        Raises:
            ValueError: if there is no room, where the length is not traced.
        """
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
        """Return the cache with the keys and values of all layers in its next slots.

        Args:
            kept: keys and values of all layers.
        """
        keys = _put(self.keys, kept.key, self.length, axis=2)
        values = _put(self.values, kept.value, self.length, axis=2)
        return Cache(keys, values, self.mask, self.length + kept.key.shape[2])


def attend_causally(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    context: Context,
    prefix: Prefix | None = None,
) -> tuple[Float[Array, "batch length width"], Kept | None]:
    """Attend to the past and the new tokens, and return what is to be kept of these.

    Args:
        query: queries of the new tokens.
        key: keys of the new tokens.
        value: values of the new tokens.
        context: what the tokens may see. Without a past nothing is kept.
        prefix: keys and values that all tokens see besides.
    """
    mask, past, window = context
    tokens = None if mask is None else mask[:, None, None, :]
    if past is None and prefix is None:
        if window is not None:
            near = _recent(jnp.arange(key.shape[1]), jnp.arange(query.shape[1]), window)
            tokens = near if tokens is None else near & tokens
        return blocks.attend(query, key, value, tokens, causal=True), None
    keys, values, start = key, value, jnp.zeros((), jnp.int32)
    if past is not None:
        # The layer's slots with the new ones in place; the cache itself is written once, after the
        # last layer: as an output of the scan, all of it would be copied.
        start = past.length
        keys, values = _put(past.keys, key, start, 1), _put(past.values, value, start, 1)
    slots, own = jnp.arange(keys.shape[1]), start + jnp.arange(query.shape[1])
    visible = slots <= own[:, None]
    if window is not None:
        visible = visible & _recent(slots, own, window)
    if tokens is not None:
        visible = visible & tokens
    if prefix is not None:
        keys, values, visible = prefix.before(keys, values, visible)
    out = blocks.attend(query, keys, values, visible, causal=False)
    return out, None if past is None else Kept(key, value)


def _recent(
    slots: Int[Array, " slots"], own: Int[Array, " length"], window: Int[Array, ""]
) -> Bool[Array, "length slots"]:
    """Whether a slot is in the window that ends with a token's own; later slots are too."""
    return slots > own[:, None] - window


def run_causal(
    layers: Any,
    x: Float[Array, "batch length width"],
    mask: Bool[Array, "batch length"] | None,
    cache: Cache | None,
    *shared: Any,
    windows: Int[Array, " layers"] | None = None,
    remat: bool,
) -> tuple[Float[Array, "batch length width"], Cache | None]:
    """Run `x, kept = layer(x, context, *shared)` through a stack; the cache gets what was kept.

    Args:
        layers: the stack.
        x: input of the first layer.
        mask: which new tokens are not padding, None for all.
        cache: the cache with the tokens before, or None.
        *shared: what all layers get.
        windows: number of tokens that a token sees in each layer, None for all.
        remat: whether the backward pass computes each layer again.
    """
    if cache is None:
        x, _ = blocks.scan(_step, x, layers, (None, windows), mask, *shared, remat=remat)
        return x, None
    cache = cache.marked(jnp.ones(x.shape[:2], bool) if mask is None else mask)
    lengths = jnp.full(cache.keys.shape[0], cache.length)
    past = Past(cache.keys, cache.values, lengths)
    x, kept = blocks.scan(_step, x, layers, (past, windows), cache.mask, *shared, remat=remat)
    return x, cache.filled(kept)


def _step(
    x: Array, layer: Any, inputs: tuple[Past | None, Array | None], mask: Any, *shared: Any
) -> tuple[Array, Kept | None]:
    return layer(x, Context(mask, *inputs), *shared)
