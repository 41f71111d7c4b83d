"""What U-Nets and autoencoders are made of: norms, convolutions, residual blocks, sizes.

Images have their channels last: (batch, height, width, channels).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from nyscaled.diffusion.convolution import convolve
from nyscaled.models.blocks import Numerics

Image = Float[Array, "batch _ _ _"]  # height, width and channels change from layer to layer
Features = Float[Array, "batch _"]

Padding = tuple[tuple[int, int], tuple[int, int]]

AROUND = (1, 1), (1, 1)  # zeros around an image, of which "SAME" would omit some at stride 2
# Traced once for each shape: models without values are made before their files are read.
KERNEL_INIT = jax.jit(nnx.initializers.lecun_normal(), static_argnums=(1, 2))
NO_PADDING = (0, 0), (0, 0)
LONGEST = 10_000  # the longest wavelength over 2π, in steps of diffusion


def group_norm(
    channels: int, groups: int, eps: float, numerics: Numerics, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    """Return a group norm whose variance does not cancel where the mean is large.

    Args:
        channels: number of channels.
        groups: number of groups, a divisor of `channels`.
        eps: what is added to variances.
        numerics: dtypes.
        rngs: required by Flax.
    """
    options = numerics.dtypes
    return nnx.GroupNorm(
        channels, groups, epsilon=eps, use_fast_variance=False, rngs=rngs, **options
    )


def linear(
    inputs: int, outputs: int, numerics: Numerics, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.Linear:
    """Return a linear layer.

    Args:
        inputs: number of features that come in.
        outputs: number of features that go out.
        numerics: dtypes.
        rngs: source of random parameters.
        use_bias: whether it has a bias.
    """
    options = numerics.dtypes
    return nnx.Linear(
        inputs, outputs, use_bias=use_bias, kernel_init=KERNEL_INIT, rngs=rngs, **options
    )


def conv(
    inputs: int,
    outputs: int,
    numerics: Numerics,
    rngs: nnx.Rngs,
    *,
    window: int = 3,
    stride: int = 1,
    padding: Padding = AROUND,
) -> nnx.Conv:
    """Return a convolution with a bias.

    Args:
        inputs: number of channels that come in.
        outputs: number of channels that go out.
        numerics: dtypes.
        rngs: source of random parameters.
        window: side of the kernel.
        stride: distance of its positions.
        padding: zeros before and after the rows, and the columns.
    """
    return nnx.Conv(
        inputs,
        outputs,
        (window, window),
        strides=stride,
        padding=padding,
        kernel_init=KERNEL_INIT,
        conv_general_dilated=convolve,
        rngs=rngs,
        **numerics.dtypes,
    )


def pixel_conv(inputs: int, outputs: int, numerics: Numerics, rngs: nnx.Rngs) -> nnx.Conv:
    """Return a convolution with a kernel of one pixel, and with a bias.

    Args:
        inputs: number of channels that come in.
        outputs: number of channels that go out.
        numerics: dtypes.
        rngs: source of random parameters.
    """
    return conv(inputs, outputs, numerics, rngs, window=1, padding=NO_PADDING)


class Downsample(nnx.Module):
    """A convolution with stride 2.

    Args:
        channels: number of channels.
        padding: zeros before and after the rows, and the columns.
        numerics: dtypes.
        rngs: source of random parameters.
    """

    def __init__(self, channels: int, padding: Padding, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, numerics, rngs, stride=2, padding=padding)

    def __call__(self, x: Image) -> Image:
        return self.conv(x)


class Upsample(nnx.Module):
    """Each pixel becomes 2 × 2 pixels, and a convolution follows.

    Args:
        channels: number of channels.
        numerics: dtypes.
        rngs: source of random parameters.
    """

    def __init__(self, channels: int, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, numerics, rngs)

    def __call__(self, x: Image, size: tuple[int, int] | None = None) -> Image:
        """Return an image of twice the size, or one row or column less.

        Args:
            x: the image.
            size: height and width of the result; None for twice those of `x`.
        """
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])


class ResnetBlock2D(nnx.Module):
    """Two convolutions beside the image, to which the time is added between them.

    Args:
        inputs: number of channels that come in.
        outputs: number of channels that go out.
        time_width: width of the embedding of times; None for a block without it.
        groups: number of groups of the norms.
        eps: what the norms add to variances.
        numerics: dtypes.
        rngs: source of random parameters.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        time_width: int | None,
        groups: int,
        eps: float,
        numerics: Numerics,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = group_norm(inputs, groups, eps, numerics, rngs)
        self.conv1 = conv(inputs, outputs, numerics, rngs)
        if time_width is not None:
            self.time_emb_proj = linear(time_width, outputs, numerics, rngs)
        self.norm2 = group_norm(outputs, groups, eps, numerics, rngs)
        self.conv2 = conv(outputs, outputs, numerics, rngs)
        if inputs != outputs:
            self.conv_shortcut = pixel_conv(inputs, outputs, numerics, rngs)
        self.is_resized = inputs != outputs

    def __call__(self, x: Image, time: Features | None = None) -> Image:
        inner = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            inner = inner + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        inner = self.conv2(jax.nn.silu(self.norm2(inner)))
        return inner + (self.conv_shortcut(x) if self.is_resized else x)


def sinusoids(times: Num[Array, " batch"], width: int) -> Features:
    """Return cosines and then sines of times, at frequencies from 1 down to 1/10,000.

    Args:
        times: times in steps of the diffusion.
        width: number of features, which is even.

    Examples:
        >>> sinusoids(jnp.zeros(1), 4)
        Array([[1., 1., 0., 0.]], dtype=float32)
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(LONGEST) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = times.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class TimestepEmbedding(nnx.Module):
    """Two layers that map sinusoids of times to features.

    Args:
        inputs: number of sinusoids.
        outputs: number of features.
        numerics: dtypes.
        rngs: source of random parameters.
    """

    def __init__(self, inputs: int, outputs: int, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.linear_1 = linear(inputs, outputs, numerics, rngs)
        self.linear_2 = linear(outputs, outputs, numerics, rngs)

    def __call__(self, x: Features) -> Features:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))
