"""Adapters of the models of a run, and what their starts are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.filterlib import Filter
from jaxtyping import Array

from nyscaled.finetune.dreambooth.config import TEXT_TARGETS, Config
from nyscaled.finetune.dreambooth.data import Data
from nyscaled.finetune.dreambooth.denoiser import Denoiser
from nyscaled.finetune.dreambooth.step import Batch, Objective
from nyscaled.finetune.methods import Method
from nyscaled.finetune.training import Tree

DRAWS = 32
"""Least number of images, times and noises from which a start is made that needs them."""

Drawn = tuple[Batch, Array, Tree]
"""What a step reads, its number, and the values of the models that get no adapters."""


def adapt(
    model: Denoiser,
    config: Config,
    chosen: Method,
    options: Mapping[str, int | float | str],
    objective: Objective,
    data: Data,
) -> Filter:
    """Put adapters into the models, in place; return the filter of what is trained.

    Starts from gradients or inputs are made from the first steps on images of the subject.

    Args:
        model: the models.
        config: the settings of the run.
        chosen: the method.
        options: options of its start.
        objective: what is minimized.
        data: the images and the texts.

    Raises:
        ValueError: as `Method.prepare` does.
    """
    targets = {"unet": config.targets, "text_encoder": TEXT_TARGETS}
    parts: dict[str, nnx.Module] = {"unet": model.unet}
    if model.text_encoder is not None:
        parts["text_encoder"] = model.text_encoder
    trained: Filter = ...
    for name, part in parts.items():
        source: dict[str, object] = {}
        if chosen.needs != "kernel":
            others = nnx.Dict({n: other for n, other in parts.items() if n != name})
            structure, values = nnx.split(others)
            source["loss"] = _loss_of(name, structure, objective)
            source["batches"] = _drawn(config, data, values)
        trained = chosen.prepare(
            part,
            rank=config.rank,
            alpha=config.alpha,
            targets=targets[name],
            key=jax.random.key(config.seed),
            **source,  # pyright: ignore[reportArgumentType]
            **options,  # pyright: ignore[reportArgumentType]
        )
    return trained


def _loss_of(
    name: str, structure: nnx.GraphDef[nnx.Dict[nnx.Module]], objective: Objective
) -> Callable[[nnx.Module, Drawn], Array]:
    """The loss of a step as a function of one model; the values of the others are arguments."""

    def loss(part: nnx.Module, drawn: Drawn) -> Array:
        batch, step, values = drawn
        models = {**nnx.merge(structure, values), name: part}
        return objective.loss(Denoiser(**models), batch, step)  # pyright: ignore[reportArgumentType]

    return loss


def _drawn(config: Config, data: Data, values: Tree) -> Iterator[Drawn]:
    for step in range(-(-DRAWS // config.batch_size)):
        yield data.batch(step), jnp.asarray(step), values
