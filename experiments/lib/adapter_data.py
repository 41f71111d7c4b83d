"""Models and batches of examples for the runs of `adapter_runs`, by seed."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

import nyscaled as nys
from experiments.lib import upper_layers
from nyscaled.finetune import batches, inputs
from nyscaled.finetune.batches import Batches
from nyscaled.finetune.order import Order

LENGTHS = (16, 24, 40, 64)
"""Usual lengths of batches in tokens."""
EVALUATED = 32
"""Examples in a batch of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs have in common.

    Attributes:
        model: folder or file of the model.
        data: folder of the examples.
        task: the task.
        targets: regular expression of the layers that get adapters.
        rank: r.
        alpha: α.
        batch_size: examples in a step.
        examples: numbers of examples to train on, to validate and to test.
        lengths: lengths of batches in tokens; longer examples are cut at the last one.
        upper: how many of the upper layers are there, above states of the lower ones that are
            computed once; None for the whole model.
    """

    model: str
    data: Path
    task: str = "sst2"
    targets: str = r".*\.(query|value)"
    rank: int = 8
    alpha: float = 16.0
    batch_size: int = 8
    examples: tuple[int, int, int] = (1000, 500, 1000)
    lengths: tuple[int, ...] = LENGTHS
    upper: int | None = None

    @property
    def name(self) -> str:
        """What the record calls the setting: its values, the last two where they are not usual."""
        values = dataclasses.asdict(self)
        values |= {"model": Path(self.model).name, "data": self.data.name}
        if self.lengths == LENGTHS:
            del values["lengths"]
        if self.upper is None:
            del values["upper"]
        return " ".join(str(value).replace(" ", "") for value in values.values())

    def config(self, seed: int) -> nys.finetune.Config:
        """Return the settings by which the examples of a seed are read."""
        train, validation, test = self.examples
        return nys.finetune.Config(
            model=self.model,
            data=self.data,
            task=self.task,
            out=Path(),
            max_length=self.lengths[-1],
            allow_cut=1.0,
            train_examples=train,
            validation_examples=validation,
            test_examples=test,
            batch_size=self.batch_size,
            seed=seed,
        )


class Data(NamedTuple):
    """The task, the loss and the batches of a seed."""

    task: nys.finetune.Task
    objective: str
    train: Batches
    order: Order
    validation: Batches
    test: Batches


@functools.lru_cache(maxsize=1)
def load(model: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer."""
    return nys.models.load(model)


@functools.lru_cache(maxsize=1)
def halves(model: str, upper: int) -> tuple[Any, Any]:
    """Return the lower and the upper layers of a model, as `upper_layers.halves` does."""
    return upper_layers.halves(load(model)[0], upper)


@functools.lru_cache(maxsize=2)
def read(setting: Setting, seed: int, shuffled: bool = False) -> Data:
    """Return the batches of a seed.

    Args:
        setting: what all runs have in common.
        seed: chooses the examples and their order.
        shuffled: whether the labels to train on are permuted.
    """
    model, tokenizer = load(setting.model)
    encoder = inputs.is_encoder(model)
    config = setting.config(seed)
    examples = inputs.read_examples(config, encoder=encoder, tokenizer=tokenizer)
    # Tasks that are trained on the tokens of the answer have candidates too: these are compared.
    task = examples.task if encoder else dataclasses.replace(examples.task, trained_on="choice")
    objective = task.objective(encoder=encoder)

    def encoded(part: list[nys.finetune.Example]) -> list[nys.finetune.Encoded]:
        limit = inputs.limit(config, model)
        rows = inputs.encode_all(part, tokenizer, task, config, limit, encoder=encoder)[0]
        return rows if encoder else in_one_pass(rows)

    train = encoded(examples.train)
    if shuffled:
        labels = np.random.default_rng([seed, 1]).permutation([e.label for e in train])
        train = [dataclasses.replace(e, label=int(y)) for e, y in zip(train, labels, strict=True)]

    def make(part: list[nys.finetune.Encoded]) -> Batches:
        made = batches.make(
            part,
            objective,
            batch_size=setting.batch_size,
            programs=len(setting.lengths),
            pad_id=tokenizer.pad_id or 0,
            longest=setting.lengths,
        )
        if setting.upper is None:
            return made
        return upper_layers.with_states(made, halves(setting.model, setting.upper)[0], EVALUATED)

    made = make(train)
    order = Order(made.lengths, setting.batch_size, seed)
    validation, test = (make(encoded(part)) for part in (examples.validation, examples.test))
    return Data(task, objective, made, order, validation, test)


def in_one_pass(encoded: list[nys.finetune.Encoded]) -> list[nys.finetune.Encoded]:
    """Return examples whose candidates are one token each: what they share goes to the prompt.

    Examples with fewer or more candidates than most have are left out.

    Args:
        encoded: examples with candidates.

    Raises:
        ValueError: if the candidates differ in more than one token.

    Examples:
        >>> in_one_pass([nys.finetune.Encoded((1,), ((7, 8), (7, 9)), 0)])[0].prompt
        (1, 7)
    """
    counts = [len(example.answers) for example in encoded]
    most = max(set(counts), key=counts.count)
    rows: list[nys.finetune.Encoded] = []
    for example in encoded:
        if len(example.answers) != most:
            continue
        shared = example.answers[0][:-1]
        if any(answer[:-1] != shared for answer in example.answers):
            raise ValueError(
                f"answers are {example.answers}; expected ones with another last token"
            )
        last = tuple(answer[-1:] for answer in example.answers)
        rows.append(dataclasses.replace(example, prompt=example.prompt + shared, answers=last))
    return rows


def fresh(setting: Setting, data: Data, seed: int) -> tuple[Any, tuple[str, ...]]:
    """Return a model to train and the names of its new modules.

    Args:
        setting: what all runs have in common.
        data: says how many classes there are.
        seed: seed of a new head.
    """
    if setting.upper is not None:
        return nnx.clone(halves(setting.model, setting.upper)[1]), ()
    return inputs.with_head(nnx.clone(load(setting.model)[0]), data.task.classes, seed)
