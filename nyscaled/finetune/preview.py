"""What a run will do, before it is made: data, layers, memory and time."""

from __future__ import annotations

import itertools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from nyscaled import lora
from nyscaled.finetune import meshes, training
from nyscaled.finetune.batches import Row
from nyscaled.finetune.config import Config
from nyscaled.finetune.examples import overlap
from nyscaled.finetune.launch import scored
from nyscaled.finetune.loop import Plan
from nyscaled.finetune.preparation import Prepared, prepare
from nyscaled.models import Tokenizer

SHOWN = 3
OPEN, CLOSE = "⟦", "⟧"
"""What stands around the tokens that the loss counts."""
GB = 1e9


def preview(config: Config) -> Iterator[str]:
    """Yield what a run will do, a line at a time; nothing is trained and no file is written.

    Everything up to the memory is known before a weight is read. The time is that of two steps and
    two validations on the longest batches, and of scoring a batch of test examples twice, each
    times their number.

    Args:
        config: the settings of the run.

    Raises:
        ValueError: as `run` does.
    """
    outline = prepare(config, outline=True)
    yield from _data(outline)
    yield from _layers(outline)
    if config.mesh is None:
        yield from _memory(outline.plan)
    else:
        yield "memory: not known before the weights are read, with --mesh"
    with meshes.using(config.mesh):
        yield from _time(prepare(config))


def shown(row: Row, tokenizer: Tokenizer) -> str:
    """Return the text of a row, with marks around what the loss counts.

    Args:
        row: a row of a batch.
        tokenizer: the model's tokenizer.
    """

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False)

    if not row.targets:
        return text(row.tokens)
    shown = text(row.tokens[: row.start + 1])
    counted = row.counted or (True,) * len(row.targets)
    for counts, group in itertools.groupby(
        zip(row.targets, counted, strict=True), operator.itemgetter(1)
    ):
        part = text([token for token, _ in group])
        shown += f"{OPEN}{part}{CLOSE}" if counts else part
    return shown


def _data(prepared: Prepared) -> Iterator[str]:
    examples, plan = prepared.examples, prepared.plan
    task, lengths = examples.task, prepared.lengths
    prompt = prepared.described["prompt"]
    template = "" if prompt is None else f", template {prompt['name']}"
    yield f"task {task.name} ({task.source}){template}; the loss is that of {prepared.objective}"
    for index in range(min(SHOWN, len(plan.train))):
        rows, label = plan.train.rows[index], plan.train.labels[index]
        row = rows[label if len(rows) > 1 else 0]
        text = shown(row, prepared.tokenizer).replace("\n", "\\n")
        answer = "" if row.targets else f" → {task.classes[label]}"
        yield f"  {plan.sources[index]}: {text}{answer}"
    yield f"train: {lengths}"
    yield f"validation: {len(examples.validation)} examples; test: {len(examples.test)}"
    for name in ("validation", "test"):
        same = overlap(examples.train, getattr(examples, name))
        if same:
            yield f"{len(same)} of the {name} examples are in train too, such as {same[0].source}"
    padded = _padded(plan)
    read = sum(plan.train.lengths) / plan.order.steps_per_epoch
    shapes = ", ".join(str(length) for length, _ in plan.train.shapes)
    waste = 1 - read / (plan.config.batch_size * float(np.mean(padded)))
    yield f"batches of {shapes} tokens; {waste:.0%} of them is padding"


def _padded(plan: Plan) -> Float[np.ndarray, " batches"]:
    """The length of each batch of the first epoch."""
    lengths = np.array([length for length, _ in plan.train.shapes])
    return lengths[np.searchsorted(lengths, plan.order.longest())].astype(float)


def _layers(prepared: Prepared) -> Iterator[str]:
    layers = lora.adapted_layers(prepared.model)
    count = 0
    for path, layer in layers.items():
        adapter = next(iter(layer.adapters.values()))
        count += math.prod(adapter.lora_a.shape[:-2])  # a stack is many layers
        yield f"  {path}: a {adapter.lora_a.shape}, b {adapter.lora_b.shape}"
    params = prepared.plan.parts.params
    trained = sum(x.size for x in jax.tree.leaves(params))
    others = sum(x.size for x in jax.tree.leaves(prepared.plan.parts.frozen))
    yield f"{count} adapted layers; {trained:,} of {trained + others:,} numbers are trained"


def _memory(plan: Plan) -> Iterator[str]:
    """Compile a step on the longest batch, from shapes alone."""
    state = jax.eval_shape(
        lambda params: training.initial(plan.program, params, **plan.hyperparameters),
        plan.parts.params,
    )
    batch = longest_batch(plan)
    parts = plan.parts
    lowered = training.train_step.lower(
        state, parts.counts, parts.frozen, batch, np.float32(0), program=plan.program
    )
    yield memory_of(lowered.compile(), "a step")


def memory_of(compiled: jax.stages.Compiled, what: str) -> str:
    """Return what to say of the memory of a program.

    Args:
        compiled: the program.
        what: what it computes.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return "memory: not known on this device"
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return (
        f"memory of {what}, compiled before any weight is read: {arguments / GB:.2f} GB of values "
        f"and {temporary / GB:.2f} GB of temporaries on each device"
    )


def longest_batch(plan: Plan) -> training.Batch:
    """Return a batch of the longest shape.

    Args:
        plan: the plan of a run.
    """
    return plan.batch(int(np.argmax(plan.order.longest())))


def _time(prepared: Prepared) -> Iterator[str]:
    plan = prepared.plan
    batch, state, loss = longest_batch(plan), plan.initial(), 0.0

    def step() -> None:
        nonlocal state, loss
        values = state, plan.parts.counts, plan.parts.frozen, batch, np.float32(0)
        state, measured = training.train_step(*values, program=plan.program)
        loss = float(measured.loss)
        jax.block_until_ready(state)

    first, longest = _seconds(step)
    yield f"a step on the longest batch takes {_duration(longest)}; the loss is {loss:.4f}"
    share = float(np.mean(_padded(plan)) / batch.tokens.shape[-1])
    validations = -(-plan.steps // plan.eval_every) + 1  # once more with what was written
    parts = {
        f"{plan.steps} steps": plan.steps * longest * share,
        f"{validations} validations": validations * _validation_seconds(plan),
        f"scores of {len(prepared.examples.test)} test examples": _scoring_seconds(prepared),
        f"compiling {len(plan.train.shapes)} programs, once": first * len(plan.train.shapes),
    }
    listed = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
    yield f"the run takes about {_duration(sum(parts.values()))}: {listed}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """The time of the first call, which compiles, and the mean of two others."""
    seconds: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds[0], (seconds[1] + seconds[2]) / 2


def _validation_seconds(plan: Plan) -> float:
    """The time of a validation, by its longest batch."""
    size = plan.config.micro_batch_size or plan.config.batch_size
    lengths = [batch.tokens.shape[-1] for _, batch in plan.validation.sorted(size)]
    _, batch = next(plan.validation.sorted(size))
    one = _seconds(lambda: training.validate(plan.parts.params, plan.parts, [batch], plan.program))
    return one[1] * sum(lengths) / lengths[0]


def _scoring_seconds(prepared: Prepared) -> float:
    """The time of the scores at the end, by the first of the test examples."""
    some = prepared.examples.test[: prepared.plan.config.batch_size]
    if not some:
        return 0.0
    one = _seconds(lambda: scored(prepared, some))
    return one[1] * len(prepared.examples.test) / len(some)
