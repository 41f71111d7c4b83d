"""A trained U-Net of height fields, in the layout of OpenAI's guided diffusion.

The weights are those of `adaptive-terrain-diffusion` (`make weights`): a consistency model of
128 × 128 heights, of the noise σ and a difficulty. It was trained by others on other terrain.
Module paths are the names in the file, but for the last part of a name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from safetensors.numpy import load_file

from nyscaled.diffusion.attention import attend
from nyscaled.diffusion.layers import Image, conv, group_norm, linear, pixel_conv, sinusoids
from nyscaled.models import blocks
from nyscaled.models.blocks import FLOAT32
from nyscaled.numerics import full_precision

Noise = Float[Array, " batch"]
GROUPS, EPS = 32, 1e-5
DATA, LEAST = 0.5, 0.002
"""Deviation of the data and the least noise, which the model was trained with."""
TIME = 250.0
"""Steps of the sinusoids for a unit of ln σ."""
PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Sizes(NamedTuple):
    """Sizes of the U-Net.

    Attributes:
        widths: channels by level; each level has half the side of the one before.
        layers: residual blocks of a level on the way down; one more on the way up.
        attends: levels with attention.
        head_dim: channels of a head.
        groups: groups of the norms.
    """

    widths: tuple[int, ...] = (32, 32, 64, 96, 128)
    layers: int = 4
    attends: tuple[int, ...] = (2, 3, 4)
    head_dim: int = 32
    groups: int = GROUPS


class Nothing(nnx.Module):
    """The place of an activation or a dropout, whose number is part of the names after it."""


class Residual(nnx.Module):
    """Two convolutions beside the image, with a scale and a shift by the embedding between them.

    Args:
        inputs: number of channels that come in.
        outputs: number of channels that go out.
        sizes: sizes of the U-Net.
        rngs: source of random parameters.
        side: factor of the image's side: 1, 2 or 0.5.
    """

    def __init__(
        self, inputs: int, outputs: int, sizes: Sizes, rngs: nnx.Rngs, side: float = 1
    ) -> None:
        features = 4 * sizes.widths[0]
        norms = [group_norm(width, sizes.groups, EPS, FLOAT32, rngs) for width in (inputs, outputs)]
        first, second = (conv(width, outputs, FLOAT32, rngs) for width in (inputs, outputs))
        self.in_layers = nnx.List([norms[0], Nothing(), first])
        self.emb_layers = nnx.List([Nothing(), linear(features, 2 * outputs, FLOAT32, rngs)])
        self.out_layers = nnx.List([norms[1], Nothing(), Nothing(), second])
        if inputs != outputs:
            self.skip_connection = pixel_conv(inputs, outputs, FLOAT32, rngs)
        self.side, self.widens = side, inputs != outputs

    def __call__(self, x: Image, features: Float[Array, "batch _"]) -> Image:
        norm, _, first = self.in_layers
        inner, x = resized(jax.nn.silu(norm(x)), self.side), resized(x, self.side)
        scale, shift = jnp.split(self.emb_layers[1](jax.nn.silu(features))[:, None, None], 2, -1)
        norm, _, _, second = self.out_layers
        inner = second(jax.nn.silu(norm(first(inner)) * (1 + scale) + shift))
        return inner + (self.skip_connection(x) if self.widens else x)


def resized(x: Image, side: float) -> Image:
    """Return the means of 2 × 2 pixels, or 2 × 2 copies of each, or the image itself.

    Args:
        x: the image.
        side: factor of its side: 0.5, 2 or 1.
    """
    batch, height, width, channels = x.shape
    if side == 0.5:
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return x if side == 1 else jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class SelfAttention(nnx.Module):
    """Attention of all pixels to each other, beside the image."""

    def __init__(self, width: int, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.norm = group_norm(width, sizes.groups, EPS, FLOAT32, rngs)
        self.qkv = linear(width, 3 * width, FLOAT32, rngs)
        self.proj_out = linear(width, width, FLOAT32, rngs)
        self.head_dim = sizes.head_dim

    def __call__(self, x: Image) -> Image:
        rows = self.qkv(self.norm(x).reshape(len(x), -1, x.shape[-1]))
        parts = (blocks.split_heads(part, self.head_dim) for part in jnp.split(rows, 3, -1))
        return x + self.proj_out(attend(*parts)).reshape(x.shape)


class TerrainUNet(nnx.Module):
    """The U-Net; its output is not the clean image yet, see `denoise`.

    Args:
        sizes: its sizes.
        rngs: source of random parameters.
    """

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        widths, width = sizes.widths, sizes.widths[0]
        self.width = width

        def embedding(inputs: int) -> nnx.List[Any]:
            first, second = (linear(x, 4 * width, FLOAT32, rngs) for x in (inputs, 4 * width))
            return nnx.List([first, Nothing(), second])

        def attention(level: int) -> list[SelfAttention]:
            own = SelfAttention(widths[level], sizes, rngs) if level in sizes.attends else None
            return [] if own is None else [own]

        self.time_embed, self.label_emb = embedding(width), embedding(1)
        down: list[list[nnx.Module]] = [[conv(1, width, FLOAT32, rngs)]]
        kept = [width]
        for level, outputs in enumerate(widths):
            for _ in range(sizes.layers):
                down.append([Residual(kept[-1], outputs, sizes, rngs), *attention(level)])
                kept.append(outputs)
            if level < len(widths) - 1:
                down.append([Residual(outputs, outputs, sizes, rngs, 0.5)])
                kept.append(outputs)
        width, last = widths[-1], len(widths) - 1
        middle = [Residual(width, width, sizes, rngs), *attention(last)]
        up: list[list[nnx.Module]] = []
        for level, outputs in reversed(list(enumerate(widths))):
            for _ in range(sizes.layers + 1):
                up.append([Residual(width + kept.pop(), outputs, sizes, rngs), *attention(level)])
                width = outputs
            if level > 0:
                up[-1].append(Residual(outputs, outputs, sizes, rngs, 2))
        self.input_blocks = nnx.List([nnx.List(block) for block in down])
        self.middle_block = nnx.List([*middle, Residual(widths[-1], widths[-1], sizes, rngs)])
        self.output_blocks = nnx.List([nnx.List(block) for block in up])
        norm = group_norm(width, sizes.groups, EPS, FLOAT32, rngs)
        self.out = nnx.List([norm, Nothing(), conv(width, 1, FLOAT32, rngs)])

    @full_precision
    def __call__(self, x: Image, sigma: Noise, difficulty: Noise) -> Image:
        """Return what the model predicts of an image with noise.

        Args:
            x: the image, of which the side is divisible by that of a pixel of the last level.
            sigma: noise of each image.
            difficulty: difficulty of each, from 0 to 1.
        """
        features = _embedded(self.time_embed, sinusoids(TIME * jnp.log(sigma), self.width))
        features += _embedded(self.label_emb, difficulty[:, None])
        kept: list[Image] = []
        for block in self.input_blocks:
            x = _run(block, x, features)
            kept.append(x)
        x = _run(self.middle_block, x, features)
        for block in self.output_blocks:
            x = _run(block, jnp.concatenate([x, kept.pop()], axis=-1), features)
        norm, _, last = self.out
        return last(jax.nn.silu(norm(x)))


def _embedded(layers: Any, x: Array) -> Array:
    return layers[2](jax.nn.silu(layers[0](x)))


def _run(block: Any, x: Image, features: Array) -> Image:
    for layer in block:
        x = layer(x, features) if isinstance(layer, Residual) else layer(x)
    return x


def denoise(unet: TerrainUNet, noisy: Image, sigma: Noise, difficulty: Noise) -> Image:
    """Return the clean images that the model sees in noisy ones.

    The published graph ends by clipping to [−1, 1], which has no gradient and is left out.

    Args:
        unet: the U-Net.
        noisy: images plus σ times noise, (batch, height, width, 1).
        sigma: noise of each.
        difficulty: difficulty of each, from 0 to 1.
    """
    noise = sigma[:, None, None, None]
    size = jnp.sqrt(noise**2 + DATA**2)
    raw = unet(noisy / size, sigma, difficulty)
    own = DATA**2 / ((noise - LEAST) ** 2 + DATA**2)
    return own * noisy + DATA * (noise - LEAST) / size * raw


def load(path: Path, sizes: Sizes = Sizes()) -> TerrainUNet:  # noqa: B008
    """Return the U-Net with the weights of a file.

    Args:
        path: a safetensors file, in which kernels of convolutions have the order of PyTorch.
        sizes: sizes of the U-Net.

    Raises:
        ValueError: if names or shapes are not those of the U-Net.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: TerrainUNet(sizes, nnx.Rngs(0))))
    tensors, flat = load_file(path), dict(nnx.to_flat_state(state))
    names = {places: ".".join([*map(str, places[:-1]), PARTS[str(places[-1])]]) for places in flat}
    if set(names.values()) != tensors.keys():
        differ = sorted(set(names.values()) ^ tensors.keys())
        raise ValueError(f"{path} differs in {', '.join(differ):.200}; expected a U-Net of {sizes}")
    for places, name in names.items():
        value, expected = tensors[name], flat[places].get_value().shape
        if places[-1] == "kernel" and len(expected) == 2:
            value = value.reshape(value.shape[:2]).T
        elif places[-1] == "kernel":
            value = value.transpose(2, 3, 1, 0)
        if value.shape != expected:
            raise ValueError(f"{name} of {path} has shape {value.shape}; expected {expected}")
        flat[places] = flat[places].replace(jnp.asarray(value))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
