"""Score a language model, with or without an adapter, in a task.

DATA is a file or a folder with train, dev and test files (.json, .jsonl, .tsv). A .json file gets
the scores and what the model answers in each example.

examples:
  nyscaled evaluate --model MODEL --data glue/sst2 --task sst2
  nyscaled evaluate --model MODEL --adapter runs/rte/adapter --data glue/rte --task rte
  nyscaled evaluate --model MODEL --data gsm8k/test.jsonl --task gsm8k --out scores.json
  nyscaled evaluate --model MODEL --harness arc_easy,boolq   # tasks of lm-evaluation-harness
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nyscaled import models
from nyscaled.checkpoints.files import as_json
from nyscaled.cli import outputs
from nyscaled.finetune import described, identity, inputs
from nyscaled.finetune.evaluation import evaluate
from nyscaled.finetune.examples import Example
from nyscaled.finetune.harness import run_harness
from nyscaled.finetune.launch import digest_of_test
from nyscaled.finetune.records import HUB, Row, find_splits, read_split
from nyscaled.finetune.saving import load_adapter
from nyscaled.finetune.task import Task
from nyscaled.finetune.tasks import by_name
from nyscaled.models import BertClassifier, Tokenizer
from nyscaled.models.causal import CausalLM
from nyscaled.models.family import LanguageModel
from nyscaled.validation import require_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `nyscaled evaluate`."""

    model: str
    """Model: a folder, a GGUF file or a hub id."""
    adapter: Path | None = None
    """Folder of an adapter of this model, in PEFT's format, or of a prefix."""
    data: Path | None = None
    """File or folder of examples."""
    task: str | None = None
    """Task: how examples become prompts and answers."""
    template: str | None = None
    """Template of the prompts; by default that of the adapter's training, or the task's first."""
    split: str | None = None
    """Split of a folder: train, dev or test. By default test, or dev where no test example has a
    label."""
    examples: int | None = None
    """Score only so many examples, the first ones."""
    generated: bool = False
    """Read the answers of a task with candidates from generated text."""
    batch_size: int = 16
    """Examples in a batch."""
    max_length: int | None = None
    """Most tokens of an example with its candidates; the prompt's middle is cut. By default as many
    as the model reads; generated text has its room beside them."""
    allow_cut: float = 0.01
    """Share of examples that may be longer than that."""
    dtype: str = "float32"
    """Dtype of the model: float32, bfloat16, float16."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness (nyscaled[eval]), separated by commas, in place of a task.
    Tasks of your own are in the folder --data."""
    out: Path | None = None
    """A .json file for the scores, and what the model answers in each example."""
    overwrite: bool = False
    """Replace an existing file."""
    config: Path | None = None
    """YAML or TOML file of these options; flags override it."""


def run(config: Config) -> int:
    """Score a model, print the scores, and return 0.

    Args:
        config: the options.

    Raises:
        ValueError: on data, a task and a model that do not go together, and an adapter of another
            model.
        ImportError: if the harness is asked for and not installed.
        OSError: if a file cannot be read or written.
    """
    for name in ("examples", "batch_size", "max_length"):
        if getattr(config, name) is not None:
            require_count(name, getattr(config, name), low=1)
    for name in ("task", "template", "split", "max_length", "generated", "allow_cut"):
        value = getattr(config, name)
        if config.harness is not None and value != getattr(Config, name):
            raise ValueError(
                f"{name} is {value!r}; expected none with --harness, whose tasks have their own"
            )
    if config.split not in (None, "train", "dev", "test"):
        raise ValueError(
            f"split is {config.split!r}; expected train, dev or test (a file named validation is "
            "of dev)"
        )
    out = config.out
    if out is not None:
        if out.suffix != ".json":
            raise ValueError(f"out is {str(out)!r}; expected a name that ends in .json")
        outputs.require_writable([out], overwrite=config.overwrite)
    if config.adapter is not None:
        identity.require_adapter(config.adapter)
        identity.require_base(config.adapter, config.model)
    record = _in_task(config) if config.harness is None else _in_harness(config, config.harness)
    if out is not None:
        text = as_json(record)
        outputs.write({out: lambda path: _write(path, text)}, overwrite=config.overwrite)
    return 0


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _in_task(config: Config) -> dict[str, object]:
    if config.data is None or config.task is None:
        raise ValueError("data or task is missing; expected both, or --harness")
    task = by_name(config.task)
    trained = described.read(config.adapter or Path(config.model))
    template = config.template
    if template is None and trained is not None and trained["template"] in task.templates:
        template = trained["template"]
    split, rows = _labelled(config.data, config.split, task)
    model, tokenizer = _read(config)
    encoder = inputs.is_encoder(model)
    if encoder and config.generated:
        raise ValueError("generated is True and the model is an encoder; expected --no-generated")
    if encoder:
        task.objective(encoder=True)
        task = described.with_classes(task, trained)
        task = task.with_classes(_training_rows(config.data, task) or rows)
        model = _with_head(model, task, config.adapter)
    elif config.adapter is not None:
        load_adapter(model, config.adapter)
    examples = task.examples(
        rows[: config.examples], template, encoder=encoder, tokenizer=tokenizer
    )
    _compare_with_run(config.adapter, split, examples)
    result = evaluate(
        model,
        tokenizer,
        examples,
        task,
        batch_size=config.batch_size,
        max_length=config.max_length,
        allow_cut=config.allow_cut,
        generated=config.generated,
    )
    print(f"{result} of {split}")
    return {
        "task": task.name,
        "template": template,
        "split": split,
        "examples": len(examples),
        "scores": {name: score._asdict() for name, score in result.scores.items()},
        "predictions": [dataclasses.asdict(prediction) for prediction in result.predictions],
    }


def _compare_with_run(adapter: Path | None, split: str, examples: Sequence[Example]) -> None:
    """Say so where test examples are not those that the run of an adapter scored."""
    before = None if adapter is None or split != "test" else digest_of_test(adapter)
    if before is not None and before != identity.of_texts(examples):
        print(
            f"these {len(examples)} test examples are not the {before['examples']} that the run of "
            f"{adapter} scored; its scores are not comparable",
            file=sys.stderr,
        )


def _in_harness(config: Config, names: str) -> dict[str, object]:
    model, tokenizer = _read(config)
    if not isinstance(model, CausalLM):
        raise ValueError("the model is an encoder; expected a causal language model for --harness")
    if config.adapter is not None:
        load_adapter(model, config.adapter)
    scores = run_harness(
        model,
        tokenizer,
        names.split(","),
        name=config.model,
        folder=config.data,
        examples=config.examples,
        batch_size=config.batch_size,
    )
    for task, values in scores.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return {"scores": scores}


def _labelled(data: Path, split: str | None, task: Task) -> tuple[str, list[Row]]:
    """Return the split to score, the first one with labels by default, and its rows."""
    for name in ("test", "dev", "train") if split is None else ():
        if (rows := inputs.read_if_labelled(data, name, task)) is not None:
            return name, rows
    split = split or "test"
    return split, read_split(data, split, task.layouts)


def _training_rows(data: Path, task: Task) -> list[Row]:
    """Return the rows that say the classes of a task without classes of its own."""
    own = task.labels or str(data).startswith(HUB) or "train" not in find_splits(data)
    return [] if own else read_split(data, "train", task.layouts)


def _read(config: Config) -> tuple[LanguageModel, Tokenizer]:
    model, tokenizer = models.load(config.model, dtype=config.dtype)
    return model, inputs.require_tokenizer(config.model, tokenizer)


def _with_head(model: LanguageModel, task: Task, adapter: Path | None) -> LanguageModel:
    """Return an encoder with its own head for a task, or with that of an adapter."""
    own = isinstance(model, BertClassifier) and _same_classes(model.config.labels, task)
    if adapter is None:
        if not own:
            raise ValueError(
                f"the model has no head with the classes {', '.join(task.classes)}; expected "
                "--adapter, or a model that was trained for the task"
            )
        return model
    if not own:
        model, _ = inputs.with_head(model, task.classes, 0)
    assert isinstance(model, BertClassifier)
    before = np.asarray(model.classifier.kernel[...])
    load_adapter(model, adapter)
    if not own and np.array_equal(before, np.asarray(model.classifier.kernel[...])):
        raise ValueError(f"{adapter} has no head; expected one that was trained for the task")
    return model


def _same_classes(labels: Sequence[str], task: Task) -> bool:
    """Return whether a head has the classes of a task, or as many without a name."""
    spellings = [{x.lower() for x in own} for own in task.labels]
    return len(labels) == len(spellings) and all(
        label.lower() in {*own, f"label_{i}"}
        for i, (label, own) in enumerate(zip(labels, spellings, strict=True))
    )
