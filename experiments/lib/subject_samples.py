"""Images that a base with trained adapters makes of noise."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import nyscaled as nys
from nyscaled.diffusion import Schedule


@functools.partial(jax.jit, static_argnames=("graphdef", "schedule", "steps"))
def samples(
    params: Any,
    kept: Any,
    frozen: Any,
    context: Any,
    empty: Any,
    noise: Any,
    guidance: Any,
    graphdef: Any,
    schedule: Schedule,
    steps: int,
) -> Any:
    """Return latents that a model with adapters makes of noise, by DDIM with guidance.

    Args:
        params: factors of one run.
        kept: what else its adapters hold.
        frozen: the base.
        context: what the U-Net reads of the prompt, (1, length, features).
        empty: what it reads of the empty prompt.
        noise: (images, height, width, channels).
        guidance: factor of the difference between the predictions for both.
        graphdef: structure of the U-Net with adapters.
        schedule: the noise of the base.
        steps: number of steps.
    """
    unet = nnx.merge(graphdef, params, kept, frozen)
    text = jnp.repeat(jnp.concatenate([empty, context]), len(noise), 0)

    def predict(latents: Any, time: Any) -> Any:
        both = unet(jnp.concatenate([latents, latents]), time, text)
        without, prompted = jnp.split(both, 2)
        return without + guidance * (prompted - without)

    return nys.diffusion.sample(predict, schedule, noise, steps=steps, sampler="ddim")
