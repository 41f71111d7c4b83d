"""The runs of `experiments/table3.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.lib.files import write_arrays
from experiments.lib.paired_study import PairedStudy, RunsConfig
from experiments.lib.subject_methods import AT_PAPER_RATE, BASE, PAPER_RATE, Row
from experiments.lib.subject_runs import Job, Outcome, Subject, train
from experiments.lib.subject_sources import Source
from experiments.lib.tuning import Point

CHUNK = 50
"""Steps in one call of the program."""


@dataclasses.dataclass(frozen=True)
class Config(RunsConfig):
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
    base_steps: int = 4000
    """Steps of training the small base."""
    base: Path = Path("build/table3")
    """Folder for the small base and the adapters."""
    count: int = 5
    """Images of a subject to train on, and as many that are held out."""
    times: int = 50
    """Times at which the error of each image is measured."""


class Study(PairedStudy):
    """The runs of a configuration, made where the record does not have them.

    Args:
        config: the options.
        source: images, base and latents.
        rows: rows of the table.
        name: what the record calls the images and the base.
    """

    def __init__(self, config: Config, source: Source, rows: dict[str, Row], name: str) -> None:
        setting = f"{name}, {config.count} images, {config.times} times, {config.dtype}"
        if config.model is None:
            setting += f", base of {config.base_steps} steps"
        at_one_rate = {label: (row, PAPER_RATE) for label, row in AT_PAPER_RATE.items()}
        super().__init__(config, source.split, rows, setting, "table3", at_one_rate)
        self.config, self.source, self.name = config, source, name

    def train(self, label: str, jobs: Sequence[Job], final: bool) -> Outcome:
        """Return what runs gave, and keep the factors of the first seed for the pictures."""
        outcome = train(
            self.source.unet,
            self.source.schedule,
            jobs,
            [self.source.subject(job.subject, job.seed) for job in jobs],
            steps=self.config.steps,
            parts=Subject._fields if final else ("instance",),
            before=final and label == BASE,
            times=self.config.times,
            chunk=math.gcd(CHUNK, self.config.steps),
        )
        for i, job in enumerate(jobs):
            if final and job.seed == self.config.seed:
                path = self.adapter(label, Point(job.rate, job.number), job.subject)
                write_arrays(path, [x[i] for x in jax.tree.leaves(outcome.params)])
        return outcome

    def adapter(self, label: str, point: Point, subject: int) -> Path:
        """Return the file of the factors of the first seed."""
        number = "" if point.number is None else f"_{point.number:g}"
        run = f"{subject}_{self.config.seed}_{self.config.steps}"
        name = f"{label}_{point.rate:g}{number}_{run}".replace(" ", "-").replace("'", "")
        return self.config.base / self.name / "adapters" / f"{name}.npz"
