"""Models that `tests/fixtures/make_models.py` wrote, and changed copies of their files."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

import nyscaled as nys

MODELS = Path(__file__).parent / "fixtures" / "models"
DECODERS = [
    "gemma",
    "llama",
    "llama3",
    "llama_bias",
    "mistral",
    "opt",
    "opt_post",
    "qwen2",
    "qwen2_window",
    "qwen3",
]


@functools.cache
def _loaded(name):
    return nys.models.load(MODELS / name)[0]


def load(name):
    """A fresh copy of a model."""
    return nnx.clone(_loaded(name))


@functools.cache
def saved(name):
    """Tokens, mask and whatever else transformers was given, and computed."""
    arrays = safetensors.numpy.load_file(MODELS / name / "expected.safetensors")
    return arrays | {
        "tokens": jnp.asarray(arrays["tokens"]),
        "mask": jnp.asarray(arrays["mask"] > 0),
    }


def expected(name):
    """Tokens, mask and transformers' logits."""
    return tuple(saved(name)[part] for part in ("tokens", "mask", "logits"))


@nnx.jit
def call(model, *inputs):
    return model(*inputs)


def arrays(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


def change(folder, rename=None, tensors=None, **settings):
    """Other settings and tensors in a folder; "absent" and None take away."""
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    if not rename and not tensors:
        return
    path = folder / "model.safetensors"
    changed = safetensors.numpy.load_file(path) | (tensors or {})
    new = rename or str
    kept = {new(name): value for name, value in changed.items() if value is not None}
    safetensors.numpy.save_file(kept, path)
