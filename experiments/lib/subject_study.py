"""The runs of `experiments/table3.py`, each made where the record does not have it."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.lib.config import BaseConfig
from experiments.lib.files import write_arrays
from experiments.lib.journal import Journal, Line
from experiments.lib.subject_methods import AT_PAPER_RATE, BASE, PAPER_RATE, Row
from experiments.lib.subject_runs import Job, Outcome, Subject, train
from experiments.lib.subject_sources import Source
from experiments.lib.tuning import Point

TUNING_SEED, TUNED = 100, 2
"""Seed and number of subjects for tuning."""
KEYS = ("setting", "method", "rate", "number", "subject", "seed", "steps")
CHUNK = 50
"""Steps in one call of the program."""
BLOCK = 25
"""Steps of which the record has the mean loss."""


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Subjects taught to a diffusion model by adapters, in paired runs.

    --quick: an untrained base, two methods, few subjects, steps and times.
    """

    data: str = "faces"
    """Images of the small base: faces (ORL), digits (MNIST)."""
    model: str | None = None
    """Folder or hub id of Stable Diffusion, in place of the small base."""
    images: Path | None = None
    """With --model: folder that has a folder of images per subject."""
    dtype: str = "float32"
    """With --model: dtype of the models."""
    steps: int = 500
    """Steps of a run."""
    base_steps: int = 4000
    """Steps of training the small base."""
    base: Path = Path("build/table3")
    """Folder for the small base and the adapters."""
    count: int = 5
    """Images of a subject to train on, and as many that are held out."""
    seeds: int = 1
    """Seeds of each subject."""
    times: int = 50
    """Times at which the error of each image is measured."""
    runs: int = 8
    """Runs in one program."""
    rows: tuple[str, ...] = ()
    """Rows of the table whose missing runs are made; none for all."""
    minutes: float = math.inf
    """No runs are started after this time."""


class OutOfTimeError(Exception):
    """The time is over; the record has what was run."""


class Study:
    """The runs of a configuration, made where the record does not have them.

    Args:
        config: the options.
        source: images, base and latents.
        rows: rows of the table.
        name: what the record calls the images and the base.
    """

    def __init__(self, config: Config, source: Source, rows: dict[str, Row], name: str) -> None:
        if not 0 <= config.seed <= TUNING_SEED - config.seeds:
            raise ValueError(
                f"seed is {config.seed} and seeds {config.seeds}; expected seeds below "
                f"{TUNING_SEED}, which is for tuning"
            )
        self.config, self.source, self.rows, self.name = config, source, rows, name
        self.setting = f"{name}, {config.count} images, {config.times} times, {config.dtype}"
        if config.model is None:
            self.setting += f", base of {config.base_steps} steps"
        self.journal = Journal(config.out / "table3.jsonl", KEYS)
        self.ends = time.monotonic() + 60 * config.minutes
        self.chosen: dict[str, Point] = {}

    def identity(self, label: str, point: Point, subject: int, seed: int) -> Line:
        """Return the values that identify a run."""
        values = (self.setting, label, *point, subject, seed, self.config.steps)
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
        size = self.config.runs
        for first in range(0, len(missing), size):
            self._make(label, missing[first : first + size])
        return {run: self.journal.once(self.identity(label, *run), None) for run in asked}

    def _make(self, label: str, runs: Sequence[tuple[Point, int, int]]) -> None:
        if time.monotonic() >= self.ends:
            raise OutOfTimeError
        config, began = self.config, time.monotonic()
        # Programs are for one number of runs: the last one fills up.
        filled = [*runs, *[runs[-1]] * (config.runs - len(runs))]
        jobs = [
            Job(self.rows[label], *point, s, seed, start_of(s, seed)) for point, s, seed in filled
        ]
        final = runs[0][2] != TUNING_SEED
        outcome = train(
            self.source.unet,
            self.source.schedule,
            jobs,
            [self.source.subject(job.subject, job.seed) for job in jobs],
            steps=config.steps,
            parts=Subject._fields if final else ("instance",),
            before=final and label == BASE,
            times=config.times,
            chunk=math.gcd(CHUNK, config.steps),
        )
        seconds = time.monotonic() - began
        for i, run in enumerate(runs):
            line = line_of(outcome, i) | {
                "seconds": round(seconds / len(runs), 1),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
            if final and run[2] == config.seed:
                self._keep(label, run, jax.tree.leaves(outcome.params), i)
            self.journal.once(self.identity(label, *run), lambda line=line: line)
        print(
            f"{label}, {len(runs)} runs from rate {runs[0][0].rate:g}, number {runs[0][0].number}: "
            f"{seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def _keep(self, label: str, run: tuple[Point, int, int], leaves: Any, i: int) -> None:
        """Keep the factors of a run for the pictures."""
        write_arrays(self.adapter(label, run[0], run[1]), [x[i] for x in leaves])

    def adapter(self, label: str, point: Point, subject: int) -> Path:
        """Return the file of the factors of the first seed."""
        number = "" if point.number is None else f"_{point.number:g}"
        run = f"{subject}_{self.config.seed}_{self.config.steps}"
        name = f"{label}_{point.rate:g}{number}_{run}".replace(" ", "-").replace("'", "")
        return self.config.base / self.name / "adapters" / f"{name}.npz"

    def tune(self, label: str) -> Point:
        """Return the point of a row with the lowest error on the images that were trained on.

        Each row has as many points: four learning rates, and four points around the best.
        """
        row, subjects = self.rows[label], self.source.split.tuning[:TUNED]
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

    def everything(self) -> bool:
        """Make the runs that are missing; return whether all are there."""
        labels = [x for x in self.rows if not self.config.rows or x in self.config.rows]
        test = self.source.split.test
        seeds = [self.config.seed + i for i in range(self.config.seeds)]
        complete = True
        for label in labels:
            try:
                self.lines(label, [self.tune(label)], test, seeds)
            except OutOfTimeError:
                complete = False
        for label in AT_PAPER_RATE.values():
            if label in labels:
                try:
                    point = Point(PAPER_RATE, self.rows[label].first)
                    self.lines(label, [point], test, seeds)
                except OutOfTimeError:
                    complete = False
        return complete

    def finals(self) -> dict[str, dict[int, Line]]:
        """Return the means over the seeds by row and subject, of rows that are complete."""
        points = dict(self.chosen)
        for label, name in AT_PAPER_RATE.items():
            if name in self.rows:
                points[label] = Point(PAPER_RATE, self.rows[name].first)
        test = self.source.split.test
        seeds = [self.config.seed + i for i in range(self.config.seeds)]
        runs: dict[str, dict[int, Line]] = {}
        for label, point in points.items():
            name = AT_PAPER_RATE.get(label, label)
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
