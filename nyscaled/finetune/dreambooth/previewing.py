"""What a run will do, before it is made: images, texts, layers and memory."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from nyscaled import lora
from nyscaled.diffusion import Pipeline
from nyscaled.finetune import training
from nyscaled.finetune.chosen import require_kind
from nyscaled.finetune.dreambooth.config import EXPECTED, Config
from nyscaled.finetune.dreambooth.data import STEPS, key_of
from nyscaled.finetune.dreambooth.latents import encode
from nyscaled.finetune.dreambooth.plan import Plan
from nyscaled.finetune.dreambooth.preparation import Prepared, opened, prepare
from nyscaled.finetune.dreambooth.step import Batch, train_step
from nyscaled.finetune.preview import memory_of

SHOWN = 5


def preview(config: Config) -> Iterator[str]:
    """Yield what a run will do, a line at a time; no weight is read and no file is written.

    Args:
        config: the settings of the run.

    Raises:
        ValueError: as `run` does, but for errors in weights.

    Examples:
        >>> from pathlib import Path
        >>> config = Config(model="absent", images=Path("i"), prompt="a sks", out=Path("run"))
        >>> next(preview(config))
        Traceback (most recent call last):
        ValueError: absent is not a folder; expected one with model_index.json
    """
    require_kind(config, Config, EXPECTED)
    pipe = opened(config, outline=True)
    prepared = prepare(config, pipe, outline=True)
    yield from _images(prepared)
    yield from _texts(config, pipe)
    yield from _layers(prepared)
    if config.mesh is None:
        yield from _memory(prepared)
    else:
        yield "memory: not known before the weights are read, with --mesh"


def _images(prepared: Prepared) -> Iterator[str]:
    pictures = prepared.plan.data.collections[0].pictures
    shown = ", ".join(f"{p.path.name} ({p.size[0]} × {p.size[1]})" for p in pictures[:SHOWN])
    more = ", …" if len(pictures) > SHOWN else ""
    yield f"{len(pictures)} images: {shown}{more}"
    side, crop = prepared.resolution, prepared.config.crop
    yield f"a step sees squares of {side} × {side} pixels, {crop} ones"
    if prepared.config.class_prompt is not None:
        own, count = len(prepared.class_pictures), prepared.config.class_count
        yield f"{count} images of the class, {count - own} of which the base will generate"


def _texts(config: Config, pipe: Pipeline) -> Iterator[str]:
    most = pipe.text_encoder.config.max_position_embeddings
    for text in filter(None, (config.prompt, config.class_prompt)):
        tokens = pipe.tokenizer.encode(text).tokens
        yield f"{text!r} has {len(tokens)} tokens of {most}: {' '.join(tokens)}"


def _layers(prepared: Prepared) -> Iterator[str]:
    model, parts = prepared.model, prepared.plan.parts
    trained, others = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (parts.params, parts.frozen)
    )
    shown = f"{len(lora.adapted_layers(model.unet))} adapted layers of the U-Net"
    if model.text_encoder is not None:
        shown += f" and {len(lora.adapted_layers(model.text_encoder))} of the text encoder"
    yield f"{shown}; {trained:,} of {trained + others:,} numbers are trained"


def _memory(prepared: Prepared) -> Iterator[str]:
    """Compile a step and the encoder for shapes without values."""
    plan, side = prepared.plan, prepared.resolution
    if prepared.config.class_prompt is not None:
        plan = prepared.with_class(prepared.class_pictures)
    square = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
    encoder = plan.data.encoder
    encoding = encode.lower(encoder.state, square, graphdef=encoder.graphdef)
    yield memory_of(encoding.compile(), "encoding an image")
    moments = jax.eval_shape(
        lambda state, pixels: encode(state, pixels, graphdef=encoder.graphdef),
        encoder.state,
        square,
    )
    yield memory_of(_compiled(plan, moments), "a step")


def _compiled(plan: Plan, moments: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    rows = sum(collection.rows for collection in plan.data.collections)
    key = key_of(plan.config, STEPS)
    batch = jax.eval_shape(
        lambda x, texts: Batch(jnp.repeat(x, rows, axis=0), texts, key), moments, plan.data.texts
    )
    state = jax.eval_shape(
        lambda params: training.initial(plan.program, params, **plan.hyperparameters),
        plan.parts.params,
    )
    arguments = state, plan.parts.counts, plan.parts.frozen, batch, np.float32(0)
    lowered = train_step.lower(*arguments, program=plan.program, objective=plan.objective)
    return lowered.compile()
