"""Images of the class, of which the base generates those that are missing."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from nyscaled import diffusion, lora
from nyscaled.diffusion import Pipeline
from nyscaled.finetune.dreambooth import images
from nyscaled.finetune.dreambooth.images import Picture
from nyscaled.finetune.dreambooth.plan import CLASS, key_of
from nyscaled.finetune.dreambooth.preparation import Prepared

FOLDER = "class_images"


def class_pictures(prepared: Prepared, pipe: Pipeline) -> tuple[Picture, ...]:
    """Return the images of the class, after generating those that are missing.

    They are written one by one into the folder of the run, and a run that goes on keeps them.

    Args:
        prepared: the run.
        pipe: the pipeline, whose U-Net may have adapters.

    Raises:
        OSError: if a file cannot be written.
    """
    config, given = prepared.config, prepared.class_pictures
    folder = config.out / FOLDER
    paths = [folder / f"{i:04d}.png" for i in range(config.class_count - len(given))]
    if missing := [(i, path) for i, path in enumerate(paths) if not path.exists()]:
        folder.mkdir(exist_ok=True)
        base = nnx.clone(pipe.unet)
        lora.remove(base)
        pipe = dataclasses.replace(pipe, unet=base)
        for i, path in tqdm(missing, "images of the class", file=sys.stderr, disable=None):
            _generate(prepared, pipe, i, path)
    return (*given, *(images.read(path, prepared.resolution) for path in paths))


def _generate(prepared: Prepared, pipe: Pipeline, number: int, path: Path) -> None:
    text, size = prepared.config.class_prompt, (prepared.resolution,) * 2
    assert text is not None
    key = jax.random.fold_in(key_of(prepared.config, CLASS), number)
    image = diffusion.generate(pipe, [text], key=key, size=size)
    images.write_row(path, [np.asarray(image[0])])
