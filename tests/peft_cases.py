"""A model with every layer that carries adapters, and PEFT folders that are changed by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import nyscaled as nys

KEY = jax.random.key(0)
NAMES = {
    "items.0": "items.0",
    "items.1": "items.1",
    "heads": "heads",
    "out": "out",
    "layers.up": "layers.{}.up",
    "layers.down": "layers.{}.down",
}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
    """Every kind of layer that can carry adapters, and a stack of two."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.items = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.out = nnx.Einsum("bnh,nhd->bd", (2, 4, 8), (8,), rngs=rngs)
        stacked = nnx.split_rngs(splits=2)(nnx.vmap(Layer))
        self.layers = stacked(rngs)

    def __call__(self, x):
        for item in self.items:
            x = jnp.tanh(item(x))
        x = self.out(self.heads(x))
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


X = jax.random.normal(jax.random.key(1), (5, 8))


def train(model, name="default"):
    """Moves the factors, as training would."""
    rng = np.random.default_rng(0)
    layers = nys.lora.adapted_layers(model).values()
    for adapter in (layer.adapters[name] for layer in layers if name in layer.adapters):
        for side in ("lora_a", "lora_b"):
            value = np.asarray(getattr(adapter, side)[...])
            moved = value + 0.1 * rng.standard_normal(value.shape)
            getattr(adapter, side)[...] = jnp.asarray(moved.astype(value.dtype))


def adapted(name="default", targets=".*", **options):
    model = Model()
    nys.lora.apply(model, 2, 3.0, targets=targets, key=KEY, name=name, **options)
    train(model, name)
    return model


def save(model, folder, **options):
    nys.lora.save_peft(model, folder, base_model="mine", names=NAMES, **options)


def key_of(module, side="A"):
    return f"base_model.model.{module}.lora_{side}.weight"


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_tensors(folder, change):
    with safetensors.safe_open(folder / TENSORS, framework="numpy") as file:
        keys, metadata = file.keys(), file.metadata()
        tensors = {key: file.get_tensor(key) for key in keys}
    safetensors.numpy.save_file(change(tensors), folder / TENSORS, metadata)


def refused(folder, match, model=None, **options):
    model = Model() if model is None else model
    before = nnx.state(model)
    with pytest.raises(ValueError, match=match):
        nys.lora.load_peft(model, folder, **({"names": NAMES} | options))
    after = nnx.state(model)
    assert jax.tree.structure(before) == jax.tree.structure(after)
