"""Images of texts: noise, a sampler with guidance, and the decoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from nyscaled.diffusion.autoencoder import Autoencoder
from nyscaled.diffusion.pipeline import Pipeline, parts, quiet_parts
from nyscaled.diffusion.samplers import sample
from nyscaled.diffusion.schedule import Latents, Schedule
from nyscaled.diffusion.unet import UNet
from nyscaled.matrices import as_array
from nyscaled.validation import (
    is_concrete,
    require_count,
    require_finite,
    require_key,
    require_scalar,
)


def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    key: Key[Array, ""],
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str = "ddim",
    negative: str = "",
    size: Sequence[int] | None = None,
    noise: Latents | None = None,
) -> Float[Array, "batch rows columns colors"]:
    """Return images of texts, with values from 0 to 1.

    The sampler is one compiled program per number of steps and shape. In it the U-Net is called
    with the prompts and with `negative` as one batch, and goes beyond the difference by the factor
    `guidance` (Ho and Salimans, 2021).

    Args:
        pipe: the pipeline.
        prompts: a text per image.
        key: PRNG key of the noise.
        steps: number of steps of the sampler.
        guidance: factor of the difference between the predictions for a prompt and for `negative`;
            1 for the plain predictions, at half the cost.
        sampler: "ddim", "plms", "euler" or "ddpm", as in `nys.diffusion.sample`.
        negative: text that the images are not to be like; not read if `guidance` is 1.
        size: height and width of images, multiples of 8 in Stable Diffusion; None for the size that
            the U-Net was trained with.
        noise: numbers from the normal distribution to begin with, (batch, height, width, channels)
            of latents, in place of `size` and of what `key` draws.

    Raises:
        ValueError: on a key or a guidance that is not one key or one number, a size that is not a
            multiple, noise of another shape or that is not finite, and as `sample` does.

    Examples:
        >>> pipe = load("stable-diffusion-v1-4")  # doctest: +SKIP
        >>> images = generate(pipe, ["a photo of a dog"], key=jax.random.key(0))  # doctest: +SKIP
        >>> images.shape  # doctest: +SKIP
        (1, 512, 512, 3)
    """
    key = require_key("key", key)
    if np.ndim(guidance) != 0 or not is_concrete(guidance):
        raise ValueError(f"guidance is {guidance!r:.80}; expected one number, which is known")
    require_scalar("guidance", guidance, 0, float(jnp.finfo(jnp.float32).max), open_low=False)
    context = pipe.encode_texts(prompts)
    if guidance != 1:
        context = jnp.concatenate([pipe.encode_texts([negative] * len(prompts)), context])
    count, channels = len(prompts), pipe.unet.config.in_channels
    if noise is None:
        noise = jax.random.normal(key, (count, *_latent_size(pipe, size), channels))
    noise = as_array("noise", noise)
    require_finite("noise", noise)
    if noise.ndim != 4 or noise.shape[::3] != (count, channels):
        raise ValueError(
            f"noise has shape {noise.shape}; expected ({count}, height, width, {channels})"
        )
    fresh = jax.random.fold_in(key, 1) if sampler == "ddpm" else None
    latents = _sampled(
        *quiet_parts(pipe.unet),
        noise,
        context,
        jnp.float32(guidance),
        fresh,
        schedule=pipe.schedule,
        steps=require_count("steps", steps, 1),
        sampler=sampler,
    )
    return _decoded(*parts(pipe.autoencoder), latents)


def _latent_size(pipe: Pipeline, size: object) -> tuple[int, int]:
    factor = 2 ** (len(pipe.autoencoder.config.block_out_channels) - 1)
    trained = pipe.unet.config.sample_size
    if size is None:
        if trained is None:
            raise ValueError("size is None, and the U-Net has no sample_size; expected two sides")
        height, width = (trained, trained) if isinstance(trained, int) else trained
        return height, width
    sides = np.asarray(size)
    whole = sides.shape == (2,) and np.issubdtype(sides.dtype, np.integer)
    if not whole or (sides <= 0).any() or (sides % factor).any():
        raise ValueError(f"size is {size}; expected two multiples of {factor}")
    height, width = (sides // factor).tolist()
    return height, width


@functools.partial(jax.jit, static_argnums=0, static_argnames=("schedule", "steps", "sampler"))
def _sampled(
    graphdef: nnx.GraphDef[UNet],
    state: object,
    noise: Latents,
    context: Array,
    guidance: Array,
    key: Array | None,
    *,
    schedule: Schedule,
    steps: int,
    sampler: str,
) -> Latents:
    guided = len(context) > len(noise)

    def predict(x: Latents, time: Array) -> Latents:
        unet = nnx.merge(graphdef, state)  # made in the loop, whose trace it belongs to
        if not guided:
            return unet(x, time, context)
        without, prompted = jnp.split(unet(jnp.concatenate([x, x]), time, context), 2)
        return without + guidance * (prompted - without)

    return sample(predict, schedule, noise, steps=steps, sampler=sampler, key=key)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(graphdef: nnx.GraphDef[Autoencoder], state: object, latents: Latents) -> Array:
    images = nnx.merge(graphdef, state).decode(latents).astype(jnp.float32)
    return jnp.clip(images / 2 + 0.5, 0, 1)
