"""The autoencoder of Stable Diffusion: images to latents of an eighth of their size, and back."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Key

from nyscaled.diffusion.component import Component
from nyscaled.diffusion.layers import (
    Downsample,
    Image,
    ResnetBlock2D,
    Upsample,
    conv,
    group_norm,
    pixel_conv,
)
from nyscaled.diffusion.settings import Settings
from nyscaled.diffusion.transformer import GROUP_EPS, Attention
from nyscaled.matrices import as_array
from nyscaled.models.blocks import FLOAT32, Numerics
from nyscaled.numerics import full_precision
from nyscaled.validation import is_concrete

AFTER = (0, 1), (0, 1)  # zeros below and to the right only, unlike the U-Net's
LOG_VARIANCES = -30.0, 20.0
_LARGEST = 2.0  # filters that resize an image go beyond −1 and 1, but less far than this


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Settings):
    """Sizes of an autoencoder, by their names in `config.json`; the defaults are diffusers'.

    Attributes:
        sample_size: side of the images that it was trained with.
        in_channels: number of channels of images.
        out_channels: the same.
        down_block_types: kind of each level of the encoder, of which there is one.
        up_block_types: kind of each level of the decoder, of which there is one.
        block_out_channels: number of channels at each level.
        layers_per_block: number of residual blocks at each level of the encoder. The decoder has
            one more.
        latent_channels: number of channels of latents.
        norm_num_groups: number of groups of the norms.
        scaling_factor: what latents are multiplied by, so that their variance is near 1.
        force_upcast: whether diffusers computes it in float32 where the others are float16.
    """

    class_name = "AutoencoderKL"
    fixed: ClassVar = {
        "act_fn": ("silu",),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    }

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool | None = True

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if getattr(self, name) != (kind,) * levels:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r:.200}; expected {kind} for each of "
                    f"{levels} levels"
                )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {width}; expected multiples of norm_num_groups, "
                    f"{self.norm_num_groups}"
                )

    @property
    def layers(self) -> int:
        """The number of residual blocks on the way down."""
        return len(self.block_out_channels) * self.layers_per_block


class PixelAttention(Attention):
    """Attention of all pixels to each other, with one head, beside the image."""

    def __init__(self, width: int, groups: int, numerics: Numerics, rngs: nnx.Rngs) -> None:
        super().__init__(width, width, 1, numerics, rngs, bias=True)
        self.group_norm = group_norm(width, groups, GROUP_EPS, numerics, rngs)

    def __call__(self, x: Image) -> Image:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, height, width, channels = x.shape
        rows = self.group_norm(x).reshape(batch, height * width, channels)
        return x + super().__call__(rows, rows).reshape(x.shape)


class Level(nnx.Module):
    """Residual blocks."""

    def __init__(
        self, inputs: int, width: int, count: int, groups: int, numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        options = width, None, groups, GROUP_EPS, numerics, rngs
        widths = (inputs, *(width for _ in range(count - 1)))
        self.resnets = nnx.List([ResnetBlock2D(each, *options) for each in widths])

    def __call__(self, x: Image) -> Image:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class DownLevel(Level):
    """Residual blocks, and after them half the size."""

    def __init__(
        self, inputs: int, width: int, count: int, groups: int, numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        super().__init__(inputs, width, count, groups, numerics, rngs)
        self.downsamplers = nnx.List([Downsample(width, AFTER, numerics, rngs)])

    def __call__(self, x: Image) -> Image:
        return self.downsamplers[0](super().__call__(x))


class UpLevel(Level):
    """Residual blocks, and after them twice the size."""

    def __init__(
        self, inputs: int, width: int, count: int, groups: int, numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        super().__init__(inputs, width, count, groups, numerics, rngs)
        self.upsamplers = nnx.List([Upsample(width, numerics, rngs)])

    def __call__(self, x: Image) -> Image:
        return self.upsamplers[0](super().__call__(x))


def _levels(
    kind: type[Level],
    widths: tuple[int, ...],
    count: int,
    groups: int,
    numerics: Numerics,
    rngs: nnx.Rngs,
) -> list[Level]:
    """The levels with these widths, of which the last keeps the size of images."""
    inputs = (widths[0], *widths[:-1])
    kinds = (*(kind for _ in widths[1:]), Level)
    parts = zip(kinds, inputs, widths, strict=True)
    return [make(a, b, count, groups, numerics, rngs) for make, a, b in parts]


class MidBlock(nnx.Module):
    """Residual blocks, with attention between them."""

    def __init__(self, width: int, groups: int, numerics: Numerics, rngs: nnx.Rngs) -> None:
        options = None, groups, GROUP_EPS, numerics, rngs
        self.resnets = nnx.List([ResnetBlock2D(width, width, *options) for _ in range(2)])
        self.attentions = nnx.List([PixelAttention(width, groups, numerics, rngs)])

    def __call__(self, x: Image) -> Image:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    """Images to means and log-variances of latents."""

    def __init__(self, config: AutoencoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], numerics, rngs)
        count = config.layers_per_block
        self.down_blocks = nnx.List(_levels(DownLevel, widths, count, groups, numerics, rngs))
        self.mid_block = MidBlock(widths[-1], groups, numerics, rngs)
        self.conv_norm_out = group_norm(widths[-1], groups, GROUP_EPS, numerics, rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, numerics, rngs)

    def __call__(self, x: Image) -> Image:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to images."""

    def __init__(self, config: AutoencoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[0], numerics, rngs)
        self.mid_block = MidBlock(widths[0], groups, numerics, rngs)
        count = config.layers_per_block + 1
        self.up_blocks = nnx.List(_levels(UpLevel, widths, count, groups, numerics, rngs))
        self.conv_norm_out = group_norm(widths[-1], groups, GROUP_EPS, numerics, rngs)
        self.conv_out = conv(widths[-1], config.out_channels, numerics, rngs)

    def __call__(self, x: Image) -> Image:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Autoencoder(Component[AutoencoderConfig]):
    """The variational autoencoder of Stable Diffusion (Rombach et al., 2022).

    Module paths are those of diffusers' `AutoencoderKL`. Images have values from −1 to 1, and their
    channels last.

    Args:
        config: sizes and constants.
        numerics: dtypes.
        rngs: source of random parameters, which `nys.diffusion.load` reads from a file.

    Examples:
        >>> kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2)
        >>> kinds |= dict(up_block_types=("UpDecoderBlock2D",) * 2)
        >>> config = AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=2, **kinds)
        >>> model = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
        >>> model.decoder.up_blocks[0].resnets[0].conv1.kernel.shape
        (3, 3, 8, 8)
    """

    config_class = AutoencoderConfig
    older: ClassVar = {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }

    def __init__(
        self, config: AutoencoderConfig, *, numerics: Numerics = FLOAT32, rngs: nnx.Rngs
    ) -> None:
        self.config, self.numerics = config, numerics
        channels = config.latent_channels
        self.encoder = Encoder(config, numerics, rngs)
        self.quant_conv = pixel_conv(2 * channels, 2 * channels, numerics, rngs)
        self.post_quant_conv = pixel_conv(channels, channels, numerics, rngs)
        self.decoder = Decoder(config, numerics, rngs)

    @full_precision
    def moments(self, images: ArrayLike) -> tuple[Image, Image]:
        """Return means and log-variances of latents, which are not scaled.

        Args:
            images: images (batch, height, width, channels) with values from −1 to 1. Height and
                width are multiples of 2 to the number of levels but one, 8 in Stable Diffusion.

        Raises:
            ValueError: on an array of another shape, and on known values beyond −2 and 2.
        """
        x = self._checked("images", images, self.config.in_channels)
        if is_concrete(x) and (largest := float(jnp.max(jnp.abs(x)))) > _LARGEST:
            raise ValueError(
                f"images have values of size {largest:g}; expected values from −1 to 1 (x / 127.5 "
                "− 1 of pixels from 0 to 255)"
            )
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"images have {x.shape[1]} × {x.shape[2]} pixels; expected multiples of {factor}"
            )
        means, log_variances = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return means, jnp.clip(log_variances, *LOG_VARIANCES)

    def encode(
        self, images: ArrayLike, *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch height width channels"]:
        """Return latents as the U-Net reads them: scaled.

        Args:
            images: as in `moments`.
            key: PRNG key by which latents are drawn; None for their means.

        Raises:
            ValueError: as `moments` does.
        """
        means, log_variances = self.moments(images)
        if key is not None:
            deviation = jnp.exp(log_variances.astype(jnp.float32) / 2)
            means = means + deviation * jax.random.normal(key, means.shape)
        return self.config.scaling_factor * means

    @full_precision
    def decode(self, latents: ArrayLike) -> Float[Array, "batch height width channels"]:
        """Return images, with values from −1 to 1 but for errors of the model.

        Args:
            latents: latents as `encode` returns them, (batch, height, width, channels).

        Raises:
            ValueError: on an array of another shape.
        """
        x = self._checked("latents", latents, self.config.latent_channels)
        return self.decoder(self.post_quant_conv(x / self.config.scaling_factor))

    def _checked(self, name: str, value: ArrayLike, channels: int) -> Array:
        x = as_array(name, value)
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        if x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape or not floating:
            raise ValueError(
                f"{name} are {x.dtype} of shape {x.shape}; expected floats "
                f"(batch, height, width, {channels})"
            )
        return x.astype(self.numerics.compute_dtype or self.numerics.dtype)
