"""A run of fine-tuning: from settings to a folder with a tested adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import yaml
from flax import nnx
from flax.nnx.filterlib import Filter
from jaxtyping import Array, Float

from nyscaled import lora, models
from nyscaled._files import replacing
from nyscaled.finetune import batches, inputs, loop, training
from nyscaled.finetune.batches import Batch, Batches
from nyscaled.finetune.config import Config, as_options, differences, from_options
from nyscaled.finetune.encoding import Lengths
from nyscaled.finetune.inputs import Examples
from nyscaled.finetune.loop import Plan
from nyscaled.finetune.methods import Method, method
from nyscaled.finetune.objectives import OBJECTIVES
from nyscaled.finetune.order import Order, Rows
from nyscaled.finetune.progress import timed
from nyscaled.finetune.records import HUB, find_splits
from nyscaled.finetune.tasks import by_name
from nyscaled.models import BertClassifier, Tokenizer
from nyscaled.models.family import LanguageModel

CONFIG, RECORD, RESULT, ADAPTER = "config.yaml", "run.json", "result.json", "adapter"
PROGRAMS = 6
"""Most lengths of batches to train on, each a compiled program."""
VALIDATION_PROGRAMS = 3
STEPS_PER_PROGRAM = 20
"""Steps for which another length of batches is worth its compilation."""
GRADIENT_BATCHES = 8
"""Batches from which a start is made that needs a gradient."""
WARMUP = 0.03


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        out: folder of the run; its `adapter` is in PEFT's format, or a whole model.
        steps: number of steps.
        best_step: number of steps before the validation with the lowest loss.
        validation_loss: that loss; the adapter is that of this step.
        accuracy: accuracy in that validation, None without candidates.
        difference: largest difference between scores of the trained model and of the saved one.
        parameters: number of trained numbers.
        seconds: time of the training.
    """

    out: Path
    steps: int
    best_step: int
    validation_loss: float
    accuracy: float | None
    difference: float
    parameters: int
    seconds: float


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


def run(config: Config) -> Result:
    """Fine-tune a model, and write an adapter that was read again and compared.

    The folder gets `config.yaml`, `run.json` (versions and command), `metrics.jsonl`, `adapter`,
    `result.json` and `checkpoints`. With `resume`, a run goes on after its newest checkpoint, and
    ends as it would have without the interruption.

    Args:
        config: the settings.

    Raises:
        ValueError: on settings, data and models that do not go together, a folder that has a run
            already, a run of other settings, and a loss that is not finite.
        OSError: if a file cannot be written.
        KeyboardInterrupt: after Ctrl-C, when the state is saved.

    Examples:
        >>> from nyscaled.finetune import Config
        >>> config = Config(model="model", data=Path("absent"), task="rte", out=Path("run"))
        >>> try:
        ...     run(config)
        ... except ValueError as error:
        ...     print(str(error)[:38])
        data is 'absent', which does not exist
    """
    method(config.method)
    by_name(config.task)
    if not str(config.data).startswith(HUB):
        find_splits(config.data)  # refused before a folder is made or a model is read
    finished = open_folder(config)
    if finished is not None:
        return finished
    prepared = prepare(config)
    began = time.perf_counter()
    trained = loop.train(prepared.plan, config.out)
    seconds = time.perf_counter() - began
    training.update(prepared.model, trained.variables)
    with timed("writing the adapter, and reading it again"):
        difference = save(prepared)
    parts = training.split(prepared.model, prepared.trained)
    validation = dataclasses.replace(prepared.plan, parts=parts).validate(parts.params)
    result = Result(
        config.out,
        trained.steps,
        trained.best.step,
        validation.loss,
        validation.accuracy,
        difference,
        count(prepared.plan.parts.params),
        round(seconds, 3),
    )
    _write_json(config.out / RESULT, dataclasses.asdict(result) | {"out": str(config.out)})
    return result


def open_folder(config: Config) -> Result | None:
    """Make or open the folder of a run; return the result of a run that is finished.

    Args:
        config: the settings.

    Raises:
        ValueError: if the folder has a run and is not to go on, or has one of other settings.
    """
    path = config.out / CONFIG
    if path.exists():
        if not config.resume:
            raise ValueError(f"{config.out} has a run; expected --resume, or another --out")
        saved = from_options(yaml.safe_load(path.read_text(encoding="utf-8")))
        if changed := differences(saved, config):
            shown = ", ".join(f"{k} was {old} and is {new}" for k, (old, new) in changed.items())
            raise ValueError(f"{config.out} has a run of other settings: {shown}")
        result = config.out / RESULT
        if result.exists():
            values = json.loads(result.read_text(encoding="utf-8"))
            return Result(**(values | {"out": config.out}))
        return None
    if config.resume:
        raise ValueError(
            f"{config.out} has no run; expected a folder with {CONFIG}, or no --resume"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    packages = ("nyscaled", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    _write_json(
        config.out / RECORD,
        {
            "command": shlex.join(sys.argv),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
            "devices": [str(device) for device in jax.devices()],
        },
    )
    with replacing(path) as file:
        file.write(yaml.safe_dump(as_options(config), sort_keys=False).encode())
    return None


def prepare(config: Config) -> Prepared:
    """Return a run that is ready to train.

    Args:
        config: the settings.

    Raises:
        ValueError: on settings, data and models that do not go together.
    """
    chosen = method(config.method)
    with timed(f"reading {config.model}"):
        model, tokenizer = inputs.read_model(config)
    encoder = inputs.is_encoder(model)
    examples = inputs.read_examples(config, encoder=encoder, tokenizer=tokenizer)
    task, longest = examples.task, inputs.longest(model)
    model, head = inputs.with_head(model, task, config.seed)
    objective = task.objective(encoder=encoder)
    (train, lengths), (validation, _) = (
        inputs.encode_all(part, tokenizer, task, config, longest, encoder=encoder)
        for part in (examples.train, examples.validation)
    )
    order, made = _batches(config, objective, train, tokenizer.pad_id or 0)
    steps = steps_of(config, order)
    size = config.micro_batch_size or config.batch_size
    validating = batches.make(
        validation,
        objective,
        batch_size=size,
        programs=_programs(-(-len(validation) // size), VALIDATION_PROGRAMS),
        loss_on=config.loss_on,
        pad_id=tokenizer.pad_id or 0,
    )
    trained, parts = _adapted(config, chosen, model, head, objective, made, order)
    warmup = round(WARMUP * steps) if config.warmup_steps is None else config.warmup_steps
    peak = chosen.learning_rate if config.learning_rate is None else config.learning_rate
    given = {"damping": config.damping, "ratio": config.ratio}
    plan = Plan(
        parts,
        training.program_of(
            parts, objective, chosen, weight_decay=config.weight_decay, clip=config.clip
        ),
        {name: value for name, value in given.items() if value is not None},
        made,
        order,
        validating,
        tuple(e.source for e in train),
        steps,
        training.schedule(config.schedule, peak, steps, warmup),
        config,
    )
    return Prepared(config, examples, model, tokenizer, objective, plan, trained, lengths, head)


def steps_of(config: Config, order: Order) -> int:
    """Return the number of steps of a run.

    Args:
        config: the settings.
        order: the order of the examples.
    """
    return config.steps or max(1, math.ceil(config.epochs * order.steps_per_epoch))


def _programs(steps: int, most: int) -> int:
    return min(most, 1 + steps // STEPS_PER_PROGRAM)


def _batches(
    config: Config, objective: str, train: list[batches.Encoded], pad_id: int
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
        )

    order = Order(make(None).lengths, config.batch_size, config.seed)
    return order, make(order.longest(), _programs(steps_of(config, order), PROGRAMS))


def _adapted(
    config: Config,
    chosen: Method,
    model: LanguageModel,
    head: tuple[str, ...],
    objective: str,
    made: Batches,
    order: Order,
) -> tuple[Filter, training.Parts]:
    """Put adapters into a model; return the filter of what is trained, and the parts."""

    def loss(model: LanguageModel, batch: Batch) -> Array:
        total, count = OBJECTIVES[objective](model, batch)
        return total / count

    def some() -> Iterator[Batch]:
        steps = min(GRADIENT_BATCHES, order.steps_per_epoch)
        return (made.batch(order.rows(step)) for step in range(steps))

    with timed(f"preparing {config.method}"):
        trained = chosen.prepare(
            model,
            rank=config.rank,
            alpha=config.alpha or 2.0 * config.rank,
            targets=config.targets or inputs.default_targets(model),
            key=jax.random.key(config.seed),
            dropout=config.dropout,
            head=head,
            loss=loss if chosen.needs != "kernel" else None,
            batches=some() if chosen.needs != "kernel" else (),
            **({} if config.scale is None else {"scale": config.scale}),
        )
        return trained, training.split(model, trained)


def save(prepared: Prepared) -> float:
    """Write what was trained, read it again, and return the largest difference of scores.

    Args:
        prepared: a run whose model has the trained variables.

    Raises:
        ValueError: if the saved model computes something else.
    """
    model, folder = prepared.model, prepared.config.out / ADAPTER
    expected = _scores(model, prepared)
    if lora.adapted_layers(model):
        lora.save_peft(
            model,
            folder,
            base_model=prepared.config.model,
            modules_to_save=[_path(model, name) for name in prepared.head],
            task_type="SEQ_CLS" if isinstance(model, BertClassifier) else "CAUSAL_LM",
        )
        prepared.tokenizer.save(folder)
        read = nnx.clone(model)
        lora.remove(read)
        for name in prepared.head:  # so that they must come from the file
            _blank(read, name)
        lora.load_peft(read, folder)
    else:
        models.save(model, folder, prepared.tokenizer)
        read, _ = models.load(folder, dtype=prepared.config.dtype)
    difference = float(np.max(np.abs(_scores(read, prepared) - expected)))
    limit = 1e-3 * max(1.0, float(np.max(np.abs(expected))))
    if not difference <= limit and prepared.config.dtype == "float32":
        raise ValueError(
            f"the scores of {folder} differ by {difference:.2g} from those of the trained model; "
            f"expected at most {limit:.2g}"
        )
    return difference


def _scores(model: nnx.Module, prepared: Prepared) -> Float[np.ndarray, "rows scores"]:
    """The scores of the longest batch for validation, whose program exists."""
    plan, parts = prepared.plan, training.split(model, prepared.trained)
    size = prepared.config.micro_batch_size or prepared.config.batch_size
    _, batch = next(plan.validation.sorted(size))
    program = dataclasses.replace(plan.program, graphdef=parts.evaluating, dtypes=parts.dtypes)
    state = parts.params, parts.counts, parts.frozen
    scores = np.asarray(training.evaluate_step(*state, batch, program=program)[2])
    return np.where(np.isfinite(scores), scores, 0.0)


def _path(model: nnx.Module, name: str) -> str:
    """The dotted path of a module of this name."""
    return next(
        ".".join(map(str, path)) for path, _ in nnx.iter_modules(model) if path[-1:] == (name,)
    )


def _blank(model: nnx.Module, name: str) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if name in path:
            variable[...] = jax.numpy.zeros_like(variable[...])


def count(params: training.Tree) -> int:
    """Return how many numbers are trained.

    Args:
        params: the trained variables.
    """
    return sum(x.size for x in jax.tree.leaves(params))


def _write_json(path: Path, values: object) -> None:
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
