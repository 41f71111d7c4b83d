"""Table 3: subjects taught to a diffusion model by adapters, in paired runs.

    python experiments/table3.py                      # ORL faces; figures/table3.*
    python experiments/table3.py --data digits        # MNIST; figures/table3_digits.*
    python experiments/table3.py --minutes 60         # starts no runs after an hour
    python experiments/table3.py --minutes 0          # draws what is there
    python experiments/table3.py --model MODEL --images FOLDER   # Stable Diffusion, a device
    python experiments/table3.py --quick --out /tmp   # an untrained base

The paper teaches subjects to Stable Diffusion 1.4 (DreamBooth: batch 1, 500 steps, rank 4, α = 4,
queries, keys, values and outputs of attention, AdamW with decay 0.01, clipping at 1) and gives the
training losses at one learning rate, 1e-4. Its weights are in no package that is fetched here. The
base is a U-Net of the same modules with 1.06 million parameters, which this script trains on
persons that the comparison does not use. Squares of 2 × 2 pixels take the place of the autoencoder.

This was written down before the runs, and is what the script does.

- Runs: images of the subject, their crops, times and noises are drawn by seed, subject and step,
  the same for all methods. Five images are trained on, five others are held out. In tuning the
  start has one seed; each test subject has a start of its own.
- Errors: the mean squared error of the predicted noise after the last step, on the images that were
  trained on (the endpoint), on the held-out images, and on an image each of some subjects that the
  base knows, with their own prompts; each image at 50 times spread evenly, with a noise for each.
  One draw of time and noise per step, as papers report it, is noisy: the mean of the draws of the
  last 100 steps is in the table too.
- Tuning, the same for all: four learning rates with the default second number, then four points
  around the best (two learning rates, and two second numbers or two further rates), on two subjects
  (one digit) by which the base was stopped too, and which are not used again. The lowest error on
  the images that were trained on counts.
- Final: eight persons (five digits), `--seeds` seeds each, at the chosen point and at 1e-4. The
  unit is the subject: seeds are averaged.
- A difference is claimed as in `tier_a.py`: by the 95 % interval, the exact sign-flip test and the
  t-test corrected by Holm. Where none is claimed, "equal" is a 90 % interval within 2 %, and all
  else is "no difference was seen". Fewer than eight subjects claim nothing.
- Controls: random starts with the norm of NoRA's in each layer; NoRA's start times a random
  orthogonal matrix.
- Expected: no difference beyond that of the size of the start, as in `linear_lora.py` under Adam.

After first runs, in which all test subjects had the same random start, each got its own, and all
final runs were made again. Decay is that of the paper, also for PiSSA and OLoRA, whose factors it
pulls away from W₀.

A base of a million parameters that was trained for minutes is closer to its random start than
Stable Diffusion is: the record has the stable ranks of its layers, beside those of a random start.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from experiments.lib import comparison
from experiments.lib.config import command_line
from experiments.lib.files import write_atomically
from experiments.lib.record import save
from experiments.lib.stable_ranks import kernels, quartiles
from experiments.lib.subject_base import Setting, base_of, random_models
from experiments.lib.subject_figure import curves_of, draw, tuned
from experiments.lib.subject_images import DATA, Split
from experiments.lib.subject_methods import (
    AT_PAPER_RATE,
    BASE,
    CONTROLS,
    ENDPOINTS,
    METHODS,
    PAIRS,
    ROWS,
)
from experiments.lib.subject_runs import TARGETS
from experiments.lib.subject_sources import Real, Small, Source
from experiments.lib.subject_study import Config, Study

__all__ = ["Config", "Study", "main", "quickened", "study_of"]

TUNING = "images to train on,\nby learning rate, subjects for tuning"
"""Title of the errors of tuning."""
TUNING_FOLDERS = 2
"""With --model: subjects for tuning."""


C = TypeVar("C", bound=Config)


def quickened(config: C) -> C:
    """Return the options, with small numbers in the quick form.

    Args:
        config: the options.
    """
    if not config.quick:
        return config
    small = {"steps": 6, "base_steps": 4, "seeds": 1, "times": 2, "runs": 4}
    return dataclasses.replace(config, **small, base=config.out / "table3_base")


def study_of(config: Config) -> tuple[Study, dict[str, Any]]:
    """Return the runs of a configuration, and what the record has of the base.

    Args:
        config: the options.

    Raises:
        ValueError: on other data, and on images or a model that cannot be read.
    """
    if config.model is not None:
        if config.images is None:
            raise ValueError("images is None; expected a folder of images per subject")
        source: Source = Real(
            config.model, config.images, config.count, TUNING_FOLDERS, config.dtype
        )
        return Study(config, source, ROWS, f"{Path(config.model).name}-{config.images.name}"), {}
    if config.data not in DATA:
        raise ValueError(f"data is {config.data!r}; expected one of {', '.join(DATA)}")
    subjects = DATA[config.data]()
    if config.quick:
        few = Split(*(part[:2] for part in subjects.split))
        subjects = subjects._replace(split=few)
    setting = Setting(steps=config.base_steps, seed=config.seed)
    base = base_of(subjects, setting, config.base / config.data)
    rows = {label: ROWS[label] for label in (BASE, "NoRA")} if config.quick else ROWS
    study = Study(config, Small(subjects, base, config.count), rows, config.data)
    return study, {"base": base.record, "stable_ranks": spectra(base.unet, setting)}


def spectra(unet: nnx.Module, setting: Setting) -> dict[str, dict[str, float]]:
    """Return quartiles of ‖W‖_F² / ‖W‖² over the adapted layers, trained and random.

    Args:
        unet: the base.
        setting: how it was made.
    """
    models = {"trained": unet, "random": random_models(setting)[0]}
    return {name: quartiles(kernels(model, TARGETS)) for name, model in models.items()}


def summarize(study: Study, notes: dict[str, Any]) -> None:
    """Compare the runs that there are, and write the picture, the table and the record.

    Args:
        study: the runs.
        notes: further entries of the record.
    """
    runs = study.finals()
    if BASE not in runs:
        print(f"the final runs of {BASE} are not in the record yet", file=sys.stderr)
        return
    order = [x for x in (*ROWS, *AT_PAPER_RATE) if x in runs]
    runs = {label: runs[label] for label in order}
    paper_base = next(label for label, name in AT_PAPER_RATE.items() if name == BASE)
    groups = [
        [(label, BASE) for label in METHODS if label != BASE],
        [(label, BASE) for label in CONTROLS],
        list(PAIRS),
        [(label, paper_base) for label in AT_PAPER_RATE if label != paper_base],
    ]
    results: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        results[endpoint.field] = {}
        for pairs in groups:
            results[endpoint.field] |= comparison.compare(runs, endpoint, pairs)
    own = {label: lines for label, lines in runs.items() if label in ROWS}
    at_one = {label: lines for label, lines in runs.items() if label not in ROWS}
    rows = functools.partial(comparison.table, pairs="subjects", digits=4)
    text = rows(own, ENDPOINTS, results, study.chosen, BASE)
    if at_one:
        text += "\n" + rows(at_one, ENDPOINTS, results, study.chosen, paper_base)
    name = "table3" if study.name == "faces" else f"table3_{study.name}"
    out = study.config.out
    write_atomically(out / f"{name}.md", text.encode())
    before = {
        e.field: float(np.mean([line[f"{e.field}_before"] for line in runs[BASE].values()]))
        for e in ENDPOINTS
        if f"{e.field}_before" in next(iter(runs[BASE].values()))
    }
    curves = curves_of(runs, ENDPOINTS) | {"tuning": tuned(study)}
    own_steps = {"setting": study.setting, "steps": study.config.steps}
    lines = [x for x in study.journal.lines.values() if own_steps.items() <= x.items()]
    save(
        out,
        name,
        draw(runs, results, curves, ENDPOINTS, TUNING),
        curves,
        study.config,
        columns=("x", "value"),
        chosen={label: study.chosen[label]._asdict() for label in runs},
        means={
            label: {e.field: float(np.mean([x[e.field] for x in own.values()])) for e in ENDPOINTS}
            for label, own in runs.items()
        },
        before_training=before,
        differences=results,
        runs=len(lines),
        devices=sorted({line["device"] for line in lines}),
        seconds_of_a_run=float(np.median([line["seconds"] for line in lines])),
        **notes,
    )


def main(config: Config) -> None:
    """Make the runs that are missing, and write what all of them show.

    Args:
        config: the options.
    """
    config = quickened(config)
    study, notes = study_of(config)
    if not study.everything():
        print("the time is over; start the script again to go on", file=sys.stderr)
    summarize(study, notes)


if __name__ == "__main__":
    command_line(main, Config)
