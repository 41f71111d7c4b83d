"""Prefixes of attention: trained keys and values of virtual tokens in every layer."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float


class PrefixParam(nnx.Param[Array]):
    """Keys or values of virtual tokens."""


class Prefix(nnx.Module):
    """Keys and values of virtual tokens, which every token sees.

    Attributes:
        key: keys, rotated where the model rotates them; of all layers, with their axis in front.
        value: values.
    """

    def __init__(
        self,
        key: Float[Array, "*layers virtual kv_heads head_dim"],
        value: Float[Array, "*layers virtual kv_heads head_dim"],
    ) -> None:
        self.key, self.value = PrefixParam(key), PrefixParam(value)

    def before(
        self,
        key: Float[Array, "batch slots kv_heads head_dim"],
        value: Float[Array, "batch slots kv_heads head_dim"],
        visible: Bool[Array, "... slots"] | None,
    ) -> tuple[Array, Array, Array | None]:
        """Return keys, values and what is visible, with those of the virtual tokens in front.

        Args:
            key: keys of tokens.
            value: values of tokens.
            visible: which slots each token sees, None for all.
        """

        def joined(own: Array, x: Array) -> Array:
            shape = (x.shape[0], *own.shape)
            return jnp.concatenate([jnp.broadcast_to(own.astype(x.dtype), shape), x], axis=1)

        if visible is not None:
            widths = [(0, 0)] * (visible.ndim - 1) + [(self.key.shape[0], 0)]
            visible = jnp.pad(visible, widths, constant_values=True)
        return joined(self.key[...], key), joined(self.value[...], value), visible


class PrefixedAttention(nnx.Module):
    """Attention that may have a prefix: a stack of such layers has one for all of them."""

    prefix: Prefix | None = None
