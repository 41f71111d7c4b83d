"""Folders written here and read by diffusers, and the other way: the same images and noise."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is in the repository

import dataclasses
import gzip
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from PIL import Image  # noqa: E402

import nyscaled as nys  # noqa: E402
from nyscaled.diffusion.tokenizer import open_clip_tokenizer, text_tokens  # noqa: E402

FOLDER = Path(__file__).parent.parent / "fixtures" / "diffusion"
TEXTS = "a photo of sks dog", "the dog's tail"


def close(actual, expected, tolerance=1e-4):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def first(x):
    """Channels second, as torch has them."""
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def pipe():
    return nys.diffusion.load(FOLDER / "sd1")


@pytest.fixture(scope="module")
def theirs(pipe, tmp_path_factory):
    """The pipeline that diffusers reads from what is written here."""
    folder = tmp_path_factory.mktemp("saved")
    nys.diffusion.save(pipe, folder)
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("ddim", diffusers.DDIMScheduler),
        ("plms", diffusers.PNDMScheduler),
        ("euler", diffusers.EulerDiscreteScheduler),
    ],
)
def test_images_of_a_saved_pipeline(pipe, theirs, sampler, kind):
    theirs.scheduler = kind.from_config(theirs.scheduler.config)
    noise = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    expected = theirs(list(TEXTS), latents=first(noise), **options).images
    images = nys.diffusion.generate(
        pipe, TEXTS, noise=noise, key=jax.random.key(0), steps=5, guidance=3.0, sampler=sampler
    )
    close(images, expected)


KINDS = (
    *("PNDM", "DDIM", "EulerDiscrete", "DDPM", "DPMSolverMultistep", "EulerAncestralDiscrete"),
    *("LMSDiscrete", "UniPCMultistep", "HeunDiscrete"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_a_file_that_states_all_defaults(kind):
    """The same as that of a file without settings, and diffusers' own."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")()
    stated = nys.diffusion.Schedule.from_json(json.loads(scheduler.to_json_string()))
    plain = nys.diffusion.Schedule.from_json({"_class_name": f"{kind}Scheduler"})
    np.testing.assert_array_equal(stated.exact_alphas, plain.exact_alphas)
    np.testing.assert_allclose(plain.alphas, scheduler.alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_where_samplers_of_other_files_end(kind, sampler):
    other = {"ddim": diffusers.DDIMScheduler, "plms": diffusers.PNDMScheduler}[sampler]
    options = {"clip_sample": False} if sampler == "ddim" else {"skip_prk_steps": True}
    plain = {"_class_name": f"{kind}Scheduler", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = other.from_config(plain, **options)
    theirs.set_timesteps(5)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    ours = nys.diffusion.sample(
        lambda x, time: jnp.sin(x), nys.diffusion.Schedule.from_json(plain), x, steps=5,
        sampler=sampler,
    )  # fmt: skip
    latents = first(x)
    for time in theirs.timesteps:
        latents = theirs.step(torch.sin(latents), time, latents).prev_sample
    close(first(ours), latents, 1e-5)


def test_saved_models_are_those_that_were_read(theirs):
    original = diffusers.AutoencoderKL.from_pretrained(FOLDER / "sd1" / "vae")
    pairs = (
        (theirs.vae, original),
        (theirs.unet, diffusers.UNet2DConditionModel.from_pretrained(FOLDER / "sd1" / "unet")),
        (
            theirs.text_encoder,
            transformers.CLIPTextModel.from_pretrained(FOLDER / "sd1" / "text_encoder"),
        ),
    )
    for ours, model in pairs:
        saved, tensors = ours.state_dict(), model.state_dict()
        assert saved.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(saved[name].float(), tensor.float()), name


@pytest.mark.parametrize("name", ["sd1", "sd2", "bk"])
def test_noise_of_a_saved_unet(name, tmp_path):
    unet = nys.diffusion.load_unet(FOLDER / name)
    nys.diffusion.save(unet, tmp_path)
    model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    keys = jax.random.split(jax.random.key(2))
    latents, context = (
        jax.random.normal(keys[0], (3, 6, 5, 4)),
        jax.random.normal(keys[1], (3, 7, 6)),
    )
    times = np.array([1, 500, 999])
    with torch.no_grad():
        noise = model(first(latents), torch.tensor(times), torch.tensor(np.asarray(context))).sample
    close(first(jax.jit(unet)(latents, times, context)), noise)


def test_noise_and_targets(pipe, theirs):
    keys = jax.random.split(jax.random.key(3))
    latents, noise = (jax.random.normal(key, (2, 3, 5, 4)) for key in keys)
    times = jnp.array([10, 800])
    scheduler = diffusers.DDPMScheduler.from_config(theirs.scheduler.config)
    index = torch.tensor(np.asarray(times))
    noisy = scheduler.add_noise(first(latents), first(noise), index)
    close(first(pipe.schedule.noisy(latents, noise, times)), noisy, 1e-5)
    schedule = nys.diffusion.Schedule(prediction_type="v_prediction")
    velocity = scheduler.get_velocity(first(latents), first(noise), index)
    close(first(schedule.target(latents, noise, times)), velocity, 1e-5)


def lines(count):
    """Lines of text: of this repository's pages, and of random signs."""
    pages = Path(__file__).parents[2] / "docs" / "pages"
    text = "\n".join(path.read_text() for path in sorted(pages.glob("*.md")))
    found = [line for line in text.split("\n") if line.strip()][: count // 2]
    generator = np.random.default_rng(0)
    signs = [chr(i) for i in (*range(32, 127), *range(160, 600), 0x3B1, 0x6F22, 0x1F415)]
    random = ["".join(generator.choice(signs, 40)) for _ in range(count - len(found))]
    return found + random


@pytest.mark.filterwarnings("ignore:a text has")
def test_tokens_of_clips_vocabulary_are_those_of_transformers(tmp_path):
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("needs CLIP's vocabulary: pip install --no-deps open-clip-torch")
    file = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1:48895]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert len(vocabulary) == 49408
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours, texts = open_clip_tokenizer(tmp_path), lines(1000)
    assert text_tokens(ours, ["a photo of sks dog"], 77)[0, :7].tolist() == [
        *(49406, 320, 1125, 539, 48136, 1929, 49407),
    ]
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    rows = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    np.testing.assert_array_equal(text_tokens(ours, texts, 77), rows)


ATTENTION = "to_q", "to_k", "to_v", "to_out.0"


@pytest.fixture(scope="module")
def unet():
    return nys.diffusion.load_unet(FOLDER / "sd1")


def inputs():
    generator = np.random.default_rng(4)
    shapes = (2, 4, 4, 4), (2, 7, 6)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@nnx.jit
def run(unet):
    return unet(inputs()[0], jnp.array([3, 800]), inputs()[1])


def run_theirs(model):
    latents, context = inputs()
    with torch.no_grad():
        texts = torch.tensor(np.asarray(context))
        return model(first(latents), torch.tensor([3, 800]), texts).sample


@pytest.mark.parametrize("init", ["nora", "pissa", "olora"])
def test_adapters_of_here_in_diffusers(theirs, unet, init, tmp_path):
    """With α ≠ r, in feed-forward layers and in what diffusers has as convolutions of one pixel."""
    model, pattern = nnx.clone(unet), r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.2)"
    base = run(model)
    layers = nys.lora.apply(
        model, rank=2, alpha=6, targets=pattern, init=init, key=jax.random.key(0)
    )
    for i, layer in enumerate(layers.values()):
        b = layer.adapters["default"].lora_b
        b[...] = b[...] + 0.1 * jax.random.normal(jax.random.key(i), b.shape)
    nys.lora.save_diffusers(model, tmp_path)
    theirs.load_lora_weights(tmp_path)
    try:
        close(first(run(model)), run_theirs(theirs.unet), 1e-5)
    finally:
        theirs.unload_lora_weights()
    assert np.abs(run(model) - base).max() > 0.01
    close(first(base), run_theirs(theirs.unet), 1e-5)


@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, "ff.net.2", "proj_in")])
def test_adapters_of_diffusers_here(theirs, unet, targets, tmp_path):
    model = diffusers.UNet2DConditionModel.from_pretrained(FOLDER / "sd1" / "unet").float()
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=list(targets))
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    ours = nnx.clone(unet)
    nys.lora.load_diffusers(ours, tmp_path)
    close(first(run(ours)), run_theirs(model), 1e-5)


def test_adapters_of_a_text_encoder_of_2023(pipe, theirs, tmp_path):
    generator = np.random.default_rng(5)
    width = pipe.text_encoder.config.hidden_size
    tensors = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.to_{layer}_lora.{side}.weight": (
            generator.normal(size=shape).astype(np.float32)
        )
        for layer in ("q", "k", "v", "out")
        for side, shape in (("down", (2, width)), ("up", (width, 2)))
    }
    file, encoder = tmp_path / "pytorch_lora_weights.safetensors", nnx.clone(pipe.text_encoder)
    safetensors.numpy.save_file(tensors, file)
    assert len(nys.lora.load_diffusers(pipe.unet, file, text_encoder=encoder)) == 4
    tokens = jnp.asarray(text_tokens(pipe.tokenizer, TEXTS, 77))
    theirs.load_lora_weights(tmp_path)
    try:
        with torch.no_grad():
            states = theirs.text_encoder(torch.tensor(np.asarray(tokens)))[0]
    finally:
        theirs.unload_lora_weights()
    close(encoder(tokens), states, 1e-5)
    assert np.abs(encoder(tokens) - pipe.text_encoder(tokens)).max() > 0.01


def test_adapters_of_a_run_in_diffusers(pipe, theirs, tmp_path):
    """Of the U-Net and of the text encoder: the same states of texts, noise and images."""
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    Image.fromarray(pixels).save(images / "dog.png")
    nys.finetune.dreambooth.run(
        nys.finetune.dreambooth.Config(
            model=str(FOLDER / "sd1"), images=images, prompt="a photo of sks dog", method="pissa",
            learning_rate=3e-2, steps=20, out=tmp_path / "out", train_text_encoder=True,
        )
    )  # fmt: skip
    tuned = dataclasses.replace(
        pipe, unet=nnx.clone(pipe.unet), text_encoder=nnx.clone(pipe.text_encoder)
    )
    adapter, encoder = tmp_path / "out" / "adapter", tuned.text_encoder
    nys.lora.load_diffusers(tuned.unet, adapter, text_encoder=encoder)
    tokens = jnp.asarray(text_tokens(pipe.tokenizer, TEXTS, 77))
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    noise = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    theirs.load_lora_weights(adapter)
    try:
        close(first(run(tuned.unet)), run_theirs(theirs.unet), 1e-5)
        with torch.no_grad():
            states = theirs.text_encoder(torch.tensor(np.asarray(tokens)))[0]
        close(encoder(tokens), states, 1e-5)
        images = theirs(list(TEXTS), latents=first(noise), **options).images
    finally:
        theirs.unload_lora_weights()
    ours = nys.diffusion.generate(
        tuned, TEXTS, noise=noise, key=jax.random.key(0), steps=5, guidance=3.0, sampler="ddim"
    )
    close(ours, images)
    assert np.abs(run(tuned.unet) - run(pipe.unet)).max() > 0.01
    assert np.abs(encoder(tokens) - pipe.text_encoder(tokens)).max() > 0.01
