"""An example of a task, as text and as token ids."""

from __future__ import annotations

import dataclasses


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
        source: file and line, such as "train.tsv:17".
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...] = ()
    label: int | None = None
    golds: tuple[str, ...] = ()
    second: str | None = None
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
        source: file and line of the example.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    label: int
    types: tuple[int, ...] = ()
    source: str = ""
