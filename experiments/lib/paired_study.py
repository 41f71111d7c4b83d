"""Runs of rows of a table by subject and seed, each made where the record does not have it."""

from __future__ import annotations

import abc
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from experiments.lib.config import BaseConfig
from experiments.lib.journal import Journal, Line
from experiments.lib.subject_images import Split
from experiments.lib.subject_methods import Row
from experiments.lib.subject_runs import Job, Outcome
from experiments.lib.tuning import Point

TUNING_SEED, TUNED = 100, 2
"""Seed and number of subjects for tuning."""
KEYS = ("setting", "method", "rate", "number", "subject", "seed", "steps")
BLOCK = 25
"""Steps of which the record has the mean loss."""


@dataclasses.dataclass(frozen=True)
class RunsConfig(BaseConfig):
    """Options of the runs."""

    steps: int = 500
    """Steps of a run."""
    seeds: int = 1
    """Seeds of each subject."""
    runs: int = 8
    """Runs in one program."""
    rows: tuple[str, ...] = ()
    """Rows of the table whose missing runs are made, in this order; none for all."""
    minutes: float = math.inf
    """No runs are started after this time."""


class OutOfTimeError(Exception):
    """The time is over; the record has what was run."""


class PairedStudy(abc.ABC):
    """The runs of a configuration, made where the record does not have them.

    Args:
        config: the options.
        split: numbers of the subjects.
        rows: rows of the table.
        setting: what the runs depend on besides their keys.
        name: name of the record.
        at_one_rate: further rows, of which each is a row at a learning rate that is not tuned.
    """

    def __init__(
        self,
        config: RunsConfig,
        split: Split,
        rows: dict[str, Row],
        setting: str,
        name: str,
        at_one_rate: Mapping[str, tuple[str, float]],
    ) -> None:
        if not 0 <= config.seed <= TUNING_SEED - config.seeds:
            raise ValueError(
                f"seed is {config.seed} and seeds {config.seeds}; expected seeds below "
                f"{TUNING_SEED}, which is for tuning"
            )
        self.options, self.split, self.rows, self.setting = config, split, rows, setting
        self.at_one_rate = at_one_rate
        self.journal = Journal(config.out / f"{name}.jsonl", KEYS)
        self.ends = time.monotonic() + 60 * config.minutes
        self.chosen: dict[str, Point] = {}

    @abc.abstractmethod
    def train(self, label: str, jobs: Sequence[Job], final: bool) -> Outcome:
        """Return what runs gave.

        Args:
            label: the row.
            jobs: the runs.
            final: whether they are not for tuning.
        """

    def identity(self, label: str, point: Point, subject: int, seed: int) -> Line:
        """Return the values that identify a run."""
        values = (self.setting, label, *point, subject, seed, self.options.steps)
        return dict(zip(KEYS, values, strict=True))

    def lines(
        self, label: str, points: Iterable[Point], subjects: Sequence[int], seeds: Sequence[int]
    ) -> dict[tuple[Point, int, int], Line]:
        """Return the lines of runs of a row; those that the record does not have are made.

        Args:
            label: the row.
            points: learning rates and second numbers.
            subjects: numbers of subjects.
            seeds: seeds of each.
        """
        asked = [(p, s, seed) for p in points for s in subjects for seed in seeds]
        missing = [run for run in asked if not self.journal.has(self.identity(label, *run))]
        size = self.options.runs
        for first in range(0, len(missing), size):
            self._make(label, missing[first : first + size])
        return {run: self.journal.once(self.identity(label, *run), None) for run in asked}

    def _make(self, label: str, runs: Sequence[tuple[Point, int, int]]) -> None:
        if time.monotonic() >= self.ends:
            raise OutOfTimeError
        config, began = self.options, time.monotonic()
        # Programs are for one number of runs: the last one fills up.
        filled = [*runs, *[runs[-1]] * (config.runs - len(runs))]
        jobs = [
            Job(self.rows[label], *point, s, seed, start_of(s, seed)) for point, s, seed in filled
        ]
        final = runs[0][2] != TUNING_SEED
        outcome = self.train(label, jobs, final)
        seconds = time.monotonic() - began
        for i, run in enumerate(runs):
            line = line_of(outcome, i) | {
                "seconds": round(seconds / len(runs), 1),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
            self.journal.once(self.identity(label, *run), lambda line=line: line)
        print(
            f"{label}, {len(runs)} runs from rate {runs[0][0].rate:g}, number {runs[0][0].number}: "
            f"{seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def tune(self, label: str) -> Point:
        """Return the point of a row with the lowest error on the images that were trained on.

        Each row has as many points: four learning rates, and four points around the best.
        """
        row, subjects = self.rows[label], self.split.tuning[:TUNED]
        losses: dict[Point, float] = {}

        def measure(points: list[Point]) -> None:
            lines = self.lines(label, points, subjects, [TUNING_SEED])
            for point in points:
                values = [lines[point, s, TUNING_SEED]["instance"] for s in subjects]
                mean = float(np.mean(values))
                losses[point] = mean if math.isfinite(mean) else math.inf

        measure(row.grid())
        measure(row.others(min(losses, key=losses.__getitem__)))
        self.chosen[label] = min(losses, key=losses.__getitem__)
        return self.chosen[label]

    @property
    def labels(self) -> list[str]:
        """The rows whose missing runs are made, in their order."""
        return [label for label in self.options.rows or self.rows if label in self.rows]

    def everything(self) -> bool:
        """Make the runs that are missing; return whether all are there."""
        labels, test = self.labels, self.split.test
        seeds = [self.options.seed + i for i in range(self.options.seeds)]
        complete = True
        for label in labels:
            try:
                self.lines(label, [self.tune(label)], test, seeds)
            except OutOfTimeError:
                complete = False
        for label, rate in self.at_one_rate.values():
            if label in labels:
                try:
                    point = Point(rate, self.rows[label].first)
                    self.lines(label, [point], test, seeds)
                except OutOfTimeError:
                    complete = False
        return complete

    def finals(self) -> dict[str, dict[int, Line]]:
        """Return the means over the seeds by row and subject, of rows that are complete."""
        points = dict(self.chosen)
        for label, (name, rate) in self.at_one_rate.items():
            if name in self.rows:
                points[label] = Point(rate, self.rows[name].first)
        test = self.split.test
        seeds = [self.options.seed + i for i in range(self.options.seeds)]
        runs: dict[str, dict[int, Line]] = {}
        for label, point in points.items():
            name, _ = self.at_one_rate.get(label, (label, point.rate))
            keys = {s: [self.identity(name, point, s, seed) for seed in seeds] for s in test}
            if all(self.journal.has(key) for own in keys.values() for key in own):
                runs[label] = {
                    s: mean_of([self.journal.once(key, None) for key in own])
                    for s, own in keys.items()
                }
        self.chosen = points
        return runs


def start_of(subject: int, seed: int) -> int:
    """Return the seed of the start: one for tuning, one of its own for each other subject.

    Args:
        subject: number of the subject.
        seed: seed of the run.
    """
    return seed if seed == TUNING_SEED else 1000 * (seed + 1) + subject


def line_of(outcome: Outcome, i: int) -> Line:
    """Return what the record has of a run.

    Args:
        outcome: what the runs of a program gave.
        i: which of them.
    """
    losses = outcome.losses[i]
    blocks = losses[: len(losses) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)
    errors = {name: _short(values[i]) for name, values in outcome.errors.items()}
    errors |= {f"{name}_before": _short(values[i]) for name, values in outcome.before.items()}
    return {
        **errors,
        "training": _short(losses[-100:].mean()),
        "mean_training": _short(losses.mean()),
        "losses": [float(f"{x:.4g}") for x in blocks],
    }


def mean_of(lines: Sequence[Line]) -> Line:
    """Return the means of the numbers of lines.

    Args:
        lines: lines of runs that differ in the seed.
    """
    names = [name for name in lines[0] if name not in (*KEYS, "seconds", "device", "jax")]
    return {name: np.mean([line[name] for line in lines], axis=0).tolist() for name in names}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
