"""The runs of `experiments/tier_*.py`, each made where the record does not have it."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.lib.adapter_data import Setting
from experiments.lib.adapter_runs import Variant, run
from experiments.lib.config import BaseConfig
from experiments.lib.journal import Journal, Line
from experiments.lib.tier_methods import (
    AGAIN,
    AT_ONE_RATE,
    BASE,
    CONTROLS,
    CONTROLS_AT_ONE_RATE,
    FIRST,
    METHODS,
    REFERENCES,
    SHUFFLED,
    UPDATES,
    VARIANTS,
    Methods,
)
from experiments.lib.tuning import Grid, Point, tune

TUNING_SEED = 100
KEYS = ("setting", "method", "rate", "number", "seed", "steps")


@dataclasses.dataclass(frozen=True)
class TierConfig(BaseConfig):
    """Starts and optimizers of adapters, in paired runs."""

    model: str = ""
    """Folder or file of the model."""
    data: Path = Path("build/data/sst2")
    """Folder of the examples."""
    steps: int = 200
    """Steps of a run."""
    screening_steps: int = 60
    """Steps of a short run."""
    batch_size: int = 8
    """Examples in a step."""
    seeds: int = 8
    """Paired seeds of each method."""
    methods: tuple[str, ...] = ()
    """Rows of the table whose missing runs are made; none for all. So several processes share the
    work, each with an --out of its own: their files, one after another, are one record."""
    minutes: float = math.inf
    """No run is started after this time."""
    updates: Path = Path("build/updates")
    """Folder for the trained updates that Figure 2 reads."""


class OutOfTimeError(Exception):
    """The time is over; the record has what was run."""


class Study:
    """The runs of a configuration, made where the record does not have them.

    Args:
        config: the options.
        setting: what all runs have in common.
        methods: the methods with their grids.
        file: name of the record, the table and the picture.
    """

    def __init__(self, config: TierConfig, setting: Setting, methods: Methods, file: str) -> None:
        self.config, self.setting, self.methods, self.file = config, setting, methods, file
        self.name = setting.name
        self.journal = Journal(config.out / f"{file}.jsonl", KEYS)
        self.ends = time.monotonic() + 60 * config.minutes
        self.chosen: dict[str, Point] = {}

    def line(
        self, label: str, variant: Variant, point: Point, seed: int, steps: int, **options: Any
    ) -> Line:
        """Return the line of a run."""
        values = (self.name, label, *point, seed, steps)
        identity: Line = dict(zip(KEYS, values, strict=True))

        def make() -> Line:
            if time.monotonic() >= self.ends:
                raise OutOfTimeError
            outcome = run(
                self.setting,
                variant,
                seed,
                rate=point.rate,
                number=point.number,
                steps=steps,
                tested=seed != TUNING_SEED,
                **options,
            )
            if label in UPDATES and seed != TUNING_SEED:
                keep(self.config.updates, label, seed, outcome.updates)
            line: Line = {
                "training_loss": _short(outcome.losses.mean()),
                "validation_loss": _short(outcome.validation.loss),
                "validation_accuracy": _short(outcome.validation.right.mean()),
                "seconds": round(outcome.seconds, 1),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "precision": precision(),
            }
            if outcome.test is not None:
                line |= {
                    "test_loss": _short(outcome.test.loss),
                    "test_accuracy": _short(outcome.test.right.mean()),
                    "right": np.packbits(outcome.test.right).tobytes().hex(),
                    "losses": [float(f"{x:.4g}") for x in outcome.losses],
                }
            print(
                f"{label}, rate {point.rate:g}, {variant.number or 'number'} {point.number}, seed "
                f"{seed}, {steps} steps: {line['validation_loss']:.4f} in {line['seconds']} s",
                file=sys.stderr,
                flush=True,
            )
            return line

        return self.journal.once(identity, make)

    def tune(self, label: str, variant: Variant, grid: Grid) -> Point:
        """Return the chosen point of a method."""

        def loss(point: Point, full: bool) -> float:
            steps = self.config.steps if full else self.config.screening_steps
            return self.line(label, variant, point, TUNING_SEED, steps)["validation_loss"]

        self.chosen[label] = tune(grid, loss)
        return self.chosen[label]

    def final(self, labels: Iterable[str], **options: Any) -> None:
        """Run all seeds of some rows at their chosen points, seed by seed."""
        labels = list(labels)
        for seed in range(self.config.seeds):
            for label in labels:
                point = self.chosen[label]
                extra = {"start_seed": seed + 1000} if label == AGAIN else options
                self.line(label, VARIANTS[label], point, seed, self.config.steps, **extra)

    def everything(self) -> bool:
        """Make the runs that are missing, those of the first methods and controls first.

        Returns:
            Whether all are there.
        """
        methods = self.methods
        names = list(methods)
        jobs: list[Callable[[], None]] = [functools.partial(self.tuned, methods, names[:FIRST])]
        jobs += [functools.partial(self.tuned, methods, [name]) for name in names[FIRST:]]
        jobs.insert(2, self.controls)
        if len(methods) == len(METHODS):
            jobs += [functools.partial(self.tuned, REFERENCES, [name]) for name in REFERENCES]
        jobs.append(self.at_one_rate)
        complete = True
        for job in jobs:
            try:
                job()
            except OutOfTimeError:
                complete = False
        return complete

    def asked_for(self, labels: Iterable[str]) -> list[str]:
        """Return the rows among some that are to be run."""
        return [x for x in labels if not self.config.methods or x in self.config.methods]

    def tuned(self, methods: Methods, labels: Iterable[str]) -> None:
        """Tune some methods, and make their final runs."""
        labels = self.asked_for(labels)
        for label in labels:
            self.tune(label, *methods[label])
        self.final(labels)

    def controls(self) -> None:
        """Run the controls, at the second number of NoRA and at LoRA's point."""
        labels = self.asked_for(CONTROLS)
        for label in labels:
            self.tune_control(label)
        self.final(labels)
        labels = self.asked_for((AGAIN, SHUFFLED))
        for label in labels:
            self.chosen[label] = self.tune(BASE, *self.methods[BASE])
        for label in labels:
            self.final([label], **({"shuffled": True} if label == SHUFFLED else {}))

    def tune_control(self, label: str) -> Point:
        """Return the chosen point of a control, which has NoRA's second number."""
        variant, grid = self.methods["NoRA"]
        number = self.tune("NoRA", variant, grid).number
        assert number is not None
        return self.tune(label, CONTROLS[label], Grid(grid.rates, (number,)))

    def at_one_rate(self) -> None:
        """Run methods at LoRA's learning rate, and controls at NoRA's, with their second numbers.

        What was tuned to that rate was run there already, and gets no second row.
        """
        labels = self.asked_for(
            label for label, name in AT_ONE_RATE.items() if name in self.methods
        )
        for label in labels:
            name = AT_ONE_RATE[label]
            rate = self.tune(BASE, *self.methods[BASE]).rate
            own = self.tune(name, *self.methods[name])
            if own.rate != rate:
                self.chosen[label] = Point(rate, own.number)
        controls = self.asked_for(CONTROLS_AT_ONE_RATE)
        for label in controls:
            own = self.tune_control(CONTROLS_AT_ONE_RATE[label])
            point = self.chosen["NoRA"]
            if own != point:
                self.chosen[label] = point
        labels += controls
        self.final(label for label in labels if label in self.chosen)

    @property
    def lines(self) -> list[Line]:
        """The runs of this setting: the file may have those of others."""
        return [line for line in self.journal.lines.values() if line["setting"] == self.name]

    def finals(self) -> dict[str, dict[int, Line]]:
        """Return the final runs at the chosen points, by method and seed."""
        runs: dict[str, dict[int, Line]] = {}
        for line in self.lines:
            point = self.chosen.get(line["method"])
            if (
                line["seed"] != TUNING_SEED
                and line["steps"] == self.config.steps
                and point == Point(line["rate"], line["number"])
            ):
                runs.setdefault(line["method"], {})[line["seed"]] = line
        return runs


def precision() -> str:
    """Return the precision of products that is asked for; the default differs by device."""
    return str(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]


def keep(folder: Path, label: str, seed: int, updates: dict[str, Any]) -> None:
    """Write the updates of a run.

    Args:
        folder: where.
        label: the method.
        seed: the seed.
        updates: factors by layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{path}|{side}": pair[i] for path, pair in updates.items() for i, side in enumerate("ab")
    }
    np.savez(folder / f"{label.replace(' ', '_')}-{seed}.npz", **flat)


def _short(value: float | np.floating[Any]) -> float:
    return float(f"{value:.6g}")
