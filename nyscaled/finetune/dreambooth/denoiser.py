"""The models that a run trains: the U-Net, and the text encoder if it is asked for."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nyscaled.diffusion import Pipeline, TextEncoder, UNet

Rows = Float[Array, "rows length width"]
Tokens = Int[Array, "texts length"]
Text = Float[Array, "texts length width"] | Tokens
"""Rows of texts; their tokens where the text encoder is trained."""


class Denoiser(nnx.Module):
    """A U-Net, and the encoder of its texts if that is trained too.

    Args:
        unet: the U-Net.
        text_encoder: the text encoder; None where texts are encoded once, before the training.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder | None = None) -> None:
        self.unet, self.text_encoder = unet, text_encoder

    def context(self, texts: Text, count: int) -> Rows:
        """Return what the U-Net reads of the texts of some images.

        Args:
            texts: the texts, each of as many of the images as the others.
            count: number of images.
        """
        rows = jnp.asarray(texts) if self.text_encoder is None else self.text_encoder(texts)
        return jnp.repeat(rows, count // len(rows), axis=0)

    def pipeline(self, pipe: Pipeline) -> Pipeline:
        """Return a pipeline with these models.

        Args:
            pipe: the pipeline, whose other parts are kept.
        """
        text_encoder = pipe.text_encoder if self.text_encoder is None else self.text_encoder
        return dataclasses.replace(pipe, unet=self.unet, text_encoder=text_encoder)
