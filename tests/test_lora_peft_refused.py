"""PEFT folders whose tensors or files are refused, and models that are not saved."""

import os
import shutil
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from peft_cases import (
    CONFIG,
    KEY,
    NAMES,
    TENSORS,
    Model,
    adapted,
    edit_config,
    edit_tensors,
    key_of,
    refused,
    save,
)

import nyscaled as nys
from nyscaled.checkpoints import peft


@pytest.fixture
def folder(tmp_path):
    save(adapted(), tmp_path)
    return tmp_path


def dropped(*keys):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in keys}


def added(**tensors):
    return lambda old: old | {k.replace("__", "."): v for k, v in tensors.items()}


def replaced(module, side, fn):
    return lambda old: old | {key_of(module, side): fn(old[key_of(module, side)])}


WIDE = np.zeros((2, 9), "f")
FILES = {
    "A alone": (dropped(key_of("out", "B")), "only lora_A of out"),
    "B alone": (dropped(key_of("out", "A")), "only lora_B of out"),
    "a long name": (added(**{"x" * 9999: np.ones(2, "f")}), "a name of 9999 characters; expected"),
    "missing in config": (dropped(key_of("out"), key_of("out", "B")), "no tensors of out"),
    "empty": (lambda old: {}, "no modules"),
    "magnitude": (added(base_model__model__out__lora_magnitude_vector=WIDE), "magnitude"),
    "other prefix": (lambda old: {k[len("base_model.") :]: v for k, v in old.items()}, "holds"),
    "full weight": (added(base_model__model__score__weight=WIDE), "score.weight"),
    "adapter name": (added(base_model__model__out__lora_A__default__weight=WIDE), "default"),
    "three axes": (replaced("out", "A", lambda a: a[..., None]), "expected"),
    "ranks of A and B": (replaced("out", "A", lambda a: a[:1]), "expected"),
    "other base": (replaced("out", "A", lambda a: WIDE), "other|base"),
    "integers": (replaced("out", "A", lambda a: a.astype(np.int32)), "int32"),
    "not finite": (replaced("out", "A", lambda a: a * np.nan), "NaN"),
}


@pytest.mark.parametrize(("change", "match"), FILES.values(), ids=FILES.keys())
def test_tensors_refused(change, match, folder):
    edit_tensors(folder, change)
    refused(folder, match)


@pytest.mark.parametrize("value", [1e300, -1e39])
def test_values_that_only_the_file_holds_refused(value, folder):
    edit_tensors(folder, replaced("layers.1.up", "A", lambda a: np.full(a.shape, value)))
    refused(folder, r"layers\.up is finite in the file and not in float32")


def test_products_and_narrow_dtypes_are_checked(folder):
    edit_tensors(folder, replaced("out", "A", lambda a: np.full_like(a, 1e6)))
    refused(folder, "out is finite in the file and not in float16", dtype=jnp.float16)
    nys.lora.load_peft(Model(), folder, names=NAMES, dtype=jnp.bfloat16)
    narrow = Model()
    narrow.out.dtype = jnp.float16
    refused(folder, "or float16, in which the layer computes", model=narrow)
    edit_tensors(folder, replaced("out", "B", lambda b: np.full_like(b, 1e-6)))
    refused(folder, "or float16, in which the layer computes", model=narrow)
    large = replaced("out", "A", lambda a: np.full_like(a, 1e30))
    edit_tensors(folder, lambda t: replaced("out", "B", lambda b: np.full_like(b, 1e30))(large(t)))
    refused(folder, "the update of out is finite in the file and not")


@pytest.mark.parametrize("dtype", [jnp.int32, "nope", None, "int8", bool, jnp.complex64, "float64"])
def test_dtypes_that_are_not_floating_refused(dtype, folder):
    refused(folder, "dtype is .*; expected a floating one", dtype=dtype)
    with pytest.raises(ValueError, match="expected a floating one"):
        nys.lora.apply(Model(), 2, targets=".*", key=KEY, dtype=dtype)


def test_dtypes_by_name(folder):
    model = Model()
    nys.lora.load_peft(model, folder, names=NAMES, dtype="bfloat16")
    assert model.out.adapters["default"].lora_a.dtype == jnp.bfloat16


def test_unmatched_modules_refused(folder):
    both = key_of("layers.1.up"), key_of("layers.1.up", "B")
    edit_tensors(folder, dropped(*both))
    edit_config(folder, target_modules=["up", "down", "heads", "out", "0", "1"])
    refused(folder, r"no tensors of layers\.1\.up")
    edit_config(folder, target_modules=None)  # a stack is taken for one that is targeted as a whole
    refused(folder, r"no tensors of layers\.1\.up")


def test_targeted_layer_without_tensors_refused(folder):
    edit_tensors(folder, dropped(key_of("items.1"), key_of("items.1", "B")))
    edit_config(folder, target_modules=r"layers.*|items\.\d|heads|out")
    refused(folder, r"no tensors of items\.1")
    edit_config(folder, target_modules=None)
    assert "items.1" not in nys.lora.load_peft(Model(), folder, names=NAMES)


def test_tensors_without_a_layer_refused(folder):
    refused(folder, r"layers\.0\.(up|down).*no layer", names=None)
    refused(folder, "no layer", names=nys.models.Llama.family.layer_name)
    refused(folder, "no layer", model=nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (TENSORS, b"", "sound safetensors"),
        (TENSORS, bytes(range(256)), "sound safetensors"),
        (TENSORS, None, "there is no"),
        (CONFIG, b"{", "not JSON"),
        (CONFIG, b"\xff\xfe", "not JSON"),
        (CONFIG, b"[]", "object"),
        (CONFIG, None, "adapter_config"),
    ],
)
def test_broken_files_refused(name, content, match, folder):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    refused(folder, match)


def test_truncated_pickled_or_missing_refused(folder, tmp_path):
    whole = (folder / TENSORS).read_bytes()
    for length in (7, 100, len(whole) // 2, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:length])
        refused(folder, "sound safetensors")
    shutil.move(folder / TENSORS, folder / "adapter_model.bin")
    refused(folder, "pickle")
    refused(tmp_path / "nowhere", "expected a folder")


def test_load_into_a_name_in_use_refused(folder):
    refused(folder, "has an adapter named 'default'", model=adapted())
    refused(folder, "expected letters", name="a.b")


def test_save_refused(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="adapter is 'other'"):
        save(model, tmp_path, name="other")
    with pytest.raises(ValueError, match="task_type"):
        save(model, tmp_path, task_type="chat")
    for names, match in [
        (None, "is a stack"),
        ({}, "names has None"),
        (NAMES | {"layers.up": "layers.up"}, "expected a name with 1"),
        (NAMES | {"out": "heads"}, "another layer's"),
        (nys.models.Llama.family.layer_name, "not a layer of the family 'llama'"),
    ]:
        with pytest.raises(ValueError, match=match):
            nys.lora.save_peft(model, tmp_path, base_model="mine", names=names)
    nys.lora.merge(model)
    with pytest.raises(ValueError, match="merged"):
        save(model, tmp_path)
    nys.lora.unmerge(model)
    model.out.adapters["default"].lora_b[...] *= jnp.nan
    with pytest.raises(ValueError, match="out has NaN"):
        save(model, tmp_path)
    assert not os.listdir(tmp_path)


def test_experts_refused(tmp_path):
    experts = nnx.Einsum("ebi,eio->ebo", (3, 8, 8), rngs=nnx.Rngs(0))
    model = nnx.Sequential(experts)
    nys.lora.apply(model, 2, targets=".*", key=KEY)
    with pytest.raises(ValueError, match=r"batch axes of lengths \[3\]"):
        nys.lora.save_peft(model, tmp_path, base_model="mine")
    plain = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    nys.lora.apply(plain, 2, targets=".*", key=KEY)
    nys.lora.save_peft(plain, tmp_path, base_model="mine")
    nys.lora.remove(model)
    refused(tmp_path, "batch axes", model=model, names=None)


def test_whole_modules_are_checked_without_a_wider_copy(tmp_path):
    head = np.ones((1000, 1000), ml_dtypes.bfloat16)
    update = peft.Update(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32), 1.0)
    tracemalloc.start()
    try:
        peft.write(tmp_path, {"out": update}, base_model="mine", whole={"head.weight": head})
        tracemalloc.reset_peak()
        read = peft.read(tmp_path).whole["head.weight"]
        assert tracemalloc.get_traced_memory()[1] < 2.5 * head.nbytes  # in float64 it has four
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(read, head)
    head[3, 4] = np.nan
    with pytest.raises(ValueError, match=r"head\.weight has NaN or Inf"):
        peft.write(tmp_path, {"out": update}, base_model="mine", whole={"head.weight": head})
