"""The compiled step of training, and the loss on fixed times and noises.

All that a step draws is a function of the seed and of the number of steps before it. What it
measures stays on the device, so that the host does not wait for it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from nyscaled.diffusion import Schedule, denoising_loss
from nyscaled.finetune.dreambooth.denoiser import Denoiser, Text
from nyscaled.finetune.dreambooth.latents import Moments
from nyscaled.finetune.training import Program, Tree
from nyscaled.finetune.updating import State, updated
from nyscaled.numerics import full_precision

LOSS = "loss at fixed times"
"""What the loss on the times and noises of a `Grid` is called, in metrics with underscores."""

Latents = Float[Array, "rows height width channels"]


class Batch(NamedTuple):
    """What a step reads.

    Attributes:
        moments: moments of latents: those of the subject, then those of its class.
        texts: the subject's text, and that of its class.
        key: PRNG key of the run.
    """

    moments: Moments
    texts: Text
    key: Key[Array, ""]


class Grid(NamedTuple):
    """Times and noises that are the same in all evaluations.

    Attributes:
        latents: latents of images of the subject.
        texts: the subject's text.
        times: times of each image, in parts as large as a batch.
        key: PRNG key of the noises.
    """

    latents: Latents
    texts: Text
    times: Int[Array, "parts rows"]
    key: Key[Array, ""]


class Measured(NamedTuple):
    """What a step measured.

    Attributes:
        loss: the loss.
        gradient_norm: norm of the gradient, before clipping.
        finite: False if the step was not made, since the loss or the gradient was not finite.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    finite: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimized.

    Attributes:
        schedule: the noise of the pipeline.
        scaling_factor: what latents are multiplied by.
        min_snr: γ of the weights of times, None for equal ones.
        prior_rows: number of the last rows of a batch, which show the class.
        prior_weight: factor of their loss.
    """

    schedule: Schedule
    scaling_factor: float
    min_snr: float | None = None
    prior_rows: int = 0
    prior_weight: float = 1.0

    def loss(self, model: Denoiser, batch: Batch, step: Int[Array, ""]) -> Float[Array, ""]:
        """Return the loss of a step, at times and with latents and noises that it draws.

        Args:
            model: the models.
            batch: what they read.
            step: number of steps before it.
        """
        keys = jax.random.split(jax.random.fold_in(batch.key, step), 3)
        means, log_variances = jnp.split(batch.moments, 2, axis=-1)
        drawn = jax.random.normal(keys[0], means.shape)
        latents = self.scaling_factor * (means + jnp.exp(log_variances / 2) * drawn)
        noise = jax.random.normal(keys[1], latents.shape)
        count = self.schedule.num_train_timesteps
        times = jax.random.randint(keys[2], latents.shape[:1], 0, count)
        return denoising_loss(
            model.unet,
            self.schedule,
            latents,
            model.context(batch.texts, len(latents)),
            noise,
            times,
            min_snr=self.min_snr,
            prior_rows=self.prior_rows,
            prior_weight=self.prior_weight,
        )


def merged(program: Program, params: Tree, counts: Tree, frozen: Tree) -> Denoiser:
    """Return the models.

    Args:
        program: how they are put together.
        params: the trained variables.
        counts: counters of dropout.
        frozen: the values that are not trained.
    """
    return cast(Denoiser, program.merge(params, counts, frozen))


@functools.partial(jax.jit, static_argnames=("program", "objective"), donate_argnames="state")
@full_precision
def train_step(
    state: State,
    counts: Tree,
    frozen: Tree,
    batch: Batch,
    learning_rate: Float[Array, ""],
    *,
    program: Program,
    objective: Objective,
) -> tuple[State, Measured]:
    """Return the state after a step, and what was measured.

    Args:
        state: the state; its memory is given to the new one.
        counts: counters of dropout.
        frozen: the values that are not trained.
        batch: what the step reads.
        learning_rate: the learning rate of the step.
        program: how the models are put together, and their optimizer.
        objective: what is minimized.
    """

    def loss_of(params: Tree) -> Float[Array, ""]:
        return objective.loss(merged(program, params, counts, frozen), batch, state.step)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    new, norm = updated(state, loss, gradient, learning_rate, program.optimizer())
    return new, Measured(loss, norm, new.finite)


@functools.partial(jax.jit, static_argnames=("program", "schedule"))
@full_precision
def evaluate(
    params: Tree, counts: Tree, frozen: Tree, grid: Grid, *, program: Program, schedule: Schedule
) -> tuple[Float[Array, ""], Float[Array, "parts rows height width channels"]]:
    """Return the mean squared error on fixed times and noises, and the predictions.

    Args:
        params: the trained variables.
        counts: counters of dropout.
        frozen: the values that are not trained.
        grid: the times and noises.
        program: how the models are put together.
        schedule: the noise of the pipeline.
    """
    parts, rows = grid.times.shape
    context = merged(program, params, counts, frozen).context(grid.texts, rows)

    def of_part(index: Int[Array, ""]) -> tuple[Array, Array]:
        # Made here: with `remat`, flax refuses a model from outside of the loop.
        model = merged(program, params, counts, frozen)
        latents = jnp.broadcast_to(grid.latents[index // parts], (rows, *grid.latents.shape[1:]))
        noise = jax.random.normal(jax.random.fold_in(grid.key, index), latents.shape)
        times = grid.times[index % parts]
        prediction = model.unet(schedule.noisy(latents, noise, times), times, context)
        prediction = prediction.astype(jnp.float32)
        loss = denoising_loss(lambda *_: prediction, schedule, latents, context, noise, times)
        return loss, prediction

    losses, predictions = jax.lax.map(of_part, jnp.arange(len(grid.latents) * parts))
    return jnp.mean(losses), predictions
