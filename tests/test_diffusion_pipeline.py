"""Whole pipelines: autoencoder, text encoder, tokenizer, images; what diffusers computes."""

import dataclasses
import gzip
import inspect
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from diffusion_cases import FOLDER, close, expected
from flax import nnx
from huggingface_hub.utils import filter_repo_objects

import nyscaled as nys
from nyscaled.diffusion.component import places
from nyscaled.diffusion.loading import load_component
from nyscaled.diffusion.tokenizer import open_clip_tokenizer, text_tokens
from nyscaled.models import Numerics

TEXTS = (
    "a photo of sks dog",
    "A  Photo\tof 12 dogs, isn't it?",
    "",
    "caf\u00e9 cafe\u0301 \u6f22\u5b57 \U0001f415!!",
    "the dog's <|endoftext|> tail_2024",
    "dog " * 90,
)
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
TEXT1 = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TEXT2 = {
    "model_type": "clip_text_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


@pytest.fixture(scope="module")
def pipe():
    return nys.diffusion.load(FOLDER / "sd1")


@pytest.fixture(scope="module")
def small():
    """The text encoder and the tokenizer in the form of today."""
    folder = FOLDER / "sd2"
    encoder = load_component(
        nys.diffusion.TextEncoder, folder / "text_encoder", None, Numerics(), None
    )
    return encoder, open_clip_tokenizer(folder / "tokenizer")


@pytest.mark.parametrize(
    ("name", "model", "config", "count", "parameters"),
    [
        ("vae", nys.diffusion.Autoencoder, VAE, 248, 83_653_863),
        ("text-sd1", nys.diffusion.TextEncoder, TEXT1, 196, 123_060_480),
        ("text-sd2", nys.diffusion.TextEncoder, TEXT2, 372, 340_387_840),
    ],
)
def test_names_and_shapes_are_those_of_real_checkpoints(name, model, config, count, parameters):
    table = places(model.outline(model.config_class.from_json(config), Numerics()))
    shapes = {place.names[0]: list(place.shape) for place in table.values()}
    published = json.loads(gzip.decompress((FOLDER / "tensors.json.gz").read_bytes()))[name]
    prefix = model.prefix
    assert shapes == {prefix + key.removeprefix(prefix): value for key, value in published.items()}
    assert len(shapes) == count
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_latents_are_those_of_diffusers(pipe):
    values = expected("sd1", "vae")
    means, log_variances = nnx.jit(nys.diffusion.Autoencoder.moments)(
        pipe.autoencoder, values["images"]
    )
    close(means, values["means"])
    close(log_variances, values["log_variances"])
    scaled = 0.18215 * means
    decoded = nnx.jit(nys.diffusion.Autoencoder.decode)(pipe.autoencoder, scaled)
    close(decoded, values["decoded"])


def test_latents_are_drawn_around_their_means(pipe):
    means, log_variances = jnp.full((1, 3, 5, 4), 2.0), jnp.full((1, 3, 5, 4), -2.0)

    class Fixed(nys.diffusion.Autoencoder):
        def __init__(self):
            self.config, self.numerics = pipe.autoencoder.config, Numerics()

        def moments(self, images):
            return means, log_variances

    latents = Fixed().encode(jnp.zeros((1, 6, 10, 3)), key=jax.random.key(1))
    noise = jax.random.normal(jax.random.key(1), means.shape)
    close(latents, 0.18215 * (2 + np.exp(-1) * noise), 1e-6)
    close(Fixed().encode(jnp.zeros((1, 6, 10, 3))), 0.18215 * means, 1e-6)


def test_tokens_are_those_of_transformers(pipe, small):
    for name, tokenizer in (("sd1", pipe.tokenizer), ("sd2", small[1])):
        with pytest.warns(UserWarning, match="does not see 'dog dog"):
            tokens = text_tokens(tokenizer, TEXTS, 77)
        np.testing.assert_array_equal(tokens, expected(name, "tokenizer")["tokens"])


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_states_of_texts_are_those_of_transformers(pipe, small, name):
    encoder = pipe.text_encoder if name == "sd1" else small[0]
    tokens = expected(name, "tokenizer")["tokens"]
    close(nnx.jit(encoder)(tokens), expected(name, "text_encoder")["states"])


def test_images_are_those_of_diffusers(pipe):
    values = expected("sd1")
    options = {"key": jax.random.key(0), "steps": 4, "sampler": "plms"}
    noise = jnp.asarray(values["noise"])
    images = nys.diffusion.generate(pipe, TEXTS[:2], noise=noise, **options)
    close(images, values["images"])
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.long
def test_images_inside_of_jit_leave_the_pipeline_as_it_is(pipe):
    def images(key):
        return nys.diffusion.generate(pipe, ["dog"], key=key, steps=2)

    key = jax.random.key(0)
    inside, outside = jax.jit(images)(key), images(key)
    close(inside, outside)
    assert jax.vmap(images)(jax.random.split(key)).shape == (2, *outside.shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 1e40}, r"guidance is 1e\+40; expected a number in"),
        ({"key": 0}, "key is 0; expected one key"),
        ({"guidance": np.ones(2)}, "guidance is array.*; expected one number"),
        ({"noise": np.full((1, 4, 4, 4), np.nan, "f")}, "noise has NaN or Inf entries"),
        ({"noise": np.zeros((1, 4, 4, 4), object)}, "noise is a ndarray of dtype object"),
    ],
)
def test_options_of_images_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(nys.diffusion.generate)(
            pipe, ["dog"], **{"key": jax.random.key(0)} | options
        )


@pytest.mark.long
def test_sizes_and_guidance(pipe):
    key = jax.random.key(2)
    images = nys.diffusion.generate(pipe, ["dog"], key=key, steps=2)
    assert images.shape == (1, 8, 8, 3)
    other = nys.diffusion.generate(pipe, ["dog"], key=key, steps=2, guidance=1, sampler="ddpm")
    assert other.shape == images.shape
    assert not np.allclose(images, other, atol=1e-3)
    for size in ((8, 9), (0, 8), (8,), (8.0, 8.0), 8):
        with pytest.raises(ValueError, match="multiples of 2"):
            inspect.unwrap(nys.diffusion.generate)(pipe, ["dog"], key=key, size=size)
    with pytest.raises(ValueError, match="noise has shape"):
        nys.diffusion.generate(pipe, ["dog"], key=key, noise=jnp.zeros((2, 4, 4, 4)))


def test_saved_pipeline_is_read_again(pipe, tmp_path):
    nys.diffusion.save(pipe, tmp_path)
    again = nys.diffusion.load(tmp_path)
    for part in ("unet", "autoencoder", "text_encoder"):
        one, two = getattr(pipe, part), getattr(again, part)
        assert one.config == two.config
        jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(two))
    assert again.schedule == pipe.schedule
    with pytest.warns(UserWarning, match="does not see"):
        tokens = text_tokens(again.tokenizer, TEXTS, 77)
    np.testing.assert_array_equal(tokens, expected("sd1", "tokenizer")["tokens"])
    names = safetensors.numpy.load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert "encoder.mid_block.attentions.0.to_out.0.weight" in names
    names = safetensors.numpy.load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]


def change(folder, file, **changes):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "SDXL is not"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "inpainting is"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
        ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D"]}, "for each of 2 levels"),
        ("vae/config.json", {"norm_num_groups": 3}, "expected multiples of norm_num_groups"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "expected 'AutoencoderKL'"),
        ("text_encoder/config.json", {"model_type": "bert"}, "expected 'clip_text_model'"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder/config.json", {"num_attention_heads": 4}, "multiple of num_attention"),
        ("tokenizer/vocab.json", {"<|endoftext|>": "no"}, "vocabulary"),
        ("tokenizer/vocab.json", {"<|endoftext|>": 600}, "a token 600, and .* has 526 rows"),
        ("unet/config.json", {"sample_size": [4, 4, 4]}, "sample_size is .4, 4, 4.; expected a si"),
    ],
)
def test_other_pipelines_are_refused(tmp_path, file, changes, message):
    shutil.copytree(FOLDER / "sd1", tmp_path, dirs_exist_ok=True)
    change(tmp_path, file, **changes)
    with pytest.raises(ValueError, match=message):
        nys.diffusion.load(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    shutil.copytree(FOLDER / "sd1", tmp_path, dirs_exist_ok=True)
    words = tokenizers.models.WordPiece({"[UNK]": 0, "dog": 1}, unk_token="[UNK]")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json has a WordPiece; expected BPE"):
        nys.diffusion.load(tmp_path)


def test_a_pipeline_with_adapters_leaves_the_folder_as_it_is(pipe, tmp_path):
    adapted = dataclasses.replace(pipe, text_encoder=nnx.clone(pipe.text_encoder))
    key = jax.random.key(0)
    nys.lora.apply(adapted.text_encoder, 2, targets=r".*\.0\..*q_proj", key=key)
    with pytest.raises(ValueError, match="expected only its own parameters"):
        nys.diffusion.save(adapted, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("read", ["load", "outline", "load_unet"])
def test_a_variant_without_a_name_is_refused(read):
    with pytest.raises(ValueError, match="variant is ''; expected a text such as 'fp16', or None"):
        getattr(nys.diffusion, read)(FOLDER / "sd1", variant="")


@pytest.mark.parametrize("read", ["load", "load_unet"])
def test_a_single_file_is_refused(read):
    with pytest.raises(
        ValueError, match=r"json is a file; expected a folder .* `from_single_file`"
    ):
        getattr(nys.diffusion, read)(FOLDER / "sd1" / "model_index.json")


def test_a_unet_is_not_read_from_the_hub():
    with pytest.raises(ValueError, match="as load_unet reads nothing from the hub"):
        nys.diffusion.load_unet("CompVis/nothing")


def test_a_pipeline_without_values_is_not_saved(tmp_path):
    pipe = nys.diffusion.outline(FOLDER / "sd1")
    for model in (pipe, pipe.unet):
        with pytest.raises(ValueError, match="has shapes in place of values; expected that of `lo"):
            nys.diffusion.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_models_that_do_not_fit_are_refused(pipe, small):
    config = nys.diffusion.TextEncoderConfig(hidden_size=8)
    other = nys.diffusion.TextEncoder.outline(config, Numerics())
    with pytest.raises(ValueError, match="cross_attention_dim of the U-Net is 6; expected 8"):
        nys.diffusion.Pipeline(pipe.unet, pipe.autoencoder, other, pipe.tokenizer, pipe.schedule)
    with pytest.raises(ValueError, match="expected a model of nys"):
        nys.diffusion.save(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "nowhere")


def test_images_of_another_shape_are_refused(pipe):
    for shape, message in (((1, 6, 9, 3), "multiples of 2"), ((1, 6, 10, 4), "expected floats")):
        with pytest.raises(ValueError, match=message):
            pipe.autoencoder.encode(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="expected floats"):
        pipe.autoencoder.encode(np.zeros((1, 6, 10, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images have values of size 255; expected values from"):
        pipe.autoencoder.encode(np.full((1, 6, 10, 3), 255, np.float32))
    with pytest.raises(ValueError, match="images is a ndarray of dtype object; expected"):
        pipe.autoencoder.encode(np.zeros((1, 6, 10, 3), object))
    with pytest.raises(ValueError, match="latents are"):
        pipe.autoencoder.decode(np.zeros((1, 4, 3, 5), np.float32))


def test_pipelines_of_the_hub(monkeypatch, tmp_path, pipe):
    cache = tmp_path / "cache"

    def download(name, *, revision, allow_patterns, ignore_patterns):
        files = [str(p.relative_to(FOLDER / "sd1")) for p in (FOLDER / "sd1").rglob("*.*")]
        files += [
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.bin",
        ]
        files += ["safety_checker/model.safetensors", "v1-4.ckpt", "scheduler/x.json"]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            there = FOLDER / "sd1" / file
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_bytes(there.read_bytes() if there.exists() else b"{}")
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = nys.diffusion.load("owner/sd1", revision="v1")
    assert again.unet.config == pipe.unet.config
    kept = {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()}
    assert "vae/diffusion_pytorch_model.safetensors" in kept
    assert not any(".bin" in name or "fp16" in name or "safety" in name for name in kept)
    with pytest.raises(ValueError, match=r"came without unet/diffusion_pytorch_model\.non_ema"):
        nys.diffusion.load("owner/sd1", variant="non_ema")
    with pytest.raises(ValueError, match="expected no revision"):
        nys.diffusion.load(FOLDER / "sd1", revision="v1")
