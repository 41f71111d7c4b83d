"""An example of a task, as text and as token ids; what is drawn from examples, and repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from nyscaled.validation import require_count

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example as text: what is shown, what is trained on, and what counts as right.

    Attributes:
        prompt: text before the answer; the first sentence for encoders.
        answer: what is trained on: `candidates[label]`, or free text with its end.
        candidates: answers that are scored against each other; empty for free text.
        label: index of the right candidate, of the first one where several are right.
        golds: right answers of tasks that generate text.
        second: the second sentence for encoders.
        turns: first and last character of the earlier answers in a conversation's prompt, on which
            is trained too.
        own_prompt: whether the row has the prompt itself, and no template made it.
        source: file and line, such as "train.tsv:17".
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...] = ()
    label: int | None = None
    golds: tuple[str, ...] = ()
    second: str | None = None
    turns: tuple[tuple[int, int], ...] = ()
    own_prompt: bool = False
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example as token ids. The ids of prompt and answer are encoded apart.

    Attributes:
        prompt: ids before the answer, with the token that begins a text where the tokenizer has
            one; for encoders the whole text with its special tokens.
        answers: ids of every candidate, or of the one answer with the token that ends a text;
            empty for encoders with a head.
        label: index into `answers`, or the class.
        types: token types of encoders.
        counted: which ids of the prompt are earlier answers; empty if none is.
        source: file and line of the example.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    label: int
    types: tuple[int, ...] = ()
    counted: tuple[bool, ...] = ()
    source: str = ""


def overlap(train: Sequence[Example], test: Sequence[Example]) -> list[Example]:
    """Return the test examples whose prompt occurs in the train set, regardless of the answer.

    Texts are compared in lower case, with white space of any kind taken as one space.

    Args:
        train: examples to train on.
        test: examples to score.

    Examples:
        >>> train = [Example("A fine film. It was", " great")]
        >>> test = [Example("a fine film.  It was", " great"), Example("Dull. It was", " terrible")]
        >>> [example.prompt for example in overlap(train, test)]
        ['a fine film.  It was']
    """
    seen = {_shown(example) for example in train}
    return [example for example in test if _shown(example) in seen]


def _shown(example: Example) -> tuple[str, ...]:
    texts = (example.prompt, example.second or "")
    return tuple(" ".join(text.lower().split()) for text in texts)


def few_shot(
    train: Sequence[T],
    validation: Sequence[T],
    seed: int,
    sizes: tuple[int, int, int] = (1000, 500, 1000),
) -> tuple[list[T], list[T], list[T]]:
    """Return train, dev and test examples, drawn as in MeZO (Malladi et al., 2023).

    A permutation of the train set gives train and dev examples: dev is the end of what is drawn,
    so that a small set leaves few to train on. A permutation of the validation set, by the same
    seed, gives the test examples.

    Args:
        train: the train set.
        validation: the validation set.
        seed: seed of NumPy's legacy generator.
        sizes: most examples for train, dev and test.

    Raises:
        ValueError: on a size that is not a count, or a train set that leaves no train example.

    Examples:
        >>> train, dev, test = few_shot(range(554), range(104), seed=0)
        >>> len(train), len(dev), len(test)
        (54, 500, 104)
    """
    for name, size in zip(("train", "dev", "test"), sizes, strict=True):
        require_count(f"the size of {name}", size, low=1)
    if len(train) <= sizes[1]:
        raise ValueError(
            f"the train set has {len(train)} examples; expected more than {sizes[1]}, which are "
            "for dev"
        )
    order = np.random.RandomState(seed).permutation(len(train))[: sizes[0] + sizes[1]]
    chosen = np.random.RandomState(seed).permutation(len(validation))[: sizes[2]]
    drawn = [train[i] for i in order]
    return drawn[: -sizes[1]], drawn[-sizes[1] :], [validation[i] for i in chosen]
