"""What a run reads: examples of a task from files, and the model that learns them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from nyscaled.finetune.config import Config
from nyscaled.finetune.encoding import Lengths, encode, encode_sentences
from nyscaled.finetune.examples import Encoded, Example
from nyscaled.finetune.records import HUB, Row, UnlabelledError, find_splits, read_split
from nyscaled.finetune.task import Task
from nyscaled.finetune.tasks import by_name
from nyscaled.models import Bert, BertClassifier, Tokenizer
from nyscaled.models.family import LanguageModel

HELD_OUT = 10
"""One of so many training examples is for validation where the data have no dev split."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a run.

    Attributes:
        task: the task, with its classes.
        train: examples to train on.
        validation: examples for validation.
        test: examples for the scores at the end. Where the data have no test split, these are the
            examples for validation if their answers are generated, and none otherwise.
        scored: the split that they are of, "test" or "validation".
    """

    task: Task
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    scored: str


def read_examples(config: Config, *, encoder: bool, tokenizer: Tokenizer) -> Examples:
    """Return the examples of a run.

    Args:
        config: the settings of the run.
        encoder: whether the model is an encoder.
        tokenizer: has the chat template, for conversations.

    Raises:
        ValueError: on an unknown task, and data that are not of the task.
    """
    task = by_name(config.task)
    task.objective(encoder=encoder)
    rows = {"train": read_split(config.data, "train", task.layouts)}
    for name in ("dev", "test"):
        if (part := read_if_labelled(config.data, name, task)) is not None:
            rows[name] = part
    task = task.with_classes(rows["train"]) if encoder else task
    shuffled = _some(rows["train"], len(rows["train"]), config.seed)
    if "dev" not in rows:
        count = min(config.validation_examples or len(shuffled), len(shuffled) // HELD_OUT)
        rows["dev"], shuffled = shuffled[:count], shuffled[count:]
    if not shuffled or not rows["dev"]:
        raise ValueError(
            f"{config.data} has {len(rows['train'])} examples; expected some to train on and some "
            f"for validation (a dev split, or {HELD_OUT} examples at least)"
        )

    def examples(part: Sequence[Row]) -> list[Example]:
        return task.examples(part, config.template, encoder=encoder, tokenizer=tokenizer)

    validation = _some(rows["dev"], config.validation_examples, config.seed)
    return Examples(
        task,
        examples(shuffled[: config.train_examples]),
        examples(validation),
        examples(_some(rows["test"], config.test_examples, config.seed))
        if "test" in rows
        else examples(validation)
        if task.metric is not None and task.objective(encoder=encoder) == "tokens"
        else [],
        "test" if "test" in rows else "validation",
    )


def read_if_labelled(data: Path, split: str, task: Task) -> list[Row] | None:
    """Return the rows of a split; None if the data have none, or a test split without labels.

    A line on stderr says that the test split is left out.

    Args:
        data: a file, a folder, or a data set of the package datasets.
        split: name of the split.
        task: the task.
    """
    if str(data).startswith(HUB):
        try:
            rows = read_split(data, split, task.layouts)
        except ValueError:  # the data set was loaded as a whole: only the split can be missing
            return None
    elif split in find_splits(data):
        try:
            rows = read_split(data, split, task.layouts)
        except UnlabelledError as error:
            if split != "test":
                raise
            print(f"the test split is left out: {error}", file=sys.stderr)
            return None
    else:
        return None
    labels = {str(row.fields.get(name)) for row in rows for name in task.label} - {"None"}
    if split == "test" and task.label and labels <= {"-1"}:
        reason = "all its labels are -1, hidden ones" if labels else "it has no labels"
        print(f"the test split is left out: {reason}", file=sys.stderr)
        return None
    return rows


def _some(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """The first of these rows in an order that the seed chooses."""
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def encode_all(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    task: Task,
    config: Config,
    limit: int,
    *,
    encoder: bool,
) -> tuple[list[Encoded], Lengths]:
    """Return examples as ids for training, and their lengths.

    Args:
        examples: the examples.
        tokenizer: the model's tokenizer.
        task: the task.
        config: the settings of the run.
        limit: most tokens of an example.
        encoder: whether the model is an encoder.

    Raises:
        ValueError: if more examples are too long than the settings allow.
    """
    if encoder:
        return encode_sentences(examples, tokenizer, max_length=limit, allow_cut=config.allow_cut)
    return encode(
        examples,
        tokenizer,
        ends=task.ends,
        answers="candidates" if task.objective(encoder=False) == "choice" else "right",
        max_length=limit,
        allow_cut=config.allow_cut,
    )


def require_tokenizer(model: str, tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of a model; ValueError if it has none.

    Args:
        model: where the model is.
        tokenizer: its tokenizer, or None.
    """
    if tokenizer is None:
        raise ValueError(
            f"{model} has no tokenizer; expected a tokenizer.json beside the weights, or one in "
            "the GGUF file"
        )
    return tokenizer


def is_encoder(model: nnx.Module) -> bool:
    """Return whether a model is an encoder, which gets a head of its own."""
    return isinstance(model, Bert | BertClassifier)


def longest(model: nnx.Module) -> int | None:
    """Return the most tokens that a model reads, None for no limit.

    Args:
        model: the model.
    """
    if isinstance(model, Bert | BertClassifier):
        return model.config.max_position_embeddings
    return getattr(model, "max_length", None)


def limit(config: Config, model: LanguageModel) -> int:
    """Return the most tokens of an example.

    Args:
        config: the settings of the run.
        model: the model, which may read fewer.
    """
    own = longest(model)
    return config.max_length if own is None else min(config.max_length, own)


def with_head(
    model: LanguageModel, classes: tuple[str, ...], seed: int
) -> tuple[LanguageModel, tuple[str, ...]]:
    """Return a model with a head if it is an encoder, and the names of its new modules.

    Args:
        model: a model of a file.
        classes: classes of the head.
        seed: seed of the new head.
    """
    if isinstance(model, BertClassifier):
        if model.config.labels == classes:
            return model, ("classifier",)
        model = model.bert
    if not isinstance(model, Bert):
        return model, ()
    new = ("classifier",) if hasattr(model, "pooler") else ("classifier", "pooler")
    return BertClassifier(model, classes, rngs=nnx.Rngs(jax.random.key(seed))), new


def default_targets(model: LanguageModel) -> str:
    """Return the regular expression of all layers in the stack of a model.

    Args:
        model: the model.
    """
    return rf"(?:.*\.)?{model.family.stack_module}\..*"
