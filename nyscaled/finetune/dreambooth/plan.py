"""What a run trains, on what, and for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nyscaled.finetune import meshes, training
from nyscaled.finetune.dreambooth import step as steps
from nyscaled.finetune.dreambooth.config import Config
from nyscaled.finetune.dreambooth.data import Data
from nyscaled.finetune.dreambooth.step import Grid, Objective
from nyscaled.finetune.training import Parts, Program, Tree
from nyscaled.finetune.updating import State


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run trains, on what, and for how long.

    Attributes:
        config: its settings.
        parts: the models, split for training.
        program: how they are put together, and their optimizer.
        objective: what is minimized.
        hyperparameters: numbers of the method, such as `damping`.
        data: the images and the texts.
        rate: learning rate of each step.
    """

    config: Config
    parts: Parts
    program: Program
    objective: Objective
    hyperparameters: dict[str, float]
    data: Data
    rate: Callable[[int], np.float32]

    def initial(self) -> State:
        """Return the state before the first step."""
        params = jax.tree.map(jnp.copy, self.parts.params)
        return meshes.placed(training.initial(self.program, params, **self.hyperparameters))

    def evaluate(
        self, params: Tree, parts: Parts, grid: Grid
    ) -> tuple[float, Float[Array, "parts rows height width channels"]]:
        """Return the loss at fixed times, and the predictions there.

        Args:
            params: the trained variables.
            parts: the parts of the models.
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
