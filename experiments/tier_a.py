"""Starts and optimizers of adapters on SST-2 with a small encoder, in paired runs.

    python experiments/tier_a.py --data FOLDER                # figures/tier_a.*, runs in a .jsonl
    python experiments/tier_a.py --data FOLDER --minutes 60   # starts no run after an hour
    python experiments/tier_a.py --data FOLDER --minutes 0    # draws what is there
    python experiments/tier_a.py --quick --out /tmp           # a random encoder, made-up sentences

FOLDER has train.tsv, dev.tsv and test.tsv of SST-2 (`sentence<TAB>label`). The encoder is MiniLM
(`make weights`). Each run is a line of `tier_a.jsonl`; a script that is started again goes on.

This was written down before the runs, and is what the script does.

- Runs: adapters of rank 8, α = 16, on queries and values; 200 steps of 8 of 1,000 sentences; AdamW
  without decay, clipping at 1, a learning rate that falls linearly to zero; no dropout. A seed
  decides the examples, their order, the head and the key of the start, for all methods alike.
- Tuning, the same for all: five learning rates in runs of 60 steps, extended where the best is at
  an end; at the best one two other values of the method's second number, or two learning rates
  between for a method without; the best two in full length. The lowest validation loss counts. The
  seed of tuning is not used again.
- Final: eight other seeds at the chosen point.
- Endpoints: the mean training loss over the steps (the area under its curve), and the mean of
  −log p of the right class over 500 validation sentences after the last step. Accuracy on 1,000
  test sentences is secondary.
- A difference to LoRA is claimed where all three hold: the 95 % t-interval of the eight paired
  differences excludes zero; the exact sign-flip test is below 0.05; the paired t-test, corrected by
  Holm over the methods, is below 0.05. (The sign-flip test is not corrected: of eight pairs it is
  at least 1/128, so that no eight methods could pass.) "Equal" is claimed where the 90 % interval
  lies within 2 % of LoRA's loss, or one point of accuracy. All else is "no difference was seen".
- Controls: random starts as large as NoRA's in each layer; NoRA's start times a random orthogonal
  matrix, which has its singular values and wrong directions; LoRA against LoRA with other starts;
  shuffled labels.
- Expected: no difference under Adam between starts with b = 0, as in `linear_lora.py`; an early
  gain of starts from gradients, if any.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib import comparison, made_up, paired
from experiments.lib.adapter_runs import Setting, Variant, run
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.files import write_atomically
from experiments.lib.journal import Journal, Line
from experiments.lib.record import save
from experiments.lib.tier_a_figure import curves_of, draw
from experiments.lib.tier_a_methods import (
    AGAIN,
    BASE,
    CONTROLS,
    ENDPOINTS,
    FIRST,
    METHODS,
    PAIRS,
    REFERENCES,
    SHUFFLED,
    UPDATES,
)
from experiments.lib.tuning import Grid, Point, tune

TUNING_SEED = 100
KEYS = ("setting", "method", "rate", "number", "seed", "steps")


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Starts and optimizers of adapters on SST-2, in paired runs.

    --quick: a random encoder and made-up sentences, three methods, three seeds.
    """

    model: str = "build/weights/all-MiniLM-L6-v2"
    """Folder of the encoder."""
    data: Path = Path("build/data/sst2")
    """Folder of train.tsv, dev.tsv and test.tsv."""
    steps: int = 200
    """Steps of a run."""
    screening_steps: int = 60
    """Steps of a short run."""
    batch_size: int = 8
    """Examples in a step."""
    seeds: int = 8
    """Paired seeds of each method."""
    minutes: float = math.inf
    """No run is started after this time."""
    updates: Path = Path("build/updates")
    """Folder for the trained updates that Figure 2 reads."""


class OutOfTimeError(Exception):
    """The time is over; the record has what was run."""


class Study:
    """The runs of a configuration, made where the record does not have them."""

    def __init__(self, config: Config, setting: Setting) -> None:
        self.config, self.setting = config, setting
        name = Path(setting.model).name
        sizes = dataclasses.asdict(setting) | {"model": name, "data": setting.data.name}
        self.name = " ".join(str(value).replace(" ", "") for value in sizes.values())
        self.journal = Journal(config.out / "tier_a.jsonl", KEYS)
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

    def final(self, labels: Iterable[tuple[str, Variant]], **options: Any) -> None:
        """Run all seeds of some methods at their chosen points, seed by seed."""
        labels = list(labels)
        for seed in range(self.config.seeds):
            for label, variant in labels:
                self.line(label, variant, self.chosen[label], seed, self.config.steps, **options)

    def everything(self, methods: dict[str, tuple[Variant, Grid]]) -> None:
        """Make all runs, those of the first methods and their controls before the others."""
        names = list(methods)
        for group in (names[:FIRST], names[FIRST : FIRST + 1]):
            self.group({name: methods[name] for name in group})
        number = self.chosen["NoRA"].number
        assert number is not None
        self.group(
            {name: (v, Grid(methods["NoRA"][1].rates, (number,))) for name, v in CONTROLS.items()}
        )
        base = METHODS[BASE][0]
        for seed in range(self.config.seeds):
            for label in (AGAIN, SHUFFLED):
                self.chosen[label] = self.chosen[BASE]
            self.line(
                AGAIN, base, self.chosen[BASE], seed, self.config.steps, start_seed=seed + 1000
            )
        for seed in range(2):
            self.line(SHUFFLED, base, self.chosen[BASE], seed, self.config.steps, shuffled=True)
        for name in names[FIRST + 1 :]:
            self.group({name: methods[name]})
        if len(methods) == len(METHODS):
            self.group(REFERENCES)

    def group(self, methods: dict[str, tuple[Variant, Grid]]) -> None:
        """Tune some methods, and make their final runs."""
        for name, (variant, grid) in methods.items():
            self.tune(name, variant, grid)
        self.final((name, variant) for name, (variant, _) in methods.items())

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


def screened(study: Study) -> dict[str, Curve]:
    """Return the loss after short runs by learning rate, at the default of the second number."""
    curves: dict[str, Curve] = {}
    for label, (_, grid) in METHODS.items():
        points = sorted(
            (line["rate"], line["validation_loss"])
            for line in study.lines
            if line["method"] == label
            and line["steps"] == study.config.screening_steps
            and line["number"] == grid.first
        )
        if points:
            curves[label] = Curve(*np.array(points).T)
    return curves


def summarize(study: Study) -> None:
    """Compare the runs that there are, and write the picture, the table and the record."""
    runs = study.finals()
    order = [BASE, *list(METHODS)[1:], *CONTROLS, AGAIN, SHUFFLED, *REFERENCES]
    runs = {label: runs[label] for label in order if label in runs}
    if not runs:
        print("no final run is in the record yet", file=sys.stderr)
        return
    against = [(label, BASE) for label in METHODS if label != BASE]
    others = [(label, BASE) for label in (*CONTROLS, SHUFFLED, *REFERENCES)]
    results = {
        e.field: comparison.compare(runs, e, against)
        | comparison.compare(runs, e, others)
        | comparison.compare(runs, e, PAIRS)
        for e in ENDPOINTS
    }
    right = {
        label: [
            paired.mcnemar(*(answers(runs[name][seed]) for name in (label, BASE)))
            for seed in comparison.common(runs, label, BASE)
        ]
        for label in runs
        if label != BASE
    }
    chosen = {label: study.chosen[label] for label in runs}
    curves = curves_of(runs, screened(study))
    table = comparison.table(runs, ENDPOINTS, results, chosen, BASE)
    write_atomically(study.config.out / "tier_a.md", table.encode())
    lines = study.lines
    save(
        study.config.out,
        "tier_a",
        draw(runs, results, curves["screening"]),
        curves,
        study.config,
        columns=("x", "value"),
        chosen={label: point._asdict() for label, point in chosen.items()},
        seeds={label: len(lines) for label, lines in runs.items()},
        differences=results,
        mcnemar={label: sum(p < 0.05 for p in values) for label, values in right.items()},
        runs=len(lines),
        seconds_of_a_run=float(np.median([x["seconds"] for x in lines if "right" in x])),
    )


def answers(line: Line) -> np.ndarray:
    """Return which test examples a run answered rightly; the bits that fill a byte are equal."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(line["right"]), np.uint8)).astype(bool)


def main(config: Config) -> None:
    """Make the runs that are missing, and compare all."""
    if config.seeds > paired.MOST:
        raise ValueError(f"seeds is {config.seeds}; expected at most {paired.MOST}")
    with tempfile.TemporaryDirectory() as folder:
        methods = METHODS
        setting = Setting(config.model, config.data, batch_size=config.batch_size)
        if config.quick:
            model = made_up.write_model(Path(folder) / "encoder", "bert")
            data = made_up.write_sentences(Path(folder) / "sentences")
            config = dataclasses.replace(
                config, steps=20, screening_steps=5, seeds=3, updates=Path(folder)
            )
            setting = Setting(model, data, rank=2, alpha=4.0, examples=(40, 16, 16))
            methods = {name: METHODS[name] for name in list(METHODS)[: FIRST + 1]}
        study = Study(config, setting)
        try:
            study.everything(methods)
        except OutOfTimeError:
            print("the time is over; the same command goes on", file=sys.stderr)
        summarize(study)


if __name__ == "__main__":
    command_line(main, Config)
