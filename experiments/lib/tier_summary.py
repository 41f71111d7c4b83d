"""What the runs of `experiments/tier_*.py` show: the table, the picture and the record."""

from __future__ import annotations

import sys

import numpy as np

from experiments.lib import comparison, paired
from experiments.lib.curves import Curve
from experiments.lib.files import write_atomically
from experiments.lib.journal import Line
from experiments.lib.record import save
from experiments.lib.tier_figure import curves_of, draw
from experiments.lib.tier_methods import (
    AGAIN,
    AT_ONE_RATE,
    BASE,
    CONTROLS,
    CONTROLS_AT_ONE_RATE,
    ENDPOINTS,
    METHODS,
    PAIRS,
    REFERENCES,
    SHUFFLED,
)
from experiments.lib.tier_study import Study, TierConfig

ROWS = (*METHODS, *CONTROLS, AGAIN, SHUFFLED, *REFERENCES, *AT_ONE_RATE, *CONTROLS_AT_ONE_RATE)
"""All rows of a table, in their order."""


def check(config: TierConfig) -> None:
    """Raise ValueError on unknown rows, and on more seeds than the statistics take.

    Args:
        config: the options.
    """
    for name in config.methods:
        if name not in ROWS:
            raise ValueError(f"methods has {name!r}; expected rows of {', '.join(ROWS)}")
    if config.seeds > paired.MOST:
        raise ValueError(f"seeds is {config.seeds}; expected at most {paired.MOST}")


def make_and_compare(study: Study) -> None:
    """Make the runs that are missing, and compare all.

    Args:
        study: the runs.
    """
    if not study.everything():
        print("the time is over; the same command goes on", file=sys.stderr)
    summarize(study)


def screened(study: Study) -> dict[str, Curve]:
    """Return the loss after short runs by learning rate, at the default of the second number."""
    curves: dict[str, Curve] = {}
    for label, (_, grid) in study.methods.items():
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
    runs = {label: runs[label] for label in ROWS if label in runs}
    if not runs:
        print("no final run is in the record yet", file=sys.stderr)
        return
    against = [(label, BASE) for label in study.methods if label != BASE]
    references = REFERENCES if len(study.methods) == len(METHODS) else {}
    others = [(label, BASE) for label in (*CONTROLS, SHUFFLED, *references)]
    rows = {*study.methods, *CONTROLS, AGAIN}
    pairs = [pair for pair in PAIRS if rows.issuperset(pair)]
    controls = [pair for x in CONTROLS_AT_ONE_RATE for pair in (("NoRA", x), (x, BASE))]
    at_one_rate = [(x, BASE) for x, name in AT_ONE_RATE.items() if name in study.methods]
    results = {
        e.field: comparison.compare(runs, e, against)
        | comparison.compare(runs, e, others)
        | comparison.compare(runs, e, pairs)
        | comparison.compare(runs, e, at_one_rate)
        | comparison.compare(runs, e, controls)
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
    write_atomically(study.config.out / f"{study.file}.md", table.encode())
    lines = study.lines
    save(
        study.config.out,
        study.file,
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
