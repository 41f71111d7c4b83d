"""The records of starts in PEFT folders."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from peft_cases import NAMES, TENSORS, Model, X, adapted, refused, save

import nyscaled as nys


@pytest.fixture
def folder(tmp_path):
    save(adapted(), tmp_path)
    return tmp_path


START = {"init": "nora", "options": {"scale": 0.1}, "key": [0, 1], "modules": ["layers.0.up"]}
RECORDS = {
    **{"text": "x", "number": "[3]", "fields": '[{"init": "nora"}]', "deep": "[" * 100_000},
    **{"not a list": "7", "null": "null", "infinite": "[1e999]"},
    "init": [START | {"init": ["x"]}],
    "no init": [START | {"init": None}],
    "options as a list": [START | {"options": ["scale"]}],
    "an object in options": [START | {"options": {"a": {"b": 1}}}],
    "nan in options": '[{"init": "a", "options": {"x": NaN}, "key": [0, 1], "modules": ["out"]}]',
    "negative key": [START | {"key": [-1, 2]}],
    "wide key": [START | {"key": [2**32, 2]}],
    "no words": [START | {"key": []}],
    "words of text": [START | {"key": ["0", 1]}],
    "key as an object": [START | {"key": {}}],
    "modules as a number": [START | {"modules": 3}],
    "modules that cannot be keys": [START | {"modules": [["out"]]}],
}


def with_starts(folder, starts):
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    text = starts if isinstance(starts, str) else json.dumps(starts)
    safetensors.numpy.save_file(tensors, folder / TENSORS, {"starts": text})


@pytest.mark.parametrize("starts", RECORDS.values(), ids=RECORDS.keys())
def test_foreign_record_refused(starts, folder):
    with_starts(folder, starts)
    refused(folder, "the metadata 'starts' is not what save_peft writes")


def test_records_serve_wherever_they_load(folder, tmp_path):
    """In compiled calls of a stack, whose structure must be hashable, and when saved again."""
    options = {"shape": [1, [2, 3]], "side": "input", "big": 10**30, "none": None}
    with_starts(folder, [START | {"init": "mine", "options": options, "key": [1, 2, 3, 4]}])
    model = Model()
    nys.lora.load_peft(model, folder, names=NAMES)
    np.testing.assert_allclose(nnx.jit(lambda m: m(X))(model), model(X), atol=1e-5)
    assert model.out.adapters["default"].init == ("peft", ())
    assert dict(model.layers.up.adapters["default"].init[1])["shape"] == (1, (2, 3))
    save(model, tmp_path / "again")
    again = Model()
    nys.lora.load_peft(again, tmp_path / "again", names=NAMES)
    assert nnx.graphdef(again) == nnx.graphdef(model)


@pytest.mark.parametrize("scale", [np.float32(0.5), jnp.float32(0.5), np.array(0.5)])
def test_options_that_are_scalar_arrays_are_recorded_as_numbers(scale, tmp_path):
    save(adapted(init="nora", scale=scale), tmp_path)
    with safetensors.safe_open(tmp_path / TENSORS, framework="numpy") as file:
        (start,) = json.loads(file.metadata()["starts"])
    assert start["options"]["scale"] == 0.5
