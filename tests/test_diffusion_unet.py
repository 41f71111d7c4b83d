"""U-Nets read from folders of diffusers: outputs, names and shapes, and what is refused."""

import functools
import gzip
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from diffusion_cases import FOLDER, close, expected
from flax import nnx

import nyscaled as nys
from nyscaled.diffusion.component import places
from nyscaled.models import Numerics

NAMES = "bk", "sd2", "sd1"  # sd1 is in test_diffusion_pipeline.py too
SD2 = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
THREE = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": None,
}
REAL = {
    "unet-sd1": ({"cross_attention_dim": 768}, 686, 859_520_964),
    "unet-sd2": ({"cross_attention_dim": 1024, **SD2}, 686, 865_910_724),
    "unet-small-sd": ({"cross_attention_dim": 768, "layers_per_block": 1}, 442, 579_384_964),
    "unet-tiny-sd": (
        {"cross_attention_dim": 768, "layers_per_block": 1, **THREE},
        358,
        323_384_964,
    ),
}


@functools.cache
def unet_of(name):
    return nys.diffusion.load_unet(FOLDER / name)


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_diffusers(name):
    values = expected(name, "unet")
    inputs = (values[key] for key in ("latents", "timesteps", "context"))
    close(nnx.jit(unet_of(name))(*inputs), values["noise"], 3e-5)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.long_beyond(1)
def test_names_and_shapes_are_those_of_real_checkpoints(name):
    config, count, parameters = REAL[name]
    config = nys.diffusion.UNetConfig.from_json({"_class_name": "UNet2DConditionModel", **config})
    started = time.process_time()
    table = places(nys.diffusion.UNet.outline(config, Numerics()))
    assert time.process_time() - started < 4  # 0.9 s when nothing else runs
    shapes = {place.names[0]: list(place.shape) for place in table.values()}
    published = json.loads(gzip.decompress((FOLDER / "tensors.json.gz").read_bytes()))
    assert shapes == published[name]
    assert len(shapes) == count
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("name", ["bk", "sd2"])
def test_saved_folder_holds_the_same_tensors_and_configuration(name, tmp_path):
    nys.diffusion.save(unet_of(name), tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    original = FOLDER / name / "unet"
    saved = {
        key: value
        for file in tmp_path.glob("*.safetensors")
        for key, value in safetensors.numpy.load_file(file).items()
    }
    tensors = safetensors.numpy.load_file(original / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(saved[key], value.astype(np.float32), strict=True)
    before, after = (
        {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if v}
        for folder in (original, tmp_path)
    )
    assert after == {k: v for k, v in before.items() if k != "_diffusers_version"}
    again = nys.diffusion.load_unet(tmp_path)
    assert again.config == unet_of(name).config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(unet_of(name)))


@pytest.mark.long
def test_remat_changes_no_gradient():
    values = expected("bk", "unet")
    x, times, context = values["latents"][:1, :4, :4], 7, values["context"][:1]
    again = nys.diffusion.load_unet(FOLDER / "bk", remat=True)

    @nnx.jit
    def gradient(unet):
        return nnx.grad(lambda unet: jnp.mean(unet(x, times, context) ** 2))(unet)

    one, two = gradient(unet_of("bk")), gradient(again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two)


@pytest.mark.long
def test_remat_takes_a_model_from_outside_and_advances_dropout():
    unet = nys.diffusion.load_unet(FOLDER / "bk", remat=True)
    values = expected("bk", "unet")
    x, context = values["latents"][:1, :4, :4], values["context"][:1]

    def mean(x):
        return jnp.mean(unet(x, 7, context))

    assert jnp.isfinite(jax.jit(jax.grad(mean))(x)).all()
    options = {"rank": 2, "alpha": 2, "init": "nora", "dropout": 0.5, "key": jax.random.key(0)}
    nys.lora.apply(unet, targets=r".*attn1.to_q", **options)
    quiet = nnx.view(unet, deterministic=True, raise_if_not_found=False)
    assert jnp.isfinite(jax.jit(lambda x: quiet(x, 7, context))(x)).all()
    assert not any(jax.tree.leaves(nnx.state(unet, nnx.RngCount)))
    nnx.jit(lambda unet: unet(x, 7, context))(unet)
    counts = jax.tree.leaves(nnx.state(unet, nnx.RngCount))
    assert counts
    assert all(counts)


@pytest.mark.long
def test_bfloat16_is_near():
    values = expected("bk", "unet")
    unet = nys.diffusion.load_unet(FOLDER / "bk", compute_dtype=jnp.bfloat16)
    inputs = (values[key] for key in ("latents", "timesteps", "context"))
    noise = nnx.jit(unet)(*inputs)
    assert noise.dtype == jnp.bfloat16
    close(noise, values["noise"], 0.05)


@pytest.mark.long
def test_variant_and_mesh(tmp_path):
    shutil.copytree(FOLDER / "bk" / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(ValueError, match=r"no diffusion_pytorch_model.*fp16"):
        nys.diffusion.load_unet(tmp_path)
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=axes)
    unet = nys.diffusion.load_unet(tmp_path, variant="fp16", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(unet), nnx.state(unet_of("bk")))
    last = unet.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[2].kernel
    assert tuple(last[...].sharding.spec) == ("tensor", "fsdp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text_time"}, "SDXL is not supported"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "SDXL is not supported"),
        ({"in_channels": 9}, "inpainting"),
        ({"_class_name": "ControlNetModel"}, "ControlNet is not supported"),
        ({"_class_name": "Transformer2DModel"}, "expected 'UNet2DConditionModel'"),
        ({"_class_name": None}, "expected 'UNet2DConditionModel'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; expected 'silu'"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos is 1"),
        ({"a_setting_of_tomorrow": True}, "not a setting that is known"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4"),
        ({"down_block_types": ["DownBlock2D"]}, "for each of 2 levels"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is"),
        ({"block_out_channels": [4, 7]}, "has 7; expected even multiples"),
        ({"block_out_channels": 4}, "expected a list"),
        ({"attention_head_dim": [2]}, "expected a number, or one for each"),
        ({"layers_per_block": 0}, "expected an integer from 1"),
        ({"norm_eps": "small"}, "expected a positive number"),
        ({"cross_attention_dim": 8}, "expected \\(4, 8\\)"),
        ({"layers_per_block": 2}, "has no tensor for UNet's"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, "has no parameter for"),
    ],
)
def test_other_models_are_refused_by_name(changes, message, tmp_path):
    shutil.copytree(FOLDER / "bk" / "unet", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        nys.diffusion.load_unet(tmp_path)


def test_single_files_and_pickles_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="single files are not supported"):
        nys.diffusion.load_unet(file)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickle"):
        nys.diffusion.load_unet(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 4, 4)[:3], (), (1, 2, 6)), "latents are float.* of shape"),
        (((1, 4, 4, 4), (2,), (1, 2, 6)), "timesteps have shape"),
        (((1, 4, 4, 4), (), (2, 2, 6)), "context is float.* of shape"),
        (((1, 4, 4, 4), (), (1, 2, 7)), "context is float.* of shape"),
        (((1, 4, 4, 4), (), (1, 0, 6)), "context is float.* of shape"),
        (((1, 4, 4, 3), (), (1, 2, 6)), "channels last"),
    ],
)
def test_arrays_of_other_shapes_are_refused(shapes, message):
    latents, times, context = map(np.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        unet_of("bk")(latents, times, context)


@pytest.mark.parametrize("dtype", [int, object])
def test_contexts_of_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match=r"context is .*; expected"):
        unet_of("bk")(np.zeros((1, 4, 4, 4)), 5, np.zeros((1, 2, 6), dtype))


def test_pixels_are_not_latents():
    with pytest.raises(ValueError, match=r"latents are uint8 of shape .*; expected floats"):
        unet_of("bk")(np.zeros((1, 4, 4, 4), np.uint8), 5, np.zeros((1, 2, 6), np.float32))
