"""What each step of a run reads, and what its loss at fixed times is computed on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nyscaled.finetune.dreambooth.collection import Collection
from nyscaled.finetune.dreambooth.config import Config
from nyscaled.finetune.dreambooth.images import Corner, Picture
from nyscaled.finetune.dreambooth.latents import Encoder
from nyscaled.finetune.dreambooth.step import Batch, Grid, Objective
from nyscaled.finetune.training import Tree

TIMES = 10
"""Least number of times at which an image is evaluated."""
EVALUATED = 16
"""Most images that are evaluated."""
STEPS, GRID, SAMPLES, CLASS = range(1, 5)
"""Numbers of the keys of a run, by what is drawn with them."""


def key_of(config: Config, number: int) -> jax.Array:
    """Return a PRNG key of a run.

    Args:
        config: the settings, with the seed.
        number: what is drawn with it.
    """
    return jax.random.fold_in(jax.random.key(config.seed), number)


@dataclasses.dataclass(frozen=True)
class Data:
    """The images and the texts of a run.

    Attributes:
        config: its settings.
        encoder: the autoencoder.
        collections: images of the subject, and of its class if there are any.
        texts: their texts, a row for each, or the shape of these.
    """

    config: Config
    encoder: Encoder
    collections: tuple[Collection, ...]
    texts: Tree

    def batch(self, step: int) -> Batch:
        """Return what a step reads.

        Args:
            step: number of steps before it.
        """
        moments = jnp.concatenate([self.encoder.moments(*each) for each in self._chosen(step)])
        return Batch(moments, *self._constants)

    def sources(self, step: int) -> list[str]:
        """Return the names of the images that a step reads, for messages."""
        return [picture.path.name for picture, _ in self._chosen(step)]

    def _chosen(self, step: int) -> list[tuple[Picture, Corner]]:
        return [each for collection in self.collections for each in collection.of_step(step)]

    @functools.cached_property
    def _constants(self) -> tuple[Tree, jax.Array]:
        """What all steps read: the texts, and the key of the run."""
        return self.texts[: len(self.collections)], key_of(self.config, STEPS)

    def grid(self, objective: Objective) -> Grid:
        """Return the times and noises of evaluations.

        They depend on the seed and on the size of a batch, and not on the method. Times are the
        middles of equal parts of all, so that each image is evaluated at as many as a multiple of
        the batch size. Latents are means, of the square in the middle.

        Args:
            objective: what is minimized, with the noise of the pipeline.
        """
        pictures = self.collections[0].pictures[:EVALUATED]
        moments = jnp.concatenate([self.encoder.moments(p, p.center) for p in pictures])
        means, _ = jnp.split(moments, 2, axis=-1)
        rows = self.config.batch_size
        count = rows * -(-TIMES // rows)
        times = (np.arange(count) + 0.5) * objective.schedule.num_train_timesteps / count
        return Grid(
            objective.scaling_factor * means,
            self.texts[:1],
            jnp.asarray(times.astype(np.int32).reshape(-1, rows)),
            key_of(self.config, GRID),
        )
