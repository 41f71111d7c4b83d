"""A training step of Stable Diffusion 1's U-Net with adapters, compiled without its weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nyscaled as nys

SIDE, TEXT_LENGTH, RANK = 64, 77, 4  # latents of 512 × 512 pixels
CONFIG = nys.diffusion.UNetConfig(cross_attention_dim=768, sample_size=SIDE)
ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


def compile_unet_step(dtype: Any, remat: bool) -> tuple[Any, tuple[Any, Any, Any]]:
    """Return the compiled step of one image, and the base, the adapters and AdamW's state.

    Args:
        dtype: dtype of the base.
        remat: whether the backward pass computes layers again.
    """

    def build() -> Any:
        numerics = nys.models.Numerics(dtype, remat=remat)
        unet = nys.diffusion.UNet(CONFIG, numerics=numerics, rngs=nnx.Rngs(0))
        nys.lora.apply(unet, RANK, targets=ATTENTION, key=jax.random.key(0))
        return unet

    graphdef, params, base = nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)
    tx, schedule = optax.adamw(1e-4), nys.diffusion.Schedule()
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, base: Any, *batch: Any) -> Any:
        def loss(params: Any) -> Any:
            unet = nnx.merge(graphdef, params, base, copy=True)
            return nys.diffusion.denoising_loss(unet, schedule, *batch)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    latents = jax.ShapeDtypeStruct((1, SIDE, SIDE, CONFIG.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, TEXT_LENGTH, CONFIG.cross_attention_dim), jnp.float32)
    batch = (latents, context, latents, jax.ShapeDtypeStruct((1,), jnp.int32))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, base, *batch).compile()
    return compiled, (base, params, state)
