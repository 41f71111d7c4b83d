"""Images that the model generates while it is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from nyscaled import diffusion
from nyscaled.diffusion import Pipeline
from nyscaled.finetune.dreambooth import images
from nyscaled.finetune.dreambooth.data import SAMPLES, key_of
from nyscaled.finetune.dreambooth.denoiser import Denoiser
from nyscaled.finetune.dreambooth.preparation import Prepared

FOLDER = "samples"
COUNT = 4


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Generates a row of images of a text, from the same noise each time.

    Attributes:
        pipe: the pipeline, whose trained models are replaced.
        text: the text.
        size: side of the images.
        key: PRNG key of the noise.
    """

    pipe: Pipeline
    text: str
    size: int
    key: jax.Array

    def write(self, folder: Path, model: Denoiser, step: int) -> Path:
        """Write the row of some models, and return its path.

        Args:
            folder: folder of the run.
            model: the models.
            step: number of steps that they were trained for.
        """
        pipe, size = model.pipeline(self.pipe), (self.size, self.size)
        keys = jax.random.split(self.key, COUNT)
        row = [diffusion.generate(pipe, [self.text], key=key, size=size)[0] for key in keys]
        path = folder / FOLDER / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        images.write_row(path, [np.asarray(image) for image in row])
        return path


def sampler(prepared: Prepared, pipe: Pipeline) -> Sampler | None:
    """Return what generates images in a run, None if it is not asked for.

    Args:
        prepared: the run.
        pipe: the pipeline.
    """
    config = prepared.config
    if config.sample_every is None:
        return None
    text = config.prompt if config.sample_prompt is None else config.sample_prompt
    return Sampler(pipe, text, prepared.resolution, key_of(config, SAMPLES))
