"""A run that is ready to train: its images, its texts, and its models with adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from flax.nnx.filterlib import Filter

from nyscaled import diffusion
from nyscaled.diffusion import Pipeline
from nyscaled.diffusion.tokenizer import text_tokens
from nyscaled.finetune import meshes, training
from nyscaled.finetune.chosen import method_options
from nyscaled.finetune.dreambooth import images
from nyscaled.finetune.dreambooth.adapting import adapt
from nyscaled.finetune.dreambooth.collection import Collection
from nyscaled.finetune.dreambooth.config import Config
from nyscaled.finetune.dreambooth.data import Data
from nyscaled.finetune.dreambooth.denoiser import Denoiser
from nyscaled.finetune.dreambooth.images import Picture
from nyscaled.finetune.dreambooth.latents import Encoder
from nyscaled.finetune.dreambooth.plan import Plan
from nyscaled.finetune.dreambooth.step import Objective
from nyscaled.finetune.methods import method
from nyscaled.finetune.progress import timed
from nyscaled.finetune.schedules import schedule
from nyscaled.finetune.training import Tree

SUBJECT, CLASS = 1, 2
"""Seeds of what is drawn for each kind of images."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is ready to train, but for images of the class that are to be generated.

    Attributes:
        config: its settings.
        resolution: side of the images.
        model: the models that are trained, with adapters.
        trained: filter of the trained variables.
        plan: what is trained on images of the subject.
        class_pictures: images of the class that the user has.
        digests: hashes of the files of all images, by folder and name.
    """

    config: Config
    resolution: int
    model: Denoiser
    trained: Filter
    plan: Plan
    class_pictures: tuple[Picture, ...]
    digests: dict[str, dict[str, str]]

    def with_class(self, pictures: tuple[Picture, ...]) -> Plan:
        """Return the plan with images of the class.

        Args:
            pictures: the images.
        """
        config = self.config
        of_class = _collection(config, CLASS, pictures)
        objective = dataclasses.replace(
            self.plan.objective, prior_rows=of_class.rows, prior_weight=config.prior_weight
        )
        data = self.plan.data
        data = dataclasses.replace(data, collections=(*data.collections, of_class))
        return dataclasses.replace(self.plan, data=data, objective=objective)


def opened(config: Config, *, outline: bool = False) -> Pipeline:
    """Return the pipeline of a run.

    Args:
        config: the settings.
        outline: whether its models have shapes in place of values, and no weight is read.

    Raises:
        ValueError: as `nys.diffusion.load` does.
    """
    model, dtype, remat = config.model, config.dtype, config.remat
    with timed(f"reading {'the outline of ' * outline}{model}"):
        if outline:
            return diffusion.outline(model, dtype=dtype, remat=remat)
        return diffusion.load(model, dtype=dtype, remat=remat, mesh=meshes.current())


def prepare(config: Config, pipe: Pipeline, *, outline: bool = False) -> Prepared:
    """Return a run that is ready to train.

    Args:
        config: the settings.
        pipe: the pipeline; its U-Net gets adapters, and its text encoder if it is trained.
        outline: whether its models have shapes in place of values.

    Raises:
        ValueError: on settings, images and models that do not go together.
    """
    resolution = resolution_of(config, pipe)
    pictures = _read("images", config.images, resolution)
    class_pictures: tuple[Picture, ...] = ()
    if config.class_images is not None:
        class_pictures = _read("class_images", config.class_images, resolution, config.class_count)
        images.require_distinct(pictures, class_pictures)
    chosen = method(config.method)
    options, hyperparameters = method_options(config)
    if chosen.warmup is not None:
        hyperparameters.setdefault("warmup_steps", max(1, round(chosen.warmup * config.steps)))
    if outline and chosen.needs in ("gradient", "inputs"):
        chosen, options = dataclasses.replace(chosen, init="lora"), {}  # of the same shapes
    objective = Objective(pipe.schedule, pipe.autoencoder.config.scaling_factor, config.min_snr)
    subject = _collection(config, SUBJECT, pictures)
    with timed("encoding texts"):
        rows = texts(config, pipe, outline=outline)
    data = Data(config, Encoder(pipe.autoencoder), (subject,), rows)
    model = Denoiser(pipe.unet, pipe.text_encoder if config.train_text_encoder else None)
    trained: Filter = ...

    def build(model: Denoiser) -> Denoiser:
        nonlocal trained
        trained = adapt(model, config, chosen, options, objective, data)
        return model

    with timed(f"preparing {config.method}"):
        model = nnx.eval_shape(build, model) if outline else build(model)
        parts = training.split(model, trained)
        if not outline:
            arrays = meshes.placed((parts.params, parts.counts, parts.frozen))
            parts = parts._replace(params=arrays[0], counts=arrays[1], frozen=arrays[2])
    rates = config.learning_rate, config.steps, config.warmup_steps
    plan = Plan(
        config,
        parts,
        training.program_of(
            parts, "denoising", chosen, weight_decay=config.weight_decay, clip=config.clip
        ),
        objective,
        hyperparameters,
        data,
        schedule(config.schedule, *rates),
    )
    digests = {
        name: {picture.path.name: images.digest(picture.path) for picture in part}
        for name, part in (("images", pictures), ("class_images", class_pictures))
    }
    return Prepared(config, resolution, model, trained, plan, class_pictures, digests)


def resolution_of(config: Config, pipe: Pipeline) -> int:
    """Return the side of the images of a run.

    Args:
        config: the settings.
        pipe: the pipeline.

    Raises:
        ValueError: on a side that the models do not halve as often as they have levels, and where
            neither the settings nor the pipeline has one.
    """
    factor = 2 ** (len(pipe.autoencoder.config.block_out_channels) - 1)
    multiple = factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    trained, resolution = pipe.unet.config.sample_size, config.resolution
    if resolution is None and isinstance(trained, int):
        resolution = factor * trained
    if resolution is None:
        raise ValueError(
            f"resolution is None and the U-Net has the sample_size {trained}; expected a multiple "
            f"of {multiple}"
        )
    if resolution % multiple:
        raise ValueError(f"resolution is {resolution}; expected a multiple of {multiple}")
    return resolution


def texts(config: Config, pipe: Pipeline, *, outline: bool) -> Tree:
    """Return the texts of a run: the subject's, and the class's if there is one.

    They are tokens where the text encoder is trained, and else what it makes of them.

    Args:
        config: the settings.
        pipe: the pipeline.
        outline: whether its text encoder has shapes in place of values.
    """
    prompts = [text for text in (config.prompt, config.class_prompt) if text is not None]
    if not (outline or config.train_text_encoder):
        return meshes.placed(pipe.encode_texts(prompts))
    length, encoder = pipe.text_encoder.config.max_position_embeddings, pipe.text_encoder
    tokens = jnp.asarray(text_tokens(pipe.tokenizer, prompts, length))
    if config.train_text_encoder:
        return meshes.placed(tokens)
    return nnx.eval_shape(lambda model, tokens: model(tokens), encoder, tokens)


def _read(name: str, folder: Path, side: int, most: int | None = None) -> tuple[Picture, ...]:
    """The images of a folder, which has some."""
    files = images.files_of(name, folder)[:most]
    if not files and name == "images":
        raise ValueError(f"{name} is '{folder}', an empty folder; expected images")
    return tuple(images.read(path, side) for path in files)


def _collection(config: Config, number: int, pictures: tuple[Picture, ...]) -> Collection:
    seed = config.seed, number
    return Collection(pictures, config.batch_size, config.crop == "random", seed)
