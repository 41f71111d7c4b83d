"""Texts that a model generates while it is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from nyscaled.finetune.encoding import encode
from nyscaled.finetune.examples import Encoded, Example
from nyscaled.finetune.generated import generated_texts
from nyscaled.finetune.inputs import longest
from nyscaled.finetune.task import Task
from nyscaled.models import Tokenizer

FILE = "samples.jsonl"
COUNT = 3


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Generates an answer to the first examples for validation.

    Attributes:
        tokenizer: the model's tokenizer.
        task: the task, which says where an answer ends.
        examples: the examples.
        encoded: their prompts.
    """

    tokenizer: Tokenizer
    task: Task
    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]

    def lines(self, model: nnx.Module, step: int) -> list[dict[str, str | int]]:
        """Return what a model answers, beside the right answer.

        Args:
            model: the model.
            step: number of steps that it was trained for.
        """
        texts = generated_texts(model, self.tokenizer, self.encoded, self.task, len(self.encoded))
        return [
            {"step": step, "source": e.source, "generated": text, "right": e.answer}
            for e, text in zip(self.examples, texts, strict=True)
        ]


def sampler(
    model: nnx.Module, tokenizer: Tokenizer, task: Task, examples: Sequence[Example]
) -> Sampler:
    """Return what generates answers to some of these examples.

    Args:
        model: a causal language model; its values are not read.
        tokenizer: its tokenizer.
        task: the task.
        examples: examples for validation.
    """
    own = longest(model)
    limit = None if own is None else max(2, own - task.max_new_tokens)
    some = tuple(examples[:COUNT])
    encoded, _ = encode(some, tokenizer, answers="none", max_length=limit, allow_cut=1)
    return Sampler(tokenizer, task, some, tuple(encoded))


def append(folder: Path, lines: Sequence[dict[str, str | int]]) -> None:
    """Write lines at the end of `samples.jsonl`.

    Args:
        folder: folder of the run.
        lines: the lines.
    """
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
