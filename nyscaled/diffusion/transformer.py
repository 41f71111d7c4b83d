"""Transformers over the pixels of an image, which attend to each other and to a text."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nyscaled.diffusion.attention import attend
from nyscaled.diffusion.layers import Image, group_norm, linear
from nyscaled.models import blocks
from nyscaled.models.blocks import Numerics

Rows = Float[Array, "batch length width"]
Text = Float[Array, "batch text_length text_width"]

LAYER_EPS, GROUP_EPS = 1e-5, 1e-6  # of all files, regardless of `norm_eps`
EXPANSION = 4  # width inside a feed-forward part, over that outside


class Identity(nnx.Module):
    """The place of a dropout, whose number is part of the names of layers after it."""

    def __call__(self, x: Rows) -> Rows:
        return x


class Attention(nnx.Module):
    """Attention to rows, whose softmax and its logits are float32.

    Args:
        width: width of the queries' rows and of the result.
        context_width: width of the rows that keys and values are made of.
        heads: number of heads, a divisor of `width`.
        numerics: dtypes.
        rngs: source of random parameters.
        bias: whether queries, keys and values have biases.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
    ) -> None:
        self.to_q = linear(width, width, numerics, rngs, use_bias=bias)
        self.to_k = linear(context_width, width, numerics, rngs, use_bias=bias)
        self.to_v = linear(context_width, width, numerics, rngs, use_bias=bias)
        self.to_out = nnx.List([linear(width, width, numerics, rngs)])
        self.head_dim = width // heads

    def __call__(self, x: Rows, context: Text) -> Rows:
        query, key, value = (
            blocks.split_heads(rows, self.head_dim)
            for rows in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attend(query, key, value))


class GEGLU(nnx.Module):
    """A linear layer, of whose output one half is multiplied by gelu of the other."""

    def __init__(self, width: int, inner: int, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.proj = linear(width, 2 * inner, numerics, rngs)

    def __call__(self, x: Rows) -> Float[Array, "batch length inner"]:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * blocks.gelu(gate)


class FeedForward(nnx.Module):
    """The part of a transformer that treats each row by itself (Shazeer, 2020)."""

    def __init__(self, width: int, numerics: Numerics, rngs: nnx.Rngs) -> None:
        inner = EXPANSION * width
        last = linear(inner, width, numerics, rngs)
        self.net = nnx.List([GEGLU(width, inner, numerics, rngs), Identity(), last])

    def __call__(self, x: Rows) -> Rows:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Attention to the image, attention to the text, feed-forward; each beside the rows."""

    def __init__(
        self, width: int, text_width: int, heads: int, numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = blocks.layer_norm(width, LAYER_EPS, numerics, rngs)
        self.attn1 = Attention(width, width, heads, numerics, rngs)
        self.norm2 = blocks.layer_norm(width, LAYER_EPS, numerics, rngs)
        self.attn2 = Attention(width, text_width, heads, numerics, rngs)
        self.norm3 = blocks.layer_norm(width, LAYER_EPS, numerics, rngs)
        self.ff = FeedForward(width, numerics, rngs)

    def __call__(self, x: Rows, context: Text) -> Rows:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """A transformer over pixels, beside the image.

    `proj_in` and `proj_out` are linear layers over channels. Some files have them as convolutions
    with a kernel of one pixel, which compute the same.

    Args:
        width: number of channels.
        text_width: width of the text's rows.
        heads: number of heads, a divisor of `width`.
        groups: number of groups of the norm.
        numerics: dtypes.
        rngs: source of random parameters.
    """

    def __init__(
        self,
        width: int,
        text_width: int,
        heads: int,
        groups: int,
        numerics: Numerics,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = group_norm(width, groups, GROUP_EPS, numerics, rngs)
        self.proj_in = linear(width, width, numerics, rngs)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(width, text_width, heads, numerics, rngs)]
        )
        self.proj_out = linear(width, width, numerics, rngs)

    def __call__(self, x: Image, context: Text) -> Image:
        batch, height, width, channels = x.shape
        rows = self.proj_in(self.norm(x).reshape(batch, height * width, channels))
        for block in self.transformer_blocks:
            rows = block(rows, context)
        return x + self.proj_out(rows).reshape(x.shape)
