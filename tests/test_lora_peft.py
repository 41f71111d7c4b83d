"""Adapters saved as PEFT folders and loaded again."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from peft_cases import (
    CONFIG,
    KEY,
    NAMES,
    TENSORS,
    Model,
    X,
    adapted,
    key_of,
    save,
    train,
)

import nyscaled as nys
from nyscaled.checkpoints import files


@pytest.fixture
def folder(tmp_path):
    save(adapted(), tmp_path)
    return tmp_path


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize(
    ("init", "rank_stabilized"),
    [*((init, False) for init in nys.lora.KERNEL_INITS), ("lora", True), ("pissa", True)],
)
def test_round_trip(init, rank_stabilized, tmp_path):
    model = adapted(init=init, rank_stabilized=rank_stabilized)
    save(model, tmp_path)
    again = Model()
    touched = nys.lora.load_peft(again, tmp_path, names=NAMES)
    assert set(touched) == set(NAMES)
    assert nys.lora.adapted_layers(again).keys() == touched.keys()
    actual, expected = again(X), model(X)
    assert jnp.max(jnp.abs(expected - Model()(X))) > 0.1
    if model.heads.adapters["default"].start is None:
        np.testing.assert_array_equal(actual, expected)
        assert again.heads.adapters["default"].rank == 2
    else:
        np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=1e-6)
        assert again.heads.adapters["default"].rank == 4
    scalings = [m.layers.up.adapters["default"].scaling for m in (model, again)]
    assert scalings[0] == pytest.approx(scalings[1], rel=1e-15)


def test_layout_is_that_of_torch(tmp_path):
    model = adapted()
    save(model, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / TENSORS)
    up = model.layers.up.adapters["default"]
    np.testing.assert_array_equal(tensors[key_of("layers.1.up")], up.lora_a[...][1].T)
    np.testing.assert_array_equal(tensors[key_of("layers.1.up", "B")], up.lora_b[...][1].T)
    stacked = (f"layers.{i}.{m}" for i in range(2) for m in ("up", "down"))
    modules = "heads", "items.0", "items.1", "out", *stacked
    assert set(tensors) == {key_of(m, side) for m in modules for side in "AB"}
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == sorted(modules)
    expected = {
        **{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": False, "task_type": None},
        **{"init_lora_weights": True, "base_model_name_or_path": "mine", "bias": "none"},
        **{"inference_mode": True, "fan_in_fan_out": False, "lora_dropout": 0.0},
        **{"rank_pattern": {}, "alpha_pattern": {}},
    }
    assert {k: config[k] for k in expected} == expected


def test_doubled_rank_keeps_the_scaling(tmp_path):
    save(adapted(init="pissa", rank_stabilized=True), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["use_rslora"]) == (4, False)
    assert config["lora_alpha"] / 4 == pytest.approx(3 / 2**0.5, rel=1e-15)


def test_origin_is_recorded_and_restored(tmp_path):
    model = adapted(init="nora", scale=0.2)
    save(model, tmp_path / "one")
    with safetensors.safe_open(tmp_path / "one" / TENSORS, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["nyscaled"] == nys.__version__
    (start,) = json.loads(metadata["starts"])
    assert start["init"] == "nora"
    assert start["options"] == {"scale": 0.2, "sketch": "gaussian", "side": "input"}
    assert start["key"] == jax.random.key_data(KEY).tolist()
    assert len(start["modules"]) == 8
    again = Model()
    nys.lora.load_peft(again, tmp_path / "one", names=NAMES)
    save(again, tmp_path / "two")
    with safetensors.safe_open(tmp_path / "two" / TENSORS, framework="numpy") as file:
        assert file.metadata() == metadata
    texts = [(tmp_path / name / CONFIG).read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]


def test_ranks_and_alphas_that_differ(tmp_path):
    model = Model()
    nys.lora.apply(model, alpha=4.0, targets={"heads": 1, "items.*": 3, "layers.*": 2}, key=KEY)
    nys.lora.apply(model, 3, 5.0, targets="out", key=KEY, rank_stabilized=True, dropout=0.1)
    train(model)
    save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 2
    assert config["lora_dropout"] == 0.1
    assert config["rank_pattern"] == {r"^heads": 1, r"^items\.0": 3, r"^items\.1": 3, "^out": 3}
    assert config["alpha_pattern"] == {"^out": pytest.approx(5 / 3**0.5 * 3)}
    again = Model()
    nys.lora.load_peft(again, tmp_path, names=NAMES)
    model.eval()
    np.testing.assert_allclose(again(X), model(X), atol=1e-6, rtol=1e-6)


def test_sets_on_one_base_are_saved_apart(tmp_path):
    model = adapted("first")
    nys.lora.apply(model, 3, targets="items.*", init="lora", key=KEY, name="second")
    train(model, "second")
    again = Model()
    for name in ("second", "first"):
        nys.lora.activate(model, name)  # what is active is not saved: the other set is not touched
        save(model, tmp_path / name, name=name)
        nys.lora.load_peft(again, tmp_path / name, name=name, names=NAMES)
    for name in ("first", "second", ()):
        nys.lora.activate(model, name)
        nys.lora.activate(again, name)
        np.testing.assert_array_equal(again(X), model(X))
    nys.lora.activate(model, rows=["first", None, "second", "first", None])
    save(model, tmp_path / "rows", name="first")
    files = [safetensors.numpy.load_file(tmp_path / name / TENSORS) for name in ("rows", "first")]
    jax.tree.map(np.testing.assert_array_equal, *files)


def test_narrow_factors_keep_their_dtype(tmp_path):
    model = adapted(targets="items.*", dtype=jnp.bfloat16)
    save(model, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / TENSORS)
    assert {str(t.dtype) for t in tensors.values()} == {"bfloat16"}
    again, wide = Model(), Model()
    nys.lora.load_peft(again, tmp_path, names=NAMES, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(again(X), model(X))
    nys.lora.load_peft(wide, tmp_path, names=NAMES)
    assert wide.items[0].adapters["default"].lora_a.dtype == jnp.float32


def test_dropout_comes_with_a_key(tmp_path):
    save(adapted(targets="layers.*", dropout=0.5), tmp_path)
    still, moving = Model(), Model()
    nys.lora.load_peft(still, tmp_path, names=NAMES)
    nys.lora.load_peft(moving, tmp_path, names=NAMES, key=KEY)
    assert jnp.max(jnp.abs(moving(X) - still(X))) > 1e-3
    moving.eval()
    np.testing.assert_array_equal(moving(X), still(X))


@pytest.mark.parametrize("place", ["flush", "os.replace"])
def test_a_failure_leaves_no_mixture(place, folder, monkeypatch):
    """Before the save the old adapter stays; after it there is the new one, moved or not."""
    model = Model()
    nys.lora.load_peft(model, folder, names=NAMES)
    before, replace = {f: (folder / f).read_bytes() for f in (TENSORS, CONFIG)}, os.replace

    def flush(path):
        raise OSError("no space left")

    def move(source, target):
        if str(target).endswith(CONFIG):
            raise OSError("gone")
        replace(source, target)

    if place == "flush":
        monkeypatch.setattr(files, "flush", flush)
    else:
        monkeypatch.setattr(files.os, "replace", move)
    with pytest.raises(OSError, match=r"no space|gone"):
        save(adapted(init="lora"), folder)
    if place == "flush":
        assert {f: (folder / f).read_bytes() for f in (TENSORS, CONFIG)} == before
        assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    else:
        monkeypatch.undo()
        nys.lora.load_peft(Model(), folder, names=NAMES)  # moves what was not moved
        assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
        assert (folder / TENSORS).read_bytes() != before[TENSORS]


def test_saved_over_another(folder):
    model = adapted(init="lora", targets="items.*")
    (folder / "README.md").write_text("kept")
    save(model, folder)
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, TENSORS]
    assert set(nys.lora.load_peft(Model(), folder, names=NAMES)) == {"items.0", "items.1"}


def test_the_base_may_be_a_path(tmp_path):
    nys.lora.save_peft(adapted(), tmp_path, base_model=tmp_path / "base", names=NAMES)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_names_by_a_function(tmp_path):
    model = Model()
    nys.lora.apply(model, 2, targets="layers.*", key=KEY)

    def names(path, index):
        if not index:
            raise ValueError(f"no {path} there")
        return f"h.{index[0]}.{path.split('.')[-1]}"

    nys.lora.save_peft(model, tmp_path, base_model="mine", names=names)
    assert set(nys.lora.load_peft(Model(), tmp_path, names=names)) == {"layers.up", "layers.down"}
    with pytest.raises(ValueError, match="have the same name"):
        nys.lora.load_peft(Model(), tmp_path, names=lambda path, index: f"h.{sum(index)}")


def test_a_layer_whose_name_ends_with_that_of_an_adapted_one(tmp_path):
    """PEFT takes the end of a name for the name."""

    def make():
        return nnx.Dict(out=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), inner=Model())

    model = make()
    nys.lora.apply(model, 2, targets="out", key=KEY)
    names = {"out": "out"} | {f"inner.{path}": f"inner.{name}" for path, name in NAMES.items()}
    nys.lora.save_peft(model, tmp_path, base_model="mine", names=names)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["target_modules"], config["exclude_modules"]) == (["out"], ["inner.out"])
    assert set(nys.lora.load_peft(make(), tmp_path, names=names)) == {"out"}
