"""What identifies the pipeline that a run began with."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np
from flax import nnx

from nyscaled.diffusion import Pipeline
from nyscaled.finetune.identity import SAMPLED, Base

SAMPLE = 2**14
"""Most numbers of a tensor that are hashed."""


def of_pipeline(model: str, pipe: Pipeline) -> Base:
    """Return what identifies a pipeline: configurations, shapes, and hashes of some values.

    Args:
        model: how the user called it, for messages.
        pipe: the pipeline, without adapters.
    """
    models = {"unet": pipe.unet, "vae": pipe.autoencoder, "text_encoder": pipe.text_encoder}
    config = {f"scheduler.{key}": value for key, value in pipe.schedule.to_json().items()}
    tensors: dict[str, jax.Array] = {}
    for name, part in models.items():
        config |= {f"{name}.{key}": value for key, value in part.config.to_json().items()}
        for path, variable in nnx.to_flat_state(nnx.state(part)):
            tensors[".".join([name, *map(str, path)])] = variable[...]
    ordered = sorted(tensors)
    picked = np.linspace(0, len(ordered) - 1, min(SAMPLED, len(ordered))).astype(int)

    def sample(x: jax.Array) -> str:
        values = np.asarray(x.reshape(-1)[:SAMPLE], np.float32)
        return hashlib.sha256(values.tobytes()).hexdigest()[:16]

    return {
        "model": model,
        "config": json.loads(json.dumps(config)),  # as it is read again
        "shapes": {name: list(tensors[name].shape) for name in ordered},
        "samples": {ordered[i]: sample(tensors[ordered[i]]) for i in picked},
    }
