"""A run that is ready to train: its examples, its model with adapters, and its plan."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping
from functools import partial

import jax
import numpy as np
from flax import nnx
from flax.nnx.filterlib import Filter
from jaxtyping import Array

from nyscaled import models
from nyscaled.finetune import batches, inputs, meshes, training
from nyscaled.finetune.batches import Batch, Batches
from nyscaled.finetune.chosen import method_options, require_method
from nyscaled.finetune.config import Config
from nyscaled.finetune.described import Described, of_task
from nyscaled.finetune.encoding import Lengths
from nyscaled.finetune.evaluation import encode_scored
from nyscaled.finetune.identity import Digest, of_examples, of_texts
from nyscaled.finetune.inputs import Examples
from nyscaled.finetune.loop import Plan
from nyscaled.finetune.methods import Method, method
from nyscaled.finetune.objectives import OBJECTIVES
from nyscaled.finetune.order import Order, Rows
from nyscaled.finetune.progress import say, timed
from nyscaled.finetune.samples import sampler
from nyscaled.finetune.schedules import schedule
from nyscaled.models import Tokenizer
from nyscaled.models.family import LanguageModel

PROGRAMS = 6
"""Most lengths of batches to train on, each a compiled program."""
VALIDATION_PROGRAMS = 3
STEPS_PER_PROGRAM = 20
"""Steps for which another length of batches is worth its compilation."""
GRADIENT_BATCHES = 8
"""Batches from which a start is made that needs a gradient."""
WARMUP = 0.03


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that is ready to train.

    Attributes:
        config: its settings.
        examples: its examples.
        model: the model, with adapters.
        tokenizer: the model's tokenizer.
        objective: name of the loss.
        plan: what is trained, and for how long.
        trained: filter of the trained variables.
        lengths: tokens of the examples to train on.
        head: names of new modules of the model.
        described: what the model is trained to do.
        digests: what distinguishes the encoded examples from others, by split.
    """

    config: Config
    examples: Examples
    model: LanguageModel
    tokenizer: Tokenizer
    objective: str
    plan: Plan
    trained: Filter
    lengths: Lengths
    head: tuple[str, ...]
    described: Described
    digests: dict[str, Digest]


def prepare(config: Config, *, outline: bool = False) -> Prepared:
    """Return a run that is ready to train.

    Args:
        config: the settings.
        outline: whether the model has shapes in place of values, and no weight is read.

    Raises:
        ValueError: on settings, data and models that do not go together.
    """
    require_method(config)
    chosen = method(config.method)
    options, hyperparameters = method_options(config)
    with timed(f"reading {'the outline of ' * outline}{config.model}"):
        read = models.outline if outline else partial(models.load, mesh=meshes.current())
        model, tokenizer = read(config.model, dtype=config.dtype, remat=config.remat)
        tokenizer = inputs.require_tokenizer(config.model, tokenizer)
    encoder = inputs.is_encoder(model)
    examples = inputs.read_examples(config, encoder=encoder, tokenizer=tokenizer)
    task, limit = examples.task, inputs.limit(config, model)
    objective = task.objective(encoder=encoder)
    if config.loss_on != "answer" and objective != "tokens":
        raise ValueError(
            f"loss_on is {config.loss_on!r}; expected 'answer' for the task {task.name}, whose "
            f"loss compares {'classes' if encoder else 'candidates'}"
        )
    if encoder and config.sample_every is not None:
        raise ValueError(
            f"sample_every is {config.sample_every}; expected None for an encoder, which generates "
            "no text"
        )
    (train, lengths), (validation, _) = (
        inputs.encode_all(part, tokenizer, task, config, limit, encoder=encoder)
        for part in (examples.train, examples.validation)
    )
    _require_scorable(config, examples, model, tokenizer)
    most = inputs.longest(model)
    fitted = _fitted(config, len(train))
    if fitted.batch_size < config.batch_size and not outline:
        say(
            f"batch_size is {config.batch_size} and there are {len(train)} examples to train on; "
            "a step takes all of them"
        )
    order, made = _batches(fitted, objective, train, tokenizer.pad_id or 0, most)
    steps = steps_of(config, order)
    if chosen.warmup is not None:
        hyperparameters.setdefault("warmup_steps", max(1, round(chosen.warmup * steps)))
    size = fitted.micro_batch_size or fitted.batch_size
    validating = batches.make(
        validation,
        objective,
        batch_size=size,
        programs=_programs(-(-len(validation) // size), VALIDATION_PROGRAMS),
        loss_on=config.loss_on,
        pad_id=tokenizer.pad_id or 0,
        most=most,
    )
    if outline and chosen.needs in ("gradient", "inputs"):
        chosen, options = dataclasses.replace(chosen, init="lora"), {}  # of the same shapes

    def build(model: LanguageModel) -> LanguageModel:
        nonlocal head, trained
        model, head = inputs.with_head(model, task.classes, config.seed)
        trained = _adapt(fitted, chosen, options, model, head, objective, made, order)
        return model

    head: tuple[str, ...] = ()
    trained: Filter = ...
    with timed(f"preparing {config.method}"):
        model = nnx.eval_shape(build, model) if outline else build(model)
        parts = training.split(model, trained)
        if not outline:
            arrays = meshes.placed((parts.params, parts.counts, parts.frozen))
            parts = parts._replace(params=arrays[0], counts=arrays[1], frozen=arrays[2])
    warmup = round(WARMUP * steps) if config.warmup_steps is None else config.warmup_steps
    peak = chosen.learning_rate if config.learning_rate is None else config.learning_rate
    plan = Plan(
        parts,
        training.program_of(
            parts, objective, chosen, weight_decay=config.weight_decay, clip=config.clip
        ),
        hyperparameters,
        made,
        order,
        validating,
        tuple(e.source for e in train),
        steps,
        schedule(config.schedule, peak, steps, warmup),
        fitted,
        None
        if config.sample_every is None or outline
        else sampler(model, tokenizer, task, examples.validation),
    )
    digests = {"train": of_examples(train), "validation": of_examples(validation)}
    if examples.test and examples.scored == "test":
        digests["test"] = of_texts(examples.test)
    return Prepared(
        config,
        examples,
        model,
        tokenizer,
        objective,
        plan,
        trained,
        lengths,
        head,
        of_task(
            task,
            config.template,
            encoder=encoder,
            tokenizer=tokenizer,
            own_prompts=all(example.own_prompt for example in examples.train),
        ),
        digests,
    )


def _fitted(config: Config, examples: int) -> Config:
    """The settings with batches that these examples fill, up to the size of their parts."""
    unit = config.micro_batch_size or meshes.parts_of(config.mesh)
    size = min(config.batch_size, -(-examples // unit) * unit)
    return dataclasses.replace(config, batch_size=size)


def steps_of(config: Config, order: Order) -> int:
    """Return the number of steps of a run.

    Args:
        config: the settings.
        order: the order of the examples.
    """
    return config.steps or max(1, math.ceil(config.epochs * order.steps_per_epoch))


def _require_scorable(
    config: Config, examples: Examples, model: LanguageModel, tokenizer: Tokenizer
) -> None:
    """Refuse test examples before the training that could not be scored after it."""
    if not examples.test:
        return
    try:
        encode_scored(
            model,
            tokenizer,
            examples.test,
            examples.task,
            max_length=config.max_length,
            allow_cut=config.allow_cut,
        )
    except ValueError as error:
        raise ValueError(f"the test examples cannot be scored: {error}") from error


def _programs(steps: int, most: int) -> int:
    return min(most, 1 + steps // STEPS_PER_PROGRAM)


def _batches(
    config: Config, objective: str, train: list[batches.Encoded], pad_id: int, most: int | None
) -> tuple[Order, Batches]:
    """The order of the examples, and what makes their batches."""

    def make(longest: Rows | None, programs: int = 1) -> Batches:
        return batches.make(
            train,
            objective,
            batch_size=config.batch_size,
            programs=programs,
            loss_on=config.loss_on,
            pad_id=pad_id,
            longest=longest,
            most=most,
        )

    order = Order(make(None).lengths, config.batch_size, config.seed)
    return order, make(order.longest(), _programs(steps_of(config, order), PROGRAMS))


def _adapt(
    config: Config,
    chosen: Method,
    options: Mapping[str, int | float | str],
    model: LanguageModel,
    head: tuple[str, ...],
    objective: str,
    made: Batches,
    order: Order,
) -> Filter:
    """Put adapters into a model; return the filter of what is trained."""

    def loss(model: LanguageModel, part: tuple[Batch, float | Array]) -> Array:
        micro_batch, count = part
        return OBJECTIVES[objective](model, micro_batch)[0] / count

    def some() -> Iterator[tuple[Batch, float]]:
        """Yield micro-batches, whose losses add up to the means of their batches."""
        number = config.batch_size // (config.micro_batch_size or config.batch_size)
        for step in range(min(GRADIENT_BATCHES, order.steps_per_epoch)):
            batch = made.batch(order.rows(step))
            counts = batch.valid if objective != "tokens" else batch.weights
            assert counts is not None
            parts = training.micro_batches(batch, number)
            for i in range(number):
                yield jax.tree.map(operator.itemgetter(i), parts), float(np.sum(counts))

    from_batches = chosen.needs in ("gradient", "inputs")
    return chosen.prepare(
        model,
        rank=config.rank,
        alpha=config.alpha or 2.0 * config.rank,
        targets=config.targets or inputs.default_targets(model),
        key=jax.random.key(config.seed),
        dropout=config.dropout,
        head=head,
        loss=loss if from_batches else None,
        batches=some() if from_batches else (),
        **options,
    )
