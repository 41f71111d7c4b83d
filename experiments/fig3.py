"""Figures 3 and 7: samples of a diffusion model that was taught subjects, by method.

    python experiments/fig3.py                # after table3.py, whose adapters it reads
    python experiments/fig3.py --data digits
    python experiments/fig3.py --model MODEL --images FOLDER    # as table3.py was run

Each block is a subject: its images, which were trained on, and a row of samples per method, of the
same noise. The first subject is Figure 3, three others are Figure 7. The methods have their tuned
learning rates; "base" has no adapter, so that it has never seen a subject under this prompt.
DDIM makes 50 steps with guidance. The record has the distance of each sample to the nearest of the
images. No claim is made about the quality of images.

The ORL faces are of AT&T Laboratories Cambridge (Samaria and Harter, 1994), which ask for
acknowledgement; MNIST is of LeCun, Cortes and Burges, under CC BY-SA 3.0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from experiments.lib.config import command_line
from experiments.lib.curves import Curve
from experiments.lib.files import read_arrays
from experiments.lib.paired_study import OutOfTimeError, start_of
from experiments.lib.record import save
from experiments.lib.subject_methods import METHODS
from experiments.lib.subject_runs import Job, Models, models
from experiments.lib.subject_samples import samples
from experiments.lib.subject_study import Config as Study3Config
from experiments.lib.subject_study import Study
from experiments.table3 import quickened, study_of

TERMS = {
    "faces": "ORL faces: AT&T Laboratories Cambridge",
    "digits": "MNIST: LeCun, Cortes, Burges (CC BY-SA 3.0)",
}
UNTAUGHT = "base"


@dataclasses.dataclass(frozen=True)
class Config(Study3Config):
    """Samples of a diffusion model that was taught subjects, by method.

    --quick: of the quick form of table3.py in the same folder.
    """

    guidance: float = 2.0
    """Factor of the difference between the predictions with and without a prompt."""
    samples: int = 5
    """Samples per method."""
    sampler_steps: int = 50
    """Steps of the sampler."""


def pictures(config: Config, study: Study, subject: int) -> dict[str, np.ndarray]:
    """Return a subject's images, and samples by method.

    Args:
        config: the options.
        study: the runs, tuned.
        subject: number of the subject.
    """
    source = study.source
    shown = {"images": source.pictures(subject, config.seed)[: config.samples]}
    noise = jax.random.normal(jax.random.key(config.seed), (config.samples, *source.shape))
    prompt, empty = source.context(source.prompt), source.context("")
    for label, row in study.rows.items():
        if label not in METHODS:
            continue
        point = study.chosen[label]
        made = models(
            source.unet, [Job(row, *point, subject, config.seed, start_of(subject, config.seed))]
        )
        made = jax.tree.map(lambda x: x[0], made._replace(graphdef=None, frozen=None))._replace(
            graphdef=made.graphdef, frozen=made.frozen
        )
        sampled = sampler(config, study, made, prompt, empty, noise)
        if UNTAUGHT not in shown:
            shown[UNTAUGHT] = sampled(made.params)
        shown[label] = sampled(factors(study, label, subject, made))
    return shown


def sampler(config: Config, study: Study, made: Models, prompt: Any, empty: Any, noise: Any) -> Any:
    """Return a function of the factors of adapters that returns images.

    Args:
        config: the options.
        study: the runs.
        made: the models of one run.
        prompt: what the U-Net reads of the prompt.
        empty: what it reads of the empty one.
        noise: what samples begin with.
    """

    def sampled(params: Any) -> np.ndarray:
        latents = samples(
            params,
            made.kept,
            made.frozen,
            prompt,
            empty,
            noise,
            config.guidance,
            graphdef=made.graphdef,
            schedule=study.source.schedule,
            steps=config.sampler_steps,
        )
        return study.source.decode(latents)

    return sampled


def factors(study: Study, label: str, subject: int, made: Models) -> Any:
    """Return the trained factors of a run.

    Args:
        study: the runs.
        label: the row.
        subject: number of the subject.
        made: a model with such factors.

    Raises:
        ValueError: if the file of the factors is missing.
    """
    path = study.adapter(label, study.chosen[label], subject)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; expected the adapters that table3.py writes with its runs "
            "(with an empty folder as --out it makes all)"
        )
    return read_arrays(path, made.params)


def distances(block: dict[str, np.ndarray]) -> dict[str, Curve]:
    """Return how far each sample is from the nearest image, by method.

    The distance is the root of the mean squared difference of grey levels or colours.

    Args:
        block: images by method of a subject.
    """
    images = block["images"]
    curves: dict[str, Curve] = {}
    for label, samples_of in block.items():
        if label != "images":
            apart = samples_of[:, None] - images[None]
            squares = np.mean(apart.reshape(*apart.shape[:2], -1) ** 2, axis=-1)
            curves[label] = Curve(np.arange(len(samples_of)), np.sqrt(squares.min(axis=1)))
    return curves


def draw(blocks: list[dict[str, np.ndarray]], terms: str) -> Any:
    """Draw subjects beside each other, with a row per method.

    Args:
        blocks: images by method of each subject.
        terms: whose images these are.
    """
    rows, columns = list(blocks[0]), max(len(x) for x in blocks[0].values())
    figure, axes = plt.subplots(
        len(rows),
        columns * len(blocks) + len(blocks) - 1,
        figsize=(0.62 * (columns * len(blocks) + len(blocks) - 1), 0.62 * len(rows)),
        squeeze=False,
        gridspec_kw={
            **{"wspace": 0.04, "hspace": 0.04},
            **{"left": 0, "right": 1, "bottom": 0, "top": 1},
        },
    )
    for axis in axes.ravel():
        axis.set_axis_off()
    for number, block in enumerate(blocks):
        for i, label in enumerate(rows):
            for j, image in enumerate(block[label]):
                axis = axes[i, number * (columns + 1) + j]
                axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if number == 0:
                axes[i, 0].text(
                    -0.15, 0.5, label, transform=axes[i, 0].transAxes, ha="right", va="center"
                )
    figure.text(0.5, -0.01, terms, ha="center", va="top", fontsize=6, color="0.4")
    return figure


def main(config: Config) -> None:
    """Draw the samples.

    Args:
        config: the options.
    """
    config = dataclasses.replace(quickened(config), minutes=0)
    study, _ = study_of(config)
    try:
        for label in study.rows:
            study.tune(label)
    except OutOfTimeError:
        raise ValueError("runs are missing; expected those of table3.py") from None
    terms = TERMS.get(config.data, "") if config.model is None else ""
    suffix = "" if study.name == "faces" else f"_{study.name}"
    test = study.source.split.test
    for name, subjects in (("fig3", test[:1]), ("fig7", test[1:4])):
        if not subjects:
            continue
        blocks = [pictures(config, study, subject) for subject in subjects]
        chosen = {label: study.chosen[label]._asdict() for label in blocks[0] if label in METHODS}
        save(
            config.out,
            f"{name}{suffix}",
            draw(blocks, terms),
            {
                f"subject {subject}": distances(block)
                for subject, block in zip(subjects, blocks, strict=True)
            },
            config,
            columns=("sample", "distance"),
            subjects=[int(s) for s in subjects],
            chosen=chosen,
            terms=terms,
        )


if __name__ == "__main__":
    command_line(main, Config)
