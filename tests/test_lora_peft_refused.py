"""PEFT folders that are refused, and those that only look unusual."""

import contextlib
import json
import os
import shutil
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from test_lora_peft import CONFIG, KEY, NAMES, TENSORS, Model, X, adapted, key_of, save

import nyscaled as nys
from nyscaled.checkpoints import peft


@pytest.fixture
def folder(tmp_path):
    save(adapted(), tmp_path)
    return tmp_path


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_tensors(folder, change):
    with safetensors.safe_open(folder / TENSORS, framework="numpy") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    safetensors.numpy.save_file(change(tensors), folder / TENSORS, metadata)


def refused(folder, match, model=None, **options):
    model = Model() if model is None else model
    before = nnx.state(model)
    with pytest.raises(ValueError, match=match):
        nys.lora.load_peft(model, folder, **({"names": NAMES} | options))
    after = nnx.state(model)
    assert jax.tree.structure(before) == jax.tree.structure(after)


CONFIGS = {
    "another method": ({"peft_type": "ADALORA"}, "peft_type"),
    "no method": ({"peft_type": None}, "peft_type"),
    "dora": ({"use_dora": True}, "use_dora"),
    "adapted and saved whole": ({"modules_to_save": ["heads"]}, "not among"),
    "modules to save": (
        {"modules_to_save": "heads"},
        "modules_to_save is 'heads'; expected a list",
    ),
    "bias": ({"bias": "some"}, "bias"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "other layers": (
        {"layers_to_transform": 0, "target_modules": ["up", "down", "heads", "out", "0", "1"]},
        "not among",
    ),
    "layers as text": ({"layers_to_transform": ["0"]}, "layers_to_transform"),
    "layers of an expression": (
        {"layers_to_transform": [0], "target_modules": ".*"},
        "expected a list in target_modules",
    ),
    "pattern without layers": ({"layers_pattern": "h"}, "expected layers_to_transform"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "activated": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "unknown": ({"a_new_variant": {"x": 1}}, "a_new_variant"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights.*converted"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "unknown start": ({"init_lora_weights": "nora"}, "init_lora_weights"),
    "rank": ({"r": 3}, "rank 2, and 3"),
    "rank of none": ({"r": None}, "rank is None"),
    "rank text": ({"r": "2"}, "rank is '2'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "scaling text": ({"use_rslora": "no"}, "use_rslora"),
    "rank pattern": ({"rank_pattern": {"heads": 3}}, "rank 2, and 3"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "lora_alpha"),
    "dropout of 400 digits": ({"lora_dropout": 10**400}, "lora_dropout"),
    "pattern of 400 digits": ({"alpha_pattern": {"up": 10**400}}, "alpha_pattern"),
    "rank of 400 digits": ({"r": 10**400}, "rank 2, and 1000"),
    "all dropped": ({"lora_dropout": 1}, r"lora_dropout is 1; expected a number in \[0, 1\)"),
    "more than all dropped": ({"lora_dropout": 2}, "lora_dropout is 2; expected"),
    "less than nothing dropped": ({"lora_dropout": -1}, "lora_dropout is -1; expected"),
    "dropout text": ({"lora_dropout": "0.1"}, "lora_dropout"),
    "pattern list": ({"rank_pattern": [3]}, "rank_pattern"),
    "broken pattern": ({"alpha_pattern": {"(": 3}}, "regular expression"),
    "alpha beyond float32": ({"lora_alpha": 1e39}, "the scaling is 5e\\+38"),
    "alpha at the end of float64": (
        {"alpha_pattern": {"up": 1e308}},
        "finite in the file and not|scaling",
    ),
    "target without tensors": ({"target_modules": ["heads", "score"]}, "target_modules"),
    "targets missed": ({"target_modules": ["heads"]}, "not among"),
    "targets by expression": ({"target_modules": "heads|items.*"}, "not among"),
    "broken expression": ({"target_modules": "("}, "regular expression"),
    "targets number": ({"target_modules": 3}, "target_modules"),
    "excluded": ({"exclude_modules": ["heads"]}, "not among"),
}


@pytest.mark.parametrize(("fields", "match"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configuration_refused(fields, match, folder):
    edit_config(folder, **fields)
    refused(folder, match)


# Hangs or other exceptions than ValueError, as expressions of `re`.
HOSTILE = {
    "nested repeats": "(([a-z0-9_.])+)+!",
    "repeats of anything": "(.*)*!",
    "repeats side by side": "(.?){200}" * 20 + "!",
    "count": "a{99999999999999999999}",
    "nesting": "(?:" * 500 + ")" * 500,
    "nesting that can be read": "(" * 90 + "a+" + ")+" * 90 + "!",
    "reference": r"(.+)\1",
    "length": "a" * 1_000_000,
}


@pytest.mark.parametrize("expression", HOSTILE.values(), ids=HOSTILE.keys())
def test_expressions_end(expression, folder):
    """Refused, or read as one that matches nothing: in any case soon."""
    for fields in (
        {"target_modules": expression},
        {"exclude_modules": expression},
        {"rank_pattern": {expression: 2}},
        {"alpha_pattern": {expression: 2}},
        {"layers_to_transform": [0], "layers_pattern": expression},
    ):
        edit_config(folder, **({"target_modules": ["up", "0"]} | fields))
        started = time.process_time()
        with contextlib.suppress(ValueError):
            nys.lora.load_peft(Model(), folder, names=NAMES)
        assert (
            time.process_time() - started < 20
        )  # two seconds, on a machine with nothing else to do


def test_expressions_are_read_inside_their_form(folder):
    """PEFT writes `(.*\\.)?(…)$` around a pattern, where others are sound than alone."""
    edit_config(folder, alpha_pattern={"(?i)HEADS": 6})
    refused(folder, "not a regular expression")
    model = Model()
    edit_config(folder, alpha_pattern={"heads)|(out": 6})
    nys.lora.load_peft(model, folder, names=NAMES)
    layers = model.heads, model.out, model.items[0]
    assert [layer.adapters["default"].alpha for layer in layers] == [6, 6, 3]


HARMLESS = {
    **{"task_type": "CAUSAL_LM", "auto_mapping": {"base_model_class": "X"}, "revision": "main"},
    **{"peft_version": "0.21.2", "inference_mode": False, "runtime_config": {"a": 1}},
    **{"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {"bits": 4}},
    **{"init_lora_weights": "gaussian", "lora_dropout": 0.3, "use_dora": False},
    **{"modules_to_save": ["score"], "layers_pattern": None, "exclude_modules": ["score"]},
    **{"target_modules": ["up", "down", "heads", "out", "0", "1"], "alpha_pattern": {}},
    # PEFT keeps names of other architectures in the file.
    **{"rank_pattern": {"c_attn": 8}, "layers_to_transform": 0, "bias": "lora_only"},
}
COMBINED = {
    "names of no layer": {"target_modules": ["up", "down", "heads", "out", "0", "1", "c_attn"]},
    "a name all excluded": {
        "target_modules": ["up", "down", "heads", "out", "0", "1", "score"],
        "exclude_modules": ["score"],
    },
    "all layers": {
        "target_modules": ["up", "down", "items.0", "items.1", "heads", "out"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["h", "layers"],
        "alpha_pattern": {"c_attn": 8, "h.0.*": 9},
    },
}


@pytest.mark.long_beyond(8)
@pytest.mark.parametrize(
    "fields",
    [*({k: v} for k, v in HARMLESS.items()), *COMBINED.values()],
    ids=[*HARMLESS, *COMBINED],
)
def test_configuration_without_effect(fields, folder):
    wanted, got = Model(), Model()
    nys.lora.load_peft(wanted, folder, names=NAMES)
    edit_config(folder, **fields)
    nys.lora.load_peft(got, folder, names=NAMES)
    np.testing.assert_array_equal(got(X), wanted(X))


def test_patterns_are_read_as_peft_does(folder):
    """The first that matches counts; a pattern may be the end of a name."""
    model = Model()
    edit_config(folder, alpha_pattern={"up": 6, r"layers\.\d\.(up|down)": 9})
    nys.lora.load_peft(model, folder, names=NAMES)
    alphas = {p: m.adapters["default"].alpha for p, m in nys.lora.adapted_layers(model).items()}
    assert alphas == dict.fromkeys(NAMES, 3) | {"layers.up": 6, "layers.down": 9}


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
        (nys.models.Llama.family.layer_name, "no layer of the family 'llama'"),
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
