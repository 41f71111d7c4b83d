"""Images of the class, of which the base generates those that are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from nyscaled import diffusion, lora
from nyscaled.diffusion import Pipeline
from nyscaled.finetune import folders
from nyscaled.finetune.dreambooth import images
from nyscaled.finetune.dreambooth.data import CLASS, key_of
from nyscaled.finetune.dreambooth.images import Picture
from nyscaled.finetune.dreambooth.preparation import Prepared

FOLDER = "class_images"
GENERATED = "generated"
"""Key of their hashes in the record of a run."""


def class_pictures(prepared: Prepared, pipe: Pipeline) -> tuple[Picture, ...]:
    """Return the images of the class, after generating those that are missing.

    They are written one by one into the folder of the run, whose `run.json` has their hashes. A run
    that goes on keeps them.

    Args:
        prepared: the run.
        pipe: the pipeline, whose models may have adapters.

    Raises:
        ValueError: if an image that was generated is missing or changed.
        OSError: if a file cannot be written.
    """
    config, own = prepared.config, prepared.class_pictures
    folder, path = config.out / FOLDER, config.out / folders.RECORD
    record = images.read_record(config.out)
    digests: dict[str, str] = record["images"].setdefault(GENERATED, {})
    files = [folder / name for name in digests if (folder / name).exists()]
    now = {file.name: images.digest(file) for file in files}
    what = f"the generated images in {folder}"
    images.require_same(what, config.out, digests, now, "them as they were")
    names = [f"{i:04d}.png" for i in range(config.class_count - len(own))]
    if missing := [(i, name) for i, name in enumerate(names) if name not in digests]:
        folder.mkdir(exist_ok=True)
        base = nnx.clone(prepared.model)
        lora.remove(base)
        pipe = base.pipeline(pipe)
        for i, name in tqdm(missing, "images of the class", file=sys.stderr, disable=None):
            _generate(prepared, pipe, i, folder / name)
            digests[name] = images.digest(folder / name)
            folders.write_json(path, record)
    return (*own, *(images.read(folder / name, prepared.resolution) for name in names))


def _generate(prepared: Prepared, pipe: Pipeline, number: int, path: Path) -> None:
    text, size = prepared.config.class_prompt, (prepared.resolution,) * 2
    assert text is not None
    key = jax.random.fold_in(key_of(prepared.config, CLASS), number)
    image = diffusion.generate(pipe, [text], key=key, size=size)
    images.write_row(path, [np.asarray(image[0])])
