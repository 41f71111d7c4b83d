"""Adapters of a trained U-Net of terrain that learn another map, in paired runs.

    python experiments/terrain.py                      # figures/terrain.*; `make weights` first
    python experiments/terrain.py --rows LoRA NoRA     # these rows; processes can share the work
    python experiments/terrain.py --minutes 3          # starts no runs after three minutes
    python experiments/terrain.py --minutes 0          # draws what is there
    python experiments/terrain.py --quick --out /tmp   # a tiny random U-Net

In `table3.py` the base is trained for minutes, and its weights have spectra close to those of a
random start. This base is a published model with 10.5 million parameters, distilled by its authors
to one step from a diffusion model of terrain (`adaptive-terrain-diffusion` 0.4.2, MIT). Adapters of
rank 4, α = 4, on queries, keys and values (one layer) and outputs of its 28 attentions teach it the
elevation map at Jacksboro that matplotlib ships.

This was written down before the runs, and is what the script does.

- Runs: 100 steps of two crops of 64 × 64 pixels from the left half of the map. The model was
  trained on 128 × 128, for which `--side 128 --steps 200` needs an accelerator. ln σ is normal with
  mean −1.2 and deviation 1.2, and errors are weighted, as in EDM. Crops, σ, noises and the start
  are drawn by the number of the run, the same for all methods. AdamW with decay 0.01, clipping at
  1, float32.
- Errors: the weighted mean squared error after the last step, on a grid of six crops, eight σ and a
  noise for each, in the left half (the endpoint) and in the right half, which is never trained on;
  the grid is the same for all. The mean of the draws of the last 100 steps is in the table too.
- Tuning, the same for all: four learning rates with the default second number, then four points
  around the best (two learning rates, and two second numbers or two further rates), in full length
  and with draws and a start that are not used again. The lowest error in the left half counts.
- Final: eight runs at the chosen point.
- A difference is claimed as in `tier_a.py`: by the 95 % interval, the exact sign-flip test and the
  t-test corrected by Holm. Where none is claimed, "equal" is a 90 % interval within 2 %, and all
  else is "no difference was seen".
- Controls: random starts with the norm of NoRA's in each layer; NoRA's start times a random
  orthogonal matrix.
- Expected: no difference between NoRA's start and a random one of its size, as in `table3.py`; if
  the directions of trained weights matter, NoRA is better than both controls here.
- Added after the first rows: LoRA, NoRA and the controls at one learning rate. One run for each
  point of the tuning had chosen a three times higher rate for NoRA than for LoRA.
- Added last: a run of the tuning at a still higher rate for each row, since three rows had chosen
  the highest. No row can choose this one.

The record has the stable ranks of the adapted layers, beside those of Gaussian matrices of the same
shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.lib import comparison
from experiments.lib.comparison import Endpoint
from experiments.lib.config import command_line
from experiments.lib.files import write_atomically
from experiments.lib.paired_study import (
    TUNED,
    TUNING_SEED,
    OutOfTimeError,
    PairedStudy,
    RunsConfig,
)
from experiments.lib.record import save
from experiments.lib.stable_ranks import kernels, quartiles
from experiments.lib.subject_figure import curves_of, draw, tuned
from experiments.lib.subject_images import Split
from experiments.lib.subject_methods import BASE, CONTROLS, ROTATED, SIZED, Row
from experiments.lib.subject_methods import ROWS as ALL
from experiments.lib.subject_runs import Job, Outcome
from experiments.lib.terrain_runs import TARGETS, Plan, Terrain, jacksboro, train
from experiments.lib.terrain_unet import Sizes, TerrainUNet, load
from experiments.lib.tuning import Point

HIGH_RATE = 3.16e-2
"""The highest learning rate of the tuning, which some rows chose and others did not."""

ABOVE = 0.1
"""A learning rate above `HIGH_RATE`, which no row can choose."""

METHODS = {name: ALL[name] for name in (BASE, "NoRA", "NoRA+", "PiSSA", "OLoRA")}
ROWS = METHODS | CONTROLS
PAIRS = (("NoRA", SIZED), ("NoRA", ROTATED), ("NoRA+", "NoRA"))
"""Further pairs that are compared."""
AT_ONE_RATE = {f"{name}, rate {HIGH_RATE}": (name, HIGH_RATE) for name in (BASE, "NoRA", *CONTROLS)}
AT_ONE_BASE, NORA_AT_ONE, *CONTROLS_AT_ONE = AT_ONE_RATE
ENDPOINTS = (
    Endpoint("instance", "trained half of the map", 0.02),
    Endpoint("held_out", "other half of the map", 0.02),
    Endpoint("training", "draws of the last 100 steps", 0.02),
)
TUNING = "trained half of the map,\nby learning rate, in tuning"
SMALL = Sizes(widths=(4, 8), layers=1, attends=(1,), head_dim=4, groups=2)
"""The random U-Net of the quick form."""


@dataclasses.dataclass(frozen=True)
class Config(RunsConfig):
    """Adapters of a trained U-Net of terrain that learn another map, in paired runs.

    --quick: a tiny random U-Net, two methods, few runs and steps.
    """

    weights: Path = Path("build/weights/terrain/unet.safetensors")
    """Weights of the U-Net."""
    steps: int = 100
    """Steps of a run."""
    pairs: int = 8
    """Final runs of each row."""
    runs: int = 4
    """Runs in one program."""
    batch_size: int = 2
    """Crops in a step."""
    side: int = 64
    """Side of a crop in pixels."""
    levels: int = 8
    """Values of σ at which the error is measured."""


class Study(PairedStudy):
    """The runs of a configuration; a subject is a number of draws and of a start.

    Args:
        config: the options.
        unet: the base.
        terrain: the map.
        rows: rows of the table.
    """

    def __init__(
        self, config: Config, unet: TerrainUNet, terrain: Terrain, rows: dict[str, Row]
    ) -> None:
        setting = f"batch {config.batch_size}, side {config.side}, {config.levels} levels"
        setting += ", random U-Net" if config.quick else ""
        split = Split([], [config.pairs], list(range(config.pairs)))
        super().__init__(config, split, rows, setting, "terrain", AT_ONE_RATE)
        self.config, self.unet, self.terrain = config, unet, terrain

    def train(self, label: str, jobs: Sequence[Job], final: bool) -> Outcome:
        """Return what runs gave, as `PairedStudy` asks for it."""
        config = self.config
        plan = Plan(config.steps, config.batch_size, config.side, config.levels)
        return train(self.unet, self.terrain, jobs, plan, before=final and label == BASE)

    def everything(self) -> bool:
        """Make the runs that are missing, also those at `ABOVE`; return whether all are there."""
        complete = super().everything()
        for label in self.labels:
            try:
                point = Point(ABOVE, self.rows[label].first)
                self.lines(label, [point], self.split.tuning[:TUNED], [TUNING_SEED])
            except OutOfTimeError:
                complete = False
        return complete


def study_of(config: Config) -> Study:
    """Return the runs of a configuration.

    Args:
        config: the options.

    Raises:
        ValueError: if the weights are missing.
    """
    if config.quick:
        small = {"steps": 5, "pairs": 2, "batch_size": 1, "side": 16, "levels": 2}
        config = dataclasses.replace(config, **small)
        rows = {label: ROWS[label] for label in (BASE, "NoRA")}
        return Study(config, TerrainUNet(SMALL, nnx.Rngs(config.seed)), jacksboro(), rows)
    if not config.weights.exists():
        raise ValueError(f"weights is {config.weights}; expected a file (make weights)")
    return Study(config, load(config.weights), jacksboro(), ROWS)


def summarize(study: Study) -> None:
    """Compare the runs that there are, and write the picture, the table and the record.

    Args:
        study: the runs.
    """
    runs = study.finals()
    if BASE not in runs:
        print(f"the final runs of {BASE} are not in the record yet", file=sys.stderr)
        return
    runs = {label: runs[label] for label in (*ROWS, *AT_ONE_RATE) if label in runs}
    groups = [
        [(label, BASE) for label in METHODS if label != BASE],
        [(label, BASE) for label in CONTROLS],
        list(PAIRS),
        [(label, AT_ONE_BASE) for label in AT_ONE_RATE if label != AT_ONE_BASE],
        [(NORA_AT_ONE, label) for label in CONTROLS_AT_ONE],
    ]
    results: dict[str, dict[str, Any]] = {e.field: {} for e in ENDPOINTS}
    for endpoint in ENDPOINTS:
        for pairs in groups:
            results[endpoint.field] |= comparison.compare(runs, endpoint, pairs)
    chosen = {label: study.chosen[label] for label in runs}
    rows = functools.partial(comparison.table, pairs="pairs", digits=4)
    own = {label: lines for label, lines in runs.items() if label in ROWS}
    text = rows(own, ENDPOINTS, results, chosen, BASE)
    if AT_ONE_BASE in runs:
        at_one = {label: lines for label, lines in runs.items() if label in AT_ONE_RATE}
        text += "\n" + rows(at_one, ENDPOINTS, results, chosen, AT_ONE_BASE)
    out = study.config.out
    write_atomically(out / "terrain.md", text.encode())
    weights = kernels(study.unet, TARGETS)
    rng = np.random.default_rng(study.config.seed)
    own_steps = {"setting": study.setting, "steps": study.config.steps}
    lines = [x for x in study.journal.lines.values() if own_steps.items() <= x.items()]
    of_base = list(runs[BASE].values())
    curves = curves_of(runs, ENDPOINTS) | {"tuning": tuned(study)}
    save(
        out,
        "terrain",
        draw(runs, results, curves, ENDPOINTS, TUNING),
        curves,
        study.config,
        columns=("x", "value"),
        chosen={label: point._asdict() for label, point in chosen.items()},
        means={
            label: {e.field: float(np.mean([x[e.field] for x in own.values()])) for e in ENDPOINTS}
            for label, own in runs.items()
        },
        before_training={name: of_base[0][f"{name}_before"] for name in ("instance", "held_out")},
        differences=results,
        stable_ranks={
            "trained": quartiles(weights),
            "random": quartiles([rng.normal(size=weight.shape) for weight in weights]),
        },
        adapted_layers=len(weights),
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(study.unet, nnx.Param))),
        runs=len(lines),
        devices=sorted({line["device"] for line in lines}),
        seconds_of_a_run=float(np.median([line["seconds"] for line in lines])),
    )


def main(config: Config) -> None:
    """Make the runs that are missing, and write what all of them show.

    Args:
        config: the options.
    """
    study = study_of(config)
    if not study.everything():
        print("the time is over; start the script again to go on", file=sys.stderr)
    summarize(study)


if __name__ == "__main__":
    command_line(main, Config)
