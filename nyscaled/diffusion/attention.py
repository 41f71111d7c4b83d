"""Attention of many pixels, of which a CPU computes a part at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nyscaled.models import blocks

PART = 2**20
"""Most logits of a part. At 1024 pixels a CPU takes a fifth of the time of the whole."""
WHOLE = 2**18
"""Most logits of all heads for which a CPU takes no parts."""

Heads = Float[Array, "batch length heads head_dim"]
Slots = Float[Array, "batch slots heads head_dim"]
Rows = Float[Array, "batch length width"]
Part = Float[Array, "rows width"]
Columns = Float[Array, "width slots"]


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
    if on_mesh or batch * heads * length * key.shape[1] <= min(part, WHOLE):
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
    wide = jnp.promote_types(query.dtype, jnp.float32)
    queries = jnp.swapaxes(query, 1, 2).reshape(-1, rows, width).astype(wide)
    keys, values = (
        jnp.moveaxis(x, 1, -1).reshape(-1, width, slots).astype(wide) for x in (key, value)
    )

    # Weights of all parts, stacked for the backward pass, take longer than to compute them again.
    @jax.checkpoint
    def attended(each: tuple[Array, Array]) -> Array:
        i, own = each
        of_head = (
            jax.lax.dynamic_index_in_dim(x, i // count, keepdims=False) for x in (keys, values)
        )
        return _attended(own, *of_head)

    parts = jax.lax.map(attended, (jnp.arange(len(queries)), queries))
    joined = jnp.swapaxes(parts.reshape(batch, heads, length, width), 1, 2)
    return joined.reshape(batch, length, heads * width).astype(query.dtype)


@jax.custom_jvp
def _attended(query: Part, keys: Columns, values: Columns) -> Part:
    """Attention of a part of the queries of a head.

    The slots are the last axis of keys and values: a CPU computes sums over the rows of the weights
    at a tenth of the speed if these are the columns of the result, as in a derivative.
    """
    powers, total = _powers(query, keys)
    return jnp.einsum("qs,ds->qd", powers, values) / total


@_attended.defjvp
def _attended_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """With the mean of the weights' changes taken of the results, which are narrow."""
    (query, keys, values), (d_query, d_keys, d_values) = primals, tangents
    powers, total = _powers(query, keys)
    weights = powers / total
    out = jnp.einsum("qs,ds->qd", weights, values)
    change = weights * (_logits(d_query, keys) + _logits(query, d_keys))
    of_values = jnp.einsum("qs,ds->qd", weights, d_values)
    of_weights = jnp.einsum("qs,ds->qd", change, values)
    return out, of_values + of_weights - out * jnp.sum(change, axis=-1, keepdims=True)


def _logits(query: Part, keys: Columns) -> Float[Array, "rows slots"]:
    return (query.shape[-1] ** -0.5 * query) @ keys


def _powers(
    query: Part, keys: Columns
) -> tuple[Float[Array, "rows slots"], Float[Array, "rows 1"]]:
    logits = _logits(query, keys)
    powers = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    return powers, jnp.sum(powers, axis=-1, keepdims=True)
