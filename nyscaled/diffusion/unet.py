"""The U-Net of Stable Diffusion, which predicts the noise in latents of images."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from nyscaled.diffusion.component import Component
from nyscaled.diffusion.layers import (
    AROUND,
    Downsample,
    Features,
    Image,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample,
    conv,
    group_norm,
    sinusoids,
)
from nyscaled.diffusion.transformer import Text, Transformer2DModel
from nyscaled.diffusion.unet_config import CROSS_DOWN, CROSS_UP, UNetConfig
from nyscaled.matrices import as_array
from nyscaled.models.blocks import FLOAT32, Numerics
from nyscaled.models.sharding import split_batch
from nyscaled.numerics import full_precision


class _Makes:
    """What makes the layers of one U-Net."""

    def __init__(self, config: UNetConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.config, self.numerics, self.rngs = config, numerics, rngs

    def resnet(self, inputs: int, outputs: int) -> ResnetBlock2D:
        config = self.config
        time_width = 4 * config.block_out_channels[0]
        groups, eps = config.norm_num_groups, config.norm_eps
        return ResnetBlock2D(inputs, outputs, time_width, groups, eps, self.numerics, self.rngs)

    def attention(self, width: int, heads: int) -> Transformer2DModel:
        text_width, groups = self.config.cross_attention_dim, self.config.norm_num_groups
        return Transformer2DModel(width, text_width, heads, groups, self.numerics, self.rngs)


class Block(nnx.Module):
    """Residual blocks, each with a transformer after it or without.

    Args:
        resnets: the residual blocks.
        attentions: as many transformers; None for a block without.
    """

    def __init__(
        self,
        resnets: list[ResnetBlock2D],
        attentions: list[Transformer2DModel] | None,
        *,
        remat: bool,
    ) -> None:
        self.resnets = nnx.List(resnets)
        if attentions is not None:
            self.attentions = nnx.List(attentions)
        self.attends, self.remat = attentions is not None, remat

    def layer(self, i: int, x: Image, time: Features, context: Text) -> Image:
        """Return what a residual block, and the transformer after it, make of an image.

        Args:
            i: number of the block.
            x: the image.
            time: embedding of the times.
            context: rows of the texts.
        """
        resnet, attention = self.resnets[i], self.attentions[i] if self.attends else None
        run = _again if self.remat else _layer
        return split_batch(run(resnet, attention, x, time, context))


def _again(resnet: ResnetBlock2D, attention: Transformer2DModel | None, *inputs: Array) -> Image:
    """What `_layer` returns, computed again in the backward pass.

    Unlike `nnx.remat` this takes modules from outside of the trace: only counters of random
    streams, as dropout has them, are written back, and only where numbers were drawn.
    """
    modules = resnet, attention
    drawn: list[bool] = []
    graphdef, random, rest = nnx.split(modules, nnx.RngState, ...)

    @jax.checkpoint
    def run(random: object, rest: object, *inputs: Array) -> tuple[Array, object]:
        made = nnx.merge(graphdef, random, rest, copy=True)
        x, after = _layer(*made, *inputs), nnx.as_pure(nnx.state(made, nnx.RngState))
        drawn.append(any(map(operator.is_not, jax.tree.leaves(after), jax.tree.leaves(random))))
        return x, after

    x, random = run(nnx.as_pure(random), nnx.as_pure(rest), *inputs)
    if any(drawn):
        nnx.update(modules, random)
    return x


def _layer(
    resnet: ResnetBlock2D,
    attention: Transformer2DModel | None,
    x: Image,
    time: Features,
    context: Text,
) -> Image:
    x = resnet(x, time)
    return x if attention is None else attention(x, context)


class DownBlock(Block):
    """A level on the way down: its images are kept for the way up, and then made smaller."""

    def __init__(self, makes: _Makes, level: int) -> None:
        config = makes.config
        widths, count = config.block_out_channels, config.layers_per_block
        inputs = (widths[max(level - 1, 0)], *(widths[level] for _ in range(count - 1)))
        attentions = None
        if config.down_block_types[level] == CROSS_DOWN:
            attentions = [makes.attention(widths[level], config.heads[level]) for _ in range(count)]
        resnets = [makes.resnet(width, widths[level]) for width in inputs]
        super().__init__(resnets, attentions, remat=makes.numerics.remat)
        self.halves = level < len(widths) - 1
        if self.halves:
            smaller = Downsample(widths[level], AROUND, makes.numerics, makes.rngs)
            self.downsamplers = nnx.List([smaller])

    def __call__(self, x: Image, time: Features, context: Text) -> list[Image]:
        kept: list[Image] = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, context)
            kept.append(x)
        if self.halves:
            kept.append(self.downsamplers[0](x))
        return kept


class MidBlock(Block):
    """A residual block, a transformer, and another residual block."""

    def __init__(self, makes: _Makes) -> None:
        width = makes.config.block_out_channels[-1]
        resnets = [makes.resnet(width, width) for _ in range(2)]
        attention = makes.attention(width, makes.config.heads[-1])
        super().__init__(resnets, [attention], remat=makes.numerics.remat)

    def __call__(self, x: Image, time: Features, context: Text) -> Image:
        return self.resnets[1](self.layer(0, x, time, context), time)


class UpBlock(Block):
    """A level on the way up, whose layers read an image of the way down too."""

    def __init__(self, makes: _Makes, number: int) -> None:
        config = makes.config
        widths, count = config.block_out_channels, config.layers_per_block + 1
        level = len(widths) - 1 - number
        width, above = widths[level], widths[max(level - 1, 0)]
        below = widths[min(level + 1, len(widths) - 1)]
        inputs = [below if i == 0 else width for i in range(count)]
        skips = [above if i == count - 1 else width for i in range(count)]
        attentions = None
        if config.up_block_types[number] == CROSS_UP:
            attentions = [makes.attention(width, config.heads[level]) for _ in range(count)]
        resnets = [makes.resnet(a + b, width) for a, b in zip(inputs, skips, strict=True)]
        super().__init__(resnets, attentions, remat=makes.numerics.remat)
        self.doubles = level > 0
        if self.doubles:
            self.upsamplers = nnx.List([Upsample(width, makes.numerics, makes.rngs)])

    def __call__(self, x: Image, time: Features, context: Text, kept: list[Image]) -> Image:
        """Return the image at the end of the level; the images that are read leave the list.

        Args:
            x: the image of the level below.
            time: embedding of the times.
            context: rows of the texts.
            kept: images of the way down that have not been read.
        """
        for i in range(len(self.resnets)):
            x = self.layer(i, jnp.concatenate([x, kept.pop()], axis=-1), time, context)
        if self.doubles:
            height, width = kept[-1].shape[1:3]
            x = self.upsamplers[0](x, (height, width))
        return x


class UNet(Component[UNetConfig]):
    """The U-Net of Stable Diffusion 1 and 2, and of smaller models of the same kind.

    Module paths are those of diffusers' `UNet2DConditionModel`. There is no dropout. Latents and
    predictions have their channels last.

    Args:
        config: sizes and constants.
        numerics: dtypes, and whether the backward pass computes layers again.
        rngs: source of random parameters, which `nys.diffusion.load_unet` reads from a file.

    Examples:
        >>> sizes = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
        >>> kinds = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
        >>> kinds |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        >>> config = UNetConfig(**sizes, **kinds, attention_head_dim=2, cross_attention_dim=6)
        >>> unet = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
        >>> unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.kernel.shape
        (6, 4)
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig, *, numerics: Numerics = FLOAT32, rngs: nnx.Rngs) -> None:
        self.config, self.numerics = config, numerics
        widths, groups = config.block_out_channels, config.norm_num_groups
        makes, levels = _Makes(config, numerics, rngs), range(len(widths))
        self.conv_in = conv(config.in_channels, widths[0], numerics, rngs)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], numerics, rngs)
        self.down_blocks = nnx.List([DownBlock(makes, level) for level in levels])
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(makes)
        self.up_blocks = nnx.List([UpBlock(makes, number) for number in levels])
        self.conv_norm_out = group_norm(widths[0], groups, config.norm_eps, numerics, rngs)
        self.conv_out = conv(widths[0], config.out_channels, numerics, rngs)

    @full_precision
    def __call__(
        self,
        latents: ArrayLike,
        timesteps: ArrayLike,
        context: ArrayLike,
    ) -> Float[Array, "batch height width channels"]:
        """Return what the model predicts: noise, or v of Salimans and Ho, 2022, as it was trained.

        Args:
            latents: noisy latents, (batch, height, width, channels).
            timesteps: time of each of them, from 0 to 999, or one time for all.
            context: rows of the text of each, (batch, length, width), as the text encoder returns
                them.

        Raises:
            ValueError: on arrays of other shapes, and latents or context that are not floats.
        """
        x, context = as_array("latents", latents), as_array("context", context)
        times = jnp.asarray(timesteps)
        batch, channels = x.shape[:1], self.config.in_channels
        floating, is_text = (jnp.issubdtype(each.dtype, jnp.floating) for each in (x, context))
        if x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape or not floating:
            raise ValueError(
                f"latents are {x.dtype} of shape {x.shape}; expected floats (batch, height, width, "
                f"{channels}), the channels last"
            )
        width = self.config.cross_attention_dim
        fits = context.ndim == 3 and context.shape[::2] == (*batch, width)
        if not (fits and is_text) or 0 in context.shape:
            raise ValueError(
                f"context is {context.dtype} of shape {context.shape}; expected floats "
                f"({batch[0]}, length, {width}), as the text encoder returns them"
            )
        if times.shape not in ((), batch):
            raise ValueError(f"timesteps have shape {times.shape}; expected {batch}, or none")
        dtype = self.numerics.compute_dtype or self.numerics.dtype
        x, context = split_batch(x.astype(dtype)), context.astype(dtype)
        angles = sinusoids(jnp.broadcast_to(times, batch), self.config.block_out_channels[0])
        time = self.time_embedding(angles.astype(dtype))
        x = self.conv_in(x)
        kept = [x]
        for block in self.down_blocks:
            kept += block(x, time, context)
            x = kept[-1]
        if self.config.mid_block_type is not None:
            x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, time, context, kept)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def is_pointwise(self, layer: str) -> bool:
        """Return whether files hold a linear layer as a convolution with a kernel of one pixel.

        Args:
            layer: path of the layer.
        """
        return not self.config.use_linear_projection and layer.endswith(("proj_in", "proj_out"))
