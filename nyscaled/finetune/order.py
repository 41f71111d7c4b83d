"""Which examples a step takes: a pure function of seed and step; and the lengths of batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

WINDOW = 16
"""Batches that are sorted together. Longer windows waste less, and mix lengths less."""
MULTIPLE = 8
"""Lengths of batches are multiples of it."""
NONE = -1
"""A row without an example, at the end of an epoch."""

Rows = Int[np.ndarray, " rows"]


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the examples of a run.

    In each epoch the examples are shuffled, windows of them are sorted by length and cut into
    batches, and the batches are shuffled. Nothing depends on what came before, so that a run may
    go on at any step.

    Attributes:
        lengths: tokens of each example.
        batch_size: examples in a step.
        seed: seed of the run.

    Examples:
        >>> order = Order((5, 1, 4, 2), batch_size=2, seed=0)
        >>> order.steps_per_epoch, sorted(order.rows(7).tolist())
        (2, [1, 3])
    """

    lengths: tuple[int, ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def rows(self, step: int) -> Rows:
        """Return the examples of a step, `NONE` where the last batch has fewer."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return _epoch(self, epoch)[index]

    def longest(self, epoch: int = 0) -> Int[np.ndarray, " batches"]:
        """Return the length of the longest example of each batch of an epoch."""
        lengths = np.append(self.lengths, 0)  # at `NONE`
        return lengths[_epoch(self, epoch)].max(axis=1)


@functools.lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> Int[np.ndarray, "batches rows"]:
    """The batches of an epoch."""
    rng = np.random.default_rng([order.seed, epoch])
    shuffled = rng.permutation(len(order.lengths))
    lengths, size = np.asarray(order.lengths), order.batch_size
    windows = [shuffled[i : i + WINDOW * size] for i in range(0, len(shuffled), WINDOW * size)]
    rows = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in windows])
    batches = _cut(rows, size)
    return batches[rng.permutation(len(batches))]


def by_length(lengths: Sequence[int], batch_size: int) -> Int[np.ndarray, "batches rows"]:
    """Return batches of examples by falling length, for passes in which order has no effect.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch; `NONE` fills the last one.

    Examples:
        >>> by_length([3, 9, 4], 2)
        array([[ 1,  2],
               [ 0, -1]])
    """
    return _cut(np.argsort(-np.asarray(lengths), kind="stable"), batch_size)


def _cut(examples: Int[np.ndarray, " examples"], size: int) -> Int[np.ndarray, "batches rows"]:
    missing = -len(examples) % size
    return np.append(examples, np.full(missing, NONE)).reshape(-1, size)


def choose_lengths(
    longest: Sequence[int] | Rows, count: int, most: int | None = None
) -> tuple[int, ...]:
    """Return the lengths of batches that waste least padding.

    Args:
        longest: length of the longest example of each batch.
        count: most different lengths, and so of compiled programs.
        most: the greatest length, which need not be a multiple; None for no limit.

    Examples:
        >>> choose_lengths([5, 6, 20, 22, 90], 3)
        (8, 24, 96)
        >>> choose_lengths([5, 6, 20, 22, 90], 3, most=90)
        (8, 24, 90)
    """
    rounded = -(-np.maximum(np.asarray(longest), 1) // MULTIPLE) * MULTIPLE
    rounded = rounded if most is None else np.minimum(rounded, most)
    lengths, batches = np.unique(rounded, return_counts=True)
    lengths, before = np.append(0, lengths), np.append(0, np.cumsum(batches))
    # padded[i, j]: tokens of the batches between the lengths i and j, padded to the length j.
    padded = np.where(
        np.tri(len(lengths), k=-1, dtype=bool), np.inf, lengths * (before - before[:, None])
    )
    cost, choices = padded[0], []  # the least tokens up to each length, with one length
    for _ in range(count - 1):
        total = cost[:, None] + padded
        choices.append(np.argmin(total, axis=0))
        cost = np.min(total, axis=0)
    ends = [len(lengths) - 1]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return tuple(sorted({int(lengths[end]) for end in ends} - {0}))
