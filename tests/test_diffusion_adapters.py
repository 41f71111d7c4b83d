"""Adapter files of diffusers: round trips, all namings, and what is refused."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from diffusion_cases import FOLDER
from flax import nnx

import nyscaled as nys
from nyscaled.checkpoints.diffusers_lora import FILE
from nyscaled.diffusion.loading import load_component
from nyscaled.models import Numerics

TARGETS = r".*\.(to_q|to_v|to_out\.0|proj_in|net\.2)"
ATTENTION = r".*\.(to_q|to_out\.0)"


@functools.cache
def bases():
    folder, model = FOLDER / "sd1" / "text_encoder", nys.diffusion.TextEncoder
    encoder = load_component(model, folder, None, Numerics(), None)
    return nys.diffusion.load_unet(FOLDER / "bk"), encoder


def unet():
    return nnx.clone(bases()[0])


def text_encoder():
    return nnx.clone(bases()[1])


def adapted(model, targets=TARGETS, **options):
    """The model with adapters of which no factor is zero."""
    options = {"rank": 2, "alpha": 6, "key": jax.random.key(0), **options}
    for i, layer in enumerate(nys.lora.apply(model, targets=targets, **options).values()):
        b = layer.adapters["default"].lora_b
        b[...] = b[...] + 0.1 * np.random.default_rng(i).normal(size=b.shape).astype("f")
    return model


def updates(model):
    """What adapters add to kernels, by path."""
    values = {}
    for path, layer in nys.lora.adapted_layers(model).items():
        adapter = layer.adapters["default"]
        values[path] = adapter.scaling * np.asarray(adapter.lora_a[...] @ adapter.lora_b[...])
        if adapter.start is not None:
            start = (np.asarray(adapter.start[side][...]) for side in "ab")
            values[path] = values[path] - adapter.scaling * np.matmul(*start)
    return values


def require_equal(one, two):
    assert one.keys() == two.keys()
    for path, value in one.items():
        np.testing.assert_allclose(two[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Adapters of attention in a U-Net and a text encoder, and their file."""
    folder = tmp_path_factory.mktemp("saved")
    model = adapted(unet(), ATTENTION)
    encoder = adapted(text_encoder(), r".*\.(q|k|v|out)_proj")
    nys.lora.save_diffusers(model, folder, text_encoder=encoder)
    return folder, updates(model), updates(encoder)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("init", ["pissa", "nora"])
def test_round_trip(init, tmp_path):
    model = adapted(unet(), init=init)
    nys.lora.save_diffusers(model, tmp_path)
    again = unet()
    layers = nys.lora.load_diffusers(again, tmp_path)
    assert layers.keys() == nys.lora.adapted_layers(model).keys()
    require_equal(updates(model), updates(again))
    path = "down_blocks.0.attentions.0.proj_in"
    adapter = layers[path].adapters["default"]
    assert (adapter.alpha / adapter.rank, adapter.rank) == (3, 4 if init == "pissa" else 2)
    assert adapter.init[0] == init
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert tensors[f"unet.{path}.lora_B.weight"].shape == (4, adapter.rank, 1, 1)


def test_text_encoder_has_its_own_names(saved):
    folder, of_unet, of_encoder = saved
    model, encoder = unet(), text_encoder()
    layers = nys.lora.load_diffusers(model, folder, text_encoder=encoder)
    assert "text_encoder.encoder.layers.0.self_attn.q_proj" in layers
    require_equal(of_unet, updates(model))
    require_equal(of_encoder, updates(encoder))
    with pytest.raises(ValueError, match="adapters of text_encoder"):
        nys.lora.load_diffusers(unet(), folder)
    with pytest.raises(ValueError, match="has an adapter named 'default'"):
        nys.lora.load_diffusers(model, folder, text_encoder=encoder)


def test_adapters_of_the_text_encoder_alone_are_written_again(saved, tmp_path):
    folder, _, of_encoder = saved
    renamed(folder, tmp_path, lambda key: key if "text" in key else None)
    model, encoder, again = unet(), text_encoder(), text_encoder()
    nys.lora.load_diffusers(model, tmp_path, text_encoder=encoder)
    nys.lora.save_diffusers(model, tmp_path / "again", text_encoder=encoder)
    nys.lora.load_diffusers(model, tmp_path / "again", text_encoder=again)
    require_equal(of_encoder, updates(again))
    with pytest.raises(ValueError, match=r"adapter is 'other'; the model has .'default'"):
        nys.lora.save_diffusers(model, tmp_path, text_encoder=encoder, name="other")


def renamed(saved, folder, rename, metadata=None):
    """The file with other names; `rename` maps a key to one, or to None."""
    tensors = safetensors.numpy.load_file(saved / FILE)
    others = {rename(key): value for key, value in tensors.items()}
    others.pop(None, None)
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(others, folder / FILE, metadata=metadata)
    return others


def script(key):
    key = key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
    return key.replace("_proj.lora.", "_proj.lora_linear_layer.")


def processors(key):
    if key.startswith("text"):
        return None
    key = script(key).removeprefix("unet.").replace(".to_out.0.", ".to_out.")
    return re.sub(r"\.(to_\w+)\.lora\.", r".processor.\1_lora.", key)


def attention_of_2023(key):
    """Of text encoders; the U-Net's names then are those of `processors`, which have no text."""
    key = script(key)
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out"}
    return re.sub(
        r"\.(q|k|v|out)_proj\.lora_linear_layer\.", lambda m: f".{names[m[1]]}_lora.", key
    )


def kohya(key):
    for component, short in (("unet.", "lora_unet_"), ("text_encoder.", "lora_te_")):
        if key.startswith(component):
            module, _, side = key.removeprefix(component).rpartition(".lora_")
            side = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[side]
            return short + module.replace(".", "_") + "." + side


@pytest.mark.parametrize("rename", [str, script, processors, attention_of_2023, kohya])
def test_all_namings_are_the_same_adapters(saved, rename, tmp_path):
    folder, of_unet, of_encoder = saved
    renamed(folder, tmp_path, rename)
    model, encoder = unet(), text_encoder()
    nys.lora.load_diffusers(model, tmp_path / FILE, text_encoder=encoder)
    require_equal(of_unet, updates(model))
    if rename is not processors:
        require_equal(of_encoder, updates(encoder))


def test_alpha_is_that_of_the_file(saved, tmp_path):
    folder, of_unet, _ = saved
    doubled = {path: 2 * value for path, value in of_unet.items()}
    keys = renamed(folder, tmp_path, lambda key: None if "text" in key else kohya(key))
    alphas = {key.rpartition(".lora_")[0] + ".alpha": np.float32(4) for key in keys}
    tensors = {**keys, **{key: np.asarray(value) for key, value in alphas.items()}}
    safetensors.numpy.save_file(tensors, tmp_path / FILE)
    model = unet()
    nys.lora.load_diffusers(model, tmp_path)
    require_equal(doubled, updates(model))
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q", "to_out.0"]}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    renamed(folder, tmp_path, lambda key: None if "text" in key else key, metadata)
    model = unet()
    nys.lora.load_diffusers(model, tmp_path)
    require_equal(doubled, updates(model))


FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.lora_A.weight"), "has only B of unet.down_blocks"),
        (lambda t: t.update({"unet.no.lora_A.weight": t[f"{FIRST}.lora_A.weight"]}), "only A of"),
        (lambda t: t.update({"unet.conv": np.ones(1, "f")}), "not a name of an adapter"),
        (
            lambda t: t.update({"lora_unet_no.lora_up.weight": np.ones((4, 2), "f")}),
            "for which the model has no layer",
        ),
        (
            lambda t: t.update({"mid.to_q.lora_A.weight": np.ones((2, 4), "f")}),
            "a component in front",
        ),
        (
            lambda t: t.update({f"{FIRST}.lora.down.weight": np.ones((2, 4), "f")}),
            "the factor A of unet.*twice",
        ),
        (
            lambda t: t.update({f"{FIRST}.lora_A.weight": np.ones((2, 4, 3, 3), "f")}),
            "a convolution with more than one pixel",
        ),
        (
            lambda t: t.update({f"{FIRST}.lora_A.weight": np.ones((2, 5), "f")}),
            "expected an adapter of this base",
        ),
        (
            lambda t: t.update({f"{FIRST}.lora_A.weight": np.full((2, 4), np.nan, "f")}),
            "NaN or Inf",
        ),
        (
            lambda t: t.update(
                {f"unet.mid.to_q.lora_{side}.weight": np.ones((2, 2), "f") for side in "AB"}
            ),
            "which no layer of the model is called",
        ),
    ],
)
def test_unsound_files_are_refused_and_change_nothing(saved, change, message, tmp_path):
    tensors = renamed(saved[0], tmp_path, lambda key: None if "text" in key else key)
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / FILE)
    model = unet()
    with pytest.raises(ValueError, match=message):
        nys.lora.load_diffusers(model, tmp_path)
    assert not nys.lora.adapted_layers(model)


def test_metadata_must_agree(saved, tmp_path):
    for config, message in (
        ({"unet.r": 3, "unet.lora_alpha": 3, "unet.target_modules": ["to_q"]}, "of rank 2"),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True}, "only plain LoRA"),
        ("no object", "lora_adapter_metadata"),
    ):
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        renamed(saved[0], tmp_path, lambda key: None if "text" in key else key, metadata)
        with pytest.raises(ValueError, match=message):
            nys.lora.load_diffusers(unet(), tmp_path)


@pytest.mark.parametrize("scaling", ["0", "[1]", "1" + 400 * "0"])
def test_scalings_that_are_not_written_here_are_refused(saved, scaling, tmp_path):
    metadata = {"scalings": f'{{"{FIRST}": {scaling}}}'}
    renamed(saved[0], tmp_path, lambda key: None if "text" in key else key, metadata)
    with pytest.raises(ValueError, match="metadata 'scalings' that are not what is written here"):
        nys.lora.load_diffusers(unet(), tmp_path)


def test_merged_and_missing_adapters_are_refused(tmp_path):
    model = adapted(unet(), ATTENTION)
    with pytest.raises(ValueError, match="adapter is 'other'"):
        nys.lora.save_diffusers(model, tmp_path, name="other")
    nys.lora.merge(model)
    with pytest.raises(ValueError, match=r"unet\.down_blocks.* is merged into the kernel"):
        nys.lora.save_diffusers(model, tmp_path)
    with pytest.raises(ValueError, match="there is no"):
        nys.lora.load_diffusers(unet(), tmp_path)


@pytest.mark.long
def test_outputs_are_the_same(tmp_path):
    model = adapted(unet())
    nys.lora.save_diffusers(model, tmp_path)
    again = unet()
    nys.lora.load_diffusers(again, tmp_path)
    keys = jax.random.split(jax.random.key(1))
    latents, context = (
        jax.random.normal(keys[0], (1, 4, 4, 4)),
        jax.random.normal(keys[1], (1, 3, 6)),
    )
    one, two = (nnx.jit(each)(latents, jnp.array(5), context) for each in (model, again))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_adapters_of_alpha_0_are_written_and_read(saved, tmp_path):
    config = {"unet.r": 2, "unet.lora_alpha": 0, "unet.target_modules": ["to_q", "to_out.0"]}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    renamed(saved[0], tmp_path, lambda key: None if "text" in key else key, metadata)
    model, again = unet(), unet()
    nys.lora.load_diffusers(model, tmp_path)
    nys.lora.save_diffusers(model, tmp_path / "again")
    nys.lora.load_diffusers(again, tmp_path / "again")
    assert updates(again).keys() == updates(model).keys()
    assert not any(np.any(value) for value in updates(again).values())


def test_patterns_with_the_prefix_of_transformers_4_are_read(tmp_path):
    """Names of modules have no `text_model.` here, nor have the patterns for them."""
    encoder = text_encoder()
    width = encoder.encoder.layers[0].self_attn.q_proj.kernel.shape[0]
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {
        f"text_encoder.{name}.lora_A.weight": np.ones((4, width), "f"),
        f"text_encoder.{name}.lora_B.weight": np.ones((width, 4), "f"),
    }
    fields = {"r": 2, "lora_alpha": 2, "alpha_pattern": {name: 16}, "rank_pattern": {name: 4}}
    fields |= {"target_modules": name.replace(".", r"\.")}
    config = {"text_encoder." + k: v for k, v in fields.items()}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    safetensors.numpy.save_file(tensors, tmp_path / FILE, metadata)
    layers = nys.lora.load_diffusers(unet(), tmp_path, text_encoder=encoder)
    (layer,) = layers.values()
    assert layer.adapters["default"].alpha == 16


def test_other_models_and_embeddings_are_not_saved(tmp_path):
    encoder = adapted(text_encoder(), r".*\.q_proj")
    with pytest.raises(ValueError, match="unet is a TextEncoder; expected a UNet2DConditionModel"):
        nys.lora.save_diffusers(encoder, tmp_path)
    tables = text_encoder()
    nys.lora.apply(tables, 2, targets=".*token_embedding", embeddings=True, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"text_encoder\..*token_embedding is an embedding; expected linear"
    ):
        nys.lora.save_diffusers(adapted(unet()), tmp_path, text_encoder=tables)
    assert not list(tmp_path.iterdir())


def test_scaled_factors_are_written_in_float32(tmp_path):
    """Half precision would lose small ones, and not hold large ones."""
    model = unet()
    layers = nys.lora.apply(
        model, 2, alpha=1e-4, targets=ATTENTION, key=jax.random.key(0), dtype=jnp.float16
    )
    for layer in layers.values():
        layer.adapters["default"].lora_b[...] += 1e-3
    nys.lora.save_diffusers(model, tmp_path)
    other = unet()
    nys.lora.load_diffusers(other, tmp_path)
    require_equal(updates(other), updates(model))
