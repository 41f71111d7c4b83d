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
- Final: `--seeds` other seeds at the chosen point, eight unless said otherwise.
- Endpoints: the mean training loss over the steps (the area under its curve), and the mean of
  −log p of the right class over 500 validation sentences after the last step. Accuracy on 1,000
  test sentences is secondary.
- A difference to LoRA is claimed where all three hold: the 95 % t-interval of the paired
  differences excludes zero; the exact sign-flip test is below 0.05; the paired t-test, corrected by
  Holm over the methods, is below 0.05. (The sign-flip test is not corrected: of eight pairs it is
  at least 1/128, so that no eight methods could pass.) "Equal" is claimed where the 90 % interval
  lies within 2 % of LoRA's loss, or one point of accuracy. All else is "no difference was seen".
- Controls: random starts as large as NoRA's in each layer; NoRA's start times a random orthogonal
  matrix, which has its singular values and wrong directions; LoRA against LoRA with other starts;
  shuffled labels.
- Expected: no difference under Adam between starts with b = 0, as in `linear_lora.py`; an early
  gain of starts from gradients, if any.

Holm's correction is made for each endpoint and each group of rows by itself. Added after eight
seeds had been seen: eight more of them for the record, the methods at LoRA's learning rate with
their own second numbers, and that a comparison with a run that diverged says so.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

from experiments.lib import comparison, made_up, paired
from experiments.lib.adapter_runs import Setting
from experiments.lib.config import command_line
from experiments.lib.curves import Curve
from experiments.lib.files import write_atomically
from experiments.lib.journal import Line
from experiments.lib.record import save
from experiments.lib.tier_a_figure import curves_of, draw
from experiments.lib.tier_a_methods import (
    AGAIN,
    AT_ONE_RATE,
    BASE,
    CONTROLS,
    ENDPOINTS,
    FIRST,
    METHODS,
    PAIRS,
    REFERENCES,
    SHUFFLED,
)
from experiments.lib.tier_a_study import KEYS, TUNING_SEED, Config, Study

__all__ = ["KEYS", "TUNING_SEED", "Config", "Study", "main"]


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
    order = [*METHODS, *CONTROLS, AGAIN, SHUFFLED, *REFERENCES, *AT_ONE_RATE]
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
        | comparison.compare(runs, e, [(label, BASE) for label in AT_ONE_RATE])
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
        devices=sorted({str(line.get("device")) for line in lines}),
        seconds_of_a_run=float(np.median([x["seconds"] for x in lines if "right" in x])),
    )


def answers(line: Line) -> np.ndarray:
    """Return which test examples a run answered rightly; the bits that fill a byte are equal."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(line["right"]), np.uint8)).astype(bool)


def main(config: Config) -> None:
    """Make the runs that are missing, and compare all."""
    rows = (*METHODS, *CONTROLS, AGAIN, SHUFFLED, *REFERENCES, *AT_ONE_RATE)
    for name in config.methods:
        if name not in rows:
            raise ValueError(f"methods has {name!r}; expected rows of {', '.join(rows)}")
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
        if not study.everything(methods):
            print("the time is over; the same command goes on", file=sys.stderr)
        summarize(study)


if __name__ == "__main__":
    command_line(main, Config)
