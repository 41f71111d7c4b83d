"""Answers that a model generates, and what they count in each metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx

from nyscaled.finetune.answers import EXTRACTIONS, exact_match, first_word, number, number_after
from nyscaled.finetune.answers import token_f1 as f1
from nyscaled.finetune.encoding import Ends
from nyscaled.finetune.examples import Encoded, Example
from nyscaled.finetune.order import NONE, by_length
from nyscaled.finetune.task import Metric, Task
from nyscaled.models import Tokenizer, generate


def generated_texts(
    model: nnx.Module, tokenizer: Tokenizer, encoded: Sequence[Encoded], task: Task, size: int
) -> list[str]:
    """Return a generated answer of each example, with the most probable tokens.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        encoded: the examples.
        task: the task, which says where an answer ends.
        size: examples in a batch.
    """
    stops = _stop_tokens(model, tokenizer, task)
    new = generated_ids(model, [e.prompt for e in encoded], task.max_new_tokens, stops, size)
    return [_text(tokenizer.decode(ids), task.stop) for ids in new]


def generated_ids(
    model: nnx.Module,
    prompts: Sequence[tuple[int, ...]],
    count: int,
    stops: Sequence[int],
    size: int,
) -> list[list[int]]:
    """Return the most probable tokens after each prompt, up to a stop token and without it.

    Args:
        model: a causal language model.
        prompts: ids of each prompt.
        count: most tokens.
        stops: tokens that end a text.
        size: prompts in a batch.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for indices in by_length([len(prompt) for prompt in prompts], size):
        filling = prompts[indices[0]][:1]
        rows = [filling if i == NONE else prompts[i] for i in indices]
        width = max(map(len, rows))
        tokens = np.array([(*row, *[0] * (width - len(row))) for row in rows])
        mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
        new = generate(model, tokens, mask, max_new_tokens=count, stop_tokens=list(stops))
        for i, row in zip(indices, new.tolist(), strict=True):
            if i != NONE:
                texts[i] = row[: next((j for j, x in enumerate(row) if x in stops), len(row))]
    return texts


def _stop_tokens(model: nnx.Module, tokenizer: Tokenizer, task: Task) -> list[int]:
    ends = model.config.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
    stops = {*(ends if isinstance(ends, list | tuple) else [ends]), Ends.of(tokenizer).eos}
    if task.stop is not None:
        ids = tokenizer.encode(task.stop, add_special_tokens=False).ids
        stops |= set(ids) if len(ids) == 1 else set()
    return sorted(stop for stop in stops if stop is not None)


def _text(text: str, stop: str | None) -> str:
    # The stop text may also lie within a token.
    return (text if stop is None else text.strip(" ").partition(stop)[0]).strip()


def _first_word(example: Example, task: Task, text: str) -> dict[str, float]:
    word = first_word(text, task.words)
    return {"accuracy": float(word in example.golds), "unanswered": float(word is None)}


def _number(example: Example, _: Task, text: str) -> dict[str, float]:
    gold = number(example.golds[0])
    assert gold is not None
    # Rounded, as in MetaMath's evaluation: answers of GSM8K are whole.
    values = {name: number_after(text, marker) for name, marker in EXTRACTIONS.items()}
    right = {name: x is not None and round(x) == round(gold) for name, x in values.items()}
    unmarked = values["marker"] is None and values["hashes"] is None
    return {
        **{f"accuracy ({name})": float(hit) for name, hit in right.items()},
        "without marker": float(unmarked),
    }


def _f1(example: Example, _: Task, text: str) -> dict[str, float]:
    exact = exact_match(text, example.golds)
    return {"f1": f1(text, example.golds), "exact match": float(exact)}


METRICS: dict[Metric, Callable[[Example, Task, str], dict[str, float]]] = {
    "first_word": _first_word,
    "number": _number,
    "f1": _f1,
}
"""From an example, its task and a text to the values of a metric, from 0 to 1."""
