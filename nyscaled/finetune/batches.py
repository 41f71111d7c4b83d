"""Arrays of examples, of few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nyscaled.finetune import meshes
from nyscaled.finetune.examples import Encoded
from nyscaled.finetune.order import NONE, Rows, by_length, choose_lengths

Ids = tuple[int, ...]


class Batch(NamedTuple):
    """Arrays of some examples. Fields that an objective does not use are None.

    Attributes:
        tokens: ids, padded on the right. Rows are examples, or examples × candidates.
        mask: True at tokens.
        positions: where the next token is predicted; hidden states elsewhere reach no head.
        targets: the token that follows each position.
        weights: 1 at positions that count, 0 at padding.
        labels: the right candidate of each example, or its class.
        candidates: ids of candidates of one token each.
        types: token types of encoders.
        valid: False for examples that only fill the batch.
    """

    tokens: Int[Array | np.ndarray, "rows length"]
    mask: Bool[Array | np.ndarray, "rows length"]
    positions: Int[Array | np.ndarray, "rows answers"] | None
    targets: Int[Array | np.ndarray, "rows answers"] | None
    weights: Float[Array | np.ndarray, "rows answers"] | None
    labels: Int[Array | np.ndarray, " examples"] | None
    candidates: Int[Array | np.ndarray, " choices"] | None
    types: Int[Array | np.ndarray, "rows length"] | None
    valid: Bool[Array | np.ndarray, " examples"]


class Row(NamedTuple):
    """One row of a batch.

    Attributes:
        tokens: the tokens that are read.
        start: position from which on the next token is predicted.
        targets: these tokens.
        types: token types of encoders.
        counted: which of the targets count; all if it is empty.
    """

    tokens: Ids
    start: int = 0
    targets: Ids = ()
    types: Ids = ()
    counted: tuple[bool, ...] = ()


def one_pass(encoded: Sequence[Encoded]) -> Ids | None:
    """Return the ids of the candidates if each is one token, and the same for all examples.

    Args:
        encoded: the examples.

    Examples:
        >>> one_pass([Encoded((1, 2), ((7,), (8,)), 0), Encoded((3,), ((7,), (8,)), 1)])
        (7, 8)
    """
    first = encoded[0].answers
    same = all(e.answers == first for e in encoded)
    return tuple(a[0] for a in first) if same and all(len(a) == 1 for a in first) else None


def rows_of(example: Encoded, objective: str, loss_on: str, candidates: Ids | None) -> list[Row]:
    """Return the rows of an example.

    Args:
        example: the example.
        objective: "tokens", "choice" or "class".
        loss_on: "answer", or "all" for the prompt's tokens too.
        candidates: ids of candidates of one token each, or None.
    """
    prompt = example.prompt
    if objective == "class":
        return [Row(prompt, types=example.types or (0,) * len(prompt))]
    if objective == "choice" and candidates is not None:
        return [Row(prompt, len(prompt) - 1, (candidates[example.label],))]
    answers = example.answers if objective == "choice" else (example.answers[example.label],)
    rows: list[Row] = []
    for answer in answers:
        text = prompt + answer
        # The first token of a text follows nothing.
        start = 0 if loss_on == "all" and objective == "tokens" else max(len(prompt) - 1, 0)
        counted = ()
        if example.counted and loss_on == "answer":
            start = example.counted.index(True) - 1
            counted = (*example.counted[start + 1 :], *(True for _ in answer))
        rows.append(Row(text[:-1] or text, start, text[start + 1 :], counted=counted))
    return rows


@dataclasses.dataclass(frozen=True)
class Batches:
    """Makes the batches of a set of examples; `make` says how they are read.

    Attributes:
        rows: rows of each example.
        labels: label of each example.
        choices: rows of an example in a batch.
        candidates: ids of candidates of one token each, or None.
        shapes: length of batches, and most positions of a row in each.
        pad_id: id at padding.
    """

    rows: tuple[tuple[Row, ...], ...]
    labels: tuple[int, ...]
    choices: int
    candidates: Ids | None
    shapes: tuple[tuple[int, int], ...]
    pad_id: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each example: those of its longest row."""
        return _lengths(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, examples: Rows, among: Rows | None = None) -> Batch:
        """Return the arrays of some examples, with filling rows for `NONE`.

        Args:
            examples: indices of the examples.
            among: examples for which the arrays must be long enough; these by default.
        """
        chosen = [self.rows[i] if i != NONE else () for i in examples]
        among = examples if among is None else among
        lengths = (len(row.tokens) for i in among if i != NONE for row in self.rows[i])
        longest = max(1, max(lengths, default=1))
        length, answers = next(shape for shape in self.shapes if shape[0] >= longest)
        count = len(chosen) * self.choices
        tokens = np.full((count, length), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, 0] = True  # a softmax over no token is not finite
        types = np.zeros(tokens.shape, np.int32)
        positions, targets = (np.zeros((count, answers), np.int32) for _ in range(2))
        weights = np.zeros((count, answers), np.float32)
        for i, rows in enumerate(chosen):
            for j, row in enumerate(rows):
                k, n, t = i * self.choices + j, len(row.tokens), len(row.targets)
                tokens[k, :n], mask[k, :n] = row.tokens, True
                types[k, : len(row.types)] = row.types
                positions[k, :t] = np.arange(row.start, row.start + t)
                targets[k, :t], weights[k, :t] = row.targets, row.counted or 1
        labels = np.array([self.labels[i] if i != NONE else 0 for i in examples], np.int32)
        ids = None if self.candidates is None else np.array(self.candidates, np.int32)
        valid = np.asarray(examples) != NONE
        if not answers:
            return Batch(tokens, mask, None, None, None, labels, None, types, valid)
        return Batch(tokens, mask, positions, targets, weights, labels, ids, None, valid)

    def sorted(self, batch_size: int) -> Iterator[tuple[Rows, Batch]]:
        """Yield all examples once, longest first, as their indices and their batch.

        Args:
            batch_size: examples in a batch.
        """
        for examples in by_length(self.lengths, batch_size):
            yield examples, self.batch(examples)


def make(
    encoded: Sequence[Encoded],
    objective: str,
    *,
    batch_size: int,
    programs: int = 3,
    loss_on: str = "answer",
    pad_id: int = 0,
    longest: Sequence[int] | Rows | None = None,
    most: int | None = None,
) -> Batches:
    """Return what makes batches of examples.

    Args:
        encoded: the examples.
        objective: "tokens" for the answer's tokens, "choice" for the right one of the candidates,
            "class" for encoders with a head.
        batch_size: examples in a batch.
        programs: most lengths of batches.
        loss_on: "answer", or "all" for the prompt's tokens too.
        pad_id: id at padding.
        longest: length of each batch; None for batches of examples sorted by length.
        most: most tokens that the model reads, None for no limit.

    Examples:
        >>> data = [Encoded((1, 5, 6), ((7, 2),), 0), Encoded((1, 5), ((8, 2),), 0)]
        >>> batch = make(data, "tokens", batch_size=2).batch(np.array([0, 1]))
        >>> batch.tokens[:, :5], batch.positions
        (array([[1, 5, 6, 7, 0],
               [1, 5, 8, 0, 0]], dtype=int32), array([[2, 3],
               [1, 2]], dtype=int32))
    """
    candidates = one_pass(encoded) if objective == "choice" else None
    rows = tuple(tuple(rows_of(e, objective, loss_on, candidates)) for e in encoded)
    lengths = np.asarray(_lengths(rows))
    if longest is None:
        longest = lengths[by_length(lengths.tolist(), batch_size)[:, 0]]
    answers = np.array([max(len(row.targets) for row in own) for own in rows])
    shapes = tuple(
        (length, int(answers[lengths <= length].max(initial=0)))
        for length in choose_lengths(longest, programs, most)
    )
    choices = max(len(own) for own in rows)
    return Batches(rows, tuple(e.label for e in encoded), choices, candidates, shapes, pad_id)


def _lengths(rows: Sequence[Sequence[Row]]) -> tuple[int, ...]:
    return tuple(max(len(row.tokens) for row in own) for own in rows)


SPLIT = Batch._make(
    PartitionSpec() if name == "candidates" else PartitionSpec(None, meshes.PROCESS)
    for name in Batch._fields
)
"""How the arrays of a batch with an axis of micro-batches are split over processes."""


def of_processes(batch: Batch) -> Batch:
    """Return the batch of all processes.

    Args:
        batch: the part of this process, whose arrays have an axis of micro-batches in front.
    """
    ids = batch.candidates
    whole = None if ids is None else meshes.joined(np.asarray(ids), None)
    parts = jax.tree.map(lambda x: meshes.joined(x, 1), batch._replace(candidates=None))
    return parts._replace(candidates=whole)
