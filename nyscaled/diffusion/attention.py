"""Attention of many pixels, of which a CPU computes a part at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nyscaled.models import blocks

# Logits that caches hold. At 1024 and 4096 pixels the parts take a third of the time of the whole,
# or less, and their derivative takes half.
PART = 2**20

Heads = Float[Array, "batch length heads head_dim"]
Slots = Float[Array, "batch slots heads head_dim"]
Rows = Float[Array, "batch length width"]


def attend(query: Heads, key: Slots, value: Slots, *, part: int = PART) -> Rows:
    """Return attention without a mask, with the heads joined, as `blocks.attend` computes it.

    Args:
        query: what is compared with the keys.
        key: as many rows as there are values.
        value: what is averaged.
        part: most logits at a time on a CPU, but for the batch on a mesh, which stays whole.
    """
    whole = functools.partial(blocks.attend, mask=None, causal=False)
    batch, length, heads, _ = query.shape
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    if on_mesh or batch * heads * length * key.shape[1] <= part:
        return whole(query, key, value)
    by_parts = functools.partial(_by_parts, part=part)
    return jax.lax.platform_dependent(query, key, value, cpu=by_parts, default=whole)


def _by_parts(query: Heads, key: Slots, value: Slots, part: int) -> Rows:
    """Run through the heads of each image, and through parts of their queries if these are many."""
    batch, length, heads, width = query.shape
    slots, rows = key.shape[1], length
    while rows % 2 == 0 and rows * slots > part:
        rows //= 2
    count = length // rows
    queries = jnp.swapaxes(query, 1, 2).reshape(-1, rows, width)
    keys, values = (jnp.swapaxes(x, 1, 2).reshape(-1, slots, width) for x in (key, value))

    # Weights of all parts, stacked for the backward pass, take longer than to compute them again.
    @jax.checkpoint
    def attended(each: tuple[Array, Array]) -> Array:
        i, own = each
        of_head = (
            jax.lax.dynamic_index_in_dim(x, i // count, keepdims=False) for x in (keys, values)
        )
        one = (x[None, :, None] for x in (own, *of_head))
        return blocks.attend(*one, mask=None, causal=False)[0]

    parts = jax.lax.map(attended, (jnp.arange(len(queries)), queries))
    joined = jnp.swapaxes(parts.reshape(batch, heads, length, width), 1, 2)
    return joined.reshape(batch, length, heads * width)
