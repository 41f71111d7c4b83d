"""Means and variances of the latents of squares of images."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from nyscaled.diffusion import Autoencoder
from nyscaled.finetune.dreambooth.images import Corner, Picture
from nyscaled.finetune.training import Tree
from nyscaled.numerics import full_precision

Moments = Float[Array, "rows height width channels"]
"""Means of latents, and after them their log-variances."""


class Encoder:
    """The autoencoder, with one program for squares of any image.

    What it returned for the middle of an image is kept. A square image has no other square, so that
    it is encoded once.

    Args:
        autoencoder: the autoencoder of the pipeline.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.graphdef, self.state = nnx.split(autoencoder)
        self.config = autoencoder.config
        self._kept: dict[str, Moments] = {}

    def moments(self, picture: Picture, corner: Corner) -> Moments:
        """Return the moments of a square.

        Args:
            picture: the image.
            corner: where the square begins.
        """
        name = str(picture.path)
        if corner == picture.center and name in self._kept:
            return self._kept[name]
        square = picture.square(corner)[None]
        moments = encode(self.state, square, graphdef=self.graphdef)
        if corner == picture.center:
            self._kept[name] = moments
        return moments


@functools.partial(jax.jit, static_argnames="graphdef")
@full_precision
def encode(
    state: Tree,
    pixels: UInt8[Array | np.ndarray, "rows side side 3"],
    *,
    graphdef: nnx.GraphDef[Autoencoder],
) -> Moments:
    """Return the moments of squares of images, in float32.

    Args:
        state: the values of the autoencoder.
        pixels: the squares.
        graphdef: its structure.
    """
    images = jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1
    moments = nnx.merge(graphdef, state).moments(images)
    return jnp.concatenate(moments, axis=-1).astype(jnp.float32)
