"""What a run trains on, and what each of its steps reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nyscaled.finetune import meshes, training
from nyscaled.finetune.dreambooth import step as steps
from nyscaled.finetune.dreambooth.collection import Collection
from nyscaled.finetune.dreambooth.config import Config
from nyscaled.finetune.dreambooth.images import Corner, Picture
from nyscaled.finetune.dreambooth.latents import Encoder
from nyscaled.finetune.dreambooth.step import Batch, Grid, Objective, Text
from nyscaled.finetune.training import Parts, Program, Tree
from nyscaled.finetune.updating import State

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
class Plan:
    """What a run trains on, and for how long.

    Attributes:
        config: its settings.
        parts: the U-Net, split for training.
        program: how it is put together, and its optimizer.
        objective: what is minimized.
        hyperparameters: numbers of the method, such as `damping`.
        encoder: the autoencoder.
        collections: images of the subject, and of its class if there are any.
        texts: rows of their texts, (collections, length, width), or their shape.
        rate: learning rate of each step.
    """

    config: Config
    parts: Parts
    program: Program
    objective: Objective
    hyperparameters: dict[str, float]
    encoder: Encoder
    collections: tuple[Collection, ...]
    texts: Tree
    rate: Callable[[int], np.float32]

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
    def _constants(self) -> tuple[Text, jax.Array]:
        """What all steps read: the text of each row, and the key of the run."""
        rows = [collection.rows for collection in self.collections]
        context = jnp.repeat(self.texts[: len(rows)], np.array(rows), axis=0)
        return context, key_of(self.config, STEPS)

    def grid(self) -> Grid:
        """Return the times and noises of evaluations.

        They depend on the seed and on the size of a batch, and not on the method. Times are the
        middles of equal parts of all, so that each image is evaluated at as many as a multiple of
        the batch size. Latents are means, of the square in the middle.
        """
        pictures = self.collections[0].pictures[:EVALUATED]
        moments = jnp.concatenate([self.encoder.moments(p, p.center) for p in pictures])
        means, _ = jnp.split(moments, 2, axis=-1)
        rows = self.config.batch_size
        count = rows * -(-TIMES // rows)
        times = (np.arange(count) + 0.5) * self.objective.schedule.num_train_timesteps / count
        return Grid(
            self.objective.scaling_factor * means,
            self.texts[:1],
            jnp.asarray(times.astype(np.int32).reshape(-1, rows)),
            key_of(self.config, GRID),
        )

    def initial(self) -> State:
        """Return the state before the first step."""
        params = jax.tree.map(jnp.copy, self.parts.params)
        return meshes.placed(training.initial(self.program, params, **self.hyperparameters))

    def evaluate(
        self, params: Tree, parts: Parts, grid: Grid
    ) -> tuple[float, Float[Array, "parts rows height width channels"]]:
        """Return the loss on fixed times and noises, and the predictions there.

        Args:
            params: the trained variables.
            parts: the parts of the U-Net.
            grid: the times and noises.
        """
        program = dataclasses.replace(self.program, graphdef=parts.evaluating, dtypes=parts.dtypes)
        loss, predictions = steps.evaluate(
            params,
            parts.counts,
            parts.frozen,
            grid,
            program=program,
            schedule=self.objective.schedule,
        )
        return float(loss), predictions
