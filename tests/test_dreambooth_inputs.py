"""What a run on images of a subject reads, what it refuses, and its command line."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from diffusion_cases import FOLDER
from dreambooth_cases import PROMPT, settings, words, write_images
from flax import nnx
from PIL import Image

import nyscaled as nys
from nyscaled.cli import main
from nyscaled.diffusion.tokenizer import text_tokens
from nyscaled.finetune.dreambooth.config import TARGETS, TEXT_TARGETS
from nyscaled.finetune.dreambooth.denoiser import Denoiser
from nyscaled.finetune.dreambooth.images import read
from nyscaled.finetune.dreambooth.preparation import opened, prepare
from nyscaled.finetune.dreambooth.step import Batch, train_step
from nyscaled.models import Numerics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for images."""
    return tmp_path_factory.mktemp("dreambooth")


def test_the_defaults_are_the_settings_of_the_paper():
    config = nys.finetune.dreambooth.Config(
        model="m", images=Path("i"), prompt=PROMPT, out=Path("o")
    )
    assert (config.rank, config.alpha, config.batch_size, config.steps) == (4, None, 1, 500)
    assert (config.learning_rate, config.schedule, config.warmup_steps) == (1e-4, "constant", 0)
    assert (config.weight_decay, config.clip, config.prior_weight) == (1e-2, 1.0, 1.0)
    assert (config.crop, config.class_count, config.eval_every) == ("random", 100, 100)


def test_the_adapted_layers_are_those_of_the_paper():
    """Of Stable Diffusion 1: the attention's, with 797,184 numbers at rank 4."""
    config = nys.diffusion.UNetConfig(cross_attention_dim=768)
    unet = nys.diffusion.UNet.outline(config, Numerics())
    layers = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(unet)
        if isinstance(module, nnx.Linear)
    }
    shapes = [m.kernel.shape for path, m in layers.items() if re.fullmatch(TARGETS, path)]
    assert (len(shapes), sum(4 * sum(shape) for shape in shapes)) == (128, 797_184)


@pytest.mark.long
def test_a_step_lowers_for_accelerators(root):
    """With products in full float32, which an accelerator would round otherwise."""
    plan = prepare(settings(root), opened(settings(root))).plan
    arguments = (
        plan.initial(),
        plan.parts.counts,
        plan.parts.frozen,
        plan.data.batch(0),
        np.float32(0),
    )
    traced = train_step.trace(*arguments, program=plan.program, objective=plan.objective)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = re.findall(r"stablehlo\.(?:dot_general|convolution)\b.*", text)
        assert len(products) > 50
        assert all(product.count("HIGHEST") == 2 for product in products)


@pytest.mark.long
def test_steps_read_all_images_before_one_comes_again(root):
    pipe = opened(settings(root))
    plan = prepare(settings(root, batch_size=2), pipe).plan
    (collection,) = plan.data.collections
    chosen = [each for step in range(6) for each in collection.of_step(step)]
    names = [picture.path.name for picture, _ in chosen]
    for epoch in range(4):
        assert sorted(names[3 * epoch : 3 * epoch + 3]) == ["dog0.png", "dog1.png", "dog2.png"]
    corners = {corner for _, corner in chosen}
    assert {row for row, _ in corners} == {0}
    assert {column for _, column in corners} == {0, 1, 2}  # of 10 × 8 pixels
    moments = plan.data.batch(0).moments
    assert moments.shape == (2, 4, 4, 8)
    picture, (row, column) = chosen[0]
    square = picture.pixels[row : row + 8, column : column + 8]
    means, log_variances = pipe.autoencoder.moments(square[None].astype("f") / 127.5 - 1)
    both = np.concatenate([means, log_variances], axis=-1)[0]
    np.testing.assert_allclose(moments[0], both, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_starts_are_made_from_the_first_steps(root):
    """Those of both models are what `initialize` makes of the losses of 32 images."""
    config = settings(root, method="lora-one", train_text_encoder=True, batch_size=16, rank=2)
    model, pipe = prepare(config, opened(config)).model, opened(config)
    plan = prepare(settings(root, batch_size=16, rank=2), opened(config)).plan
    tokens = jnp.asarray(text_tokens(pipe.tokenizer, [PROMPT], 77))
    for name, pattern in (("unet", TARGETS), ("text_encoder", TEXT_TARGETS)):
        graph, values = nnx.split((pipe.unet, pipe.text_encoder))

        def loss(part, each, name=name, graph=graph):
            moments, step, values = each
            unet, text_encoder = nnx.merge(graph, values)
            unet, text_encoder = (part, text_encoder) if name == "unet" else (unet, part)
            context = jnp.repeat(text_encoder(tokens), 16, axis=0)
            batch = Batch(moments, context, plan.data.batch(0).key)
            return plan.objective.loss(Denoiser(unet), batch, step)

        drawn = [(plan.data.batch(i).moments, jnp.asarray(i), values) for i in range(2)]
        part, key = getattr(pipe, name), jax.random.key(0)
        nys.lora.apply(part, 2, targets=pattern, key=key)
        nys.lora.initialize(part, "lora_one", key=key, loss=loss, batches=drawn)
        factors = (
            dict(nnx.to_flat_state(nnx.state(m, nnx.LoRAParam)))
            for m in (
                part,
                getattr(model, name),
            )
        )
        expected, actual = factors
        assert len(expected) == 16
        for path, value in expected.items():
            np.testing.assert_allclose(
                np.abs(actual[path][...]), np.abs(value[...]), rtol=1e-2, atol=1e-3
            )


@pytest.mark.long
def test_images_of_the_class_have_its_text(root):
    config = settings(root, class_prompt="a photo of a dog", batch_size=2)
    pipe = opened(config)
    prepared = prepare(config, pipe)
    pictures = prepared.plan.data.collections[0].pictures[:1]
    plan = prepared.with_class(pictures)
    batch, texts = plan.data.batch(0), pipe.encode_texts([PROMPT, "a photo of a dog"])
    context = prepared.model.context(batch.texts, len(batch.moments))
    np.testing.assert_array_equal(context, np.repeat(texts, 2, axis=0))
    assert plan.data.sources(0)[2:] == ["dog0.png", "dog0.png"]
    assert (plan.objective.prior_rows, plan.objective.prior_weight) == (2, 1.0)


def test_images_are_upright_and_in_rgb(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    picture = read(tmp_path / "turned.png", 10)
    assert picture.pixels.shape == (20, 10, 3)
    assert picture.room == (10, 0)
    assert picture.pixels[2, 5].tolist() == [255, 0, 0]
    assert picture.square(picture.center).shape == (10, 10, 3)
    image.convert("RGBA").resize((4, 2)).save(tmp_path / "small.png")
    assert read(tmp_path / "small.png", 10).pixels.shape == (10, 20, 3)
    image.convert("L").save(tmp_path / "gray.jpg")
    assert read(tmp_path / "gray.jpg", 10).pixels.shape == (10, 20, 3)


@pytest.mark.long
def test_images_that_cannot_be_read_are_refused(root, tmp_path, monkeypatch):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            list(nys.finetune.dreambooth.preview(settings(root, **options)))

    refused("images is '.*absent', which does not exist", images=tmp_path / "absent")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / ".hidden").touch()
    refused("images is '.*', an empty folder; expected images", images=folder)
    (folder / "notes.txt").write_text("no image")
    refused("notes.txt cannot be read: .* expected an image", images=folder)
    (folder / "notes.txt").unlink()
    whole = write_images(tmp_path / "whole", 1, (64, 64)) / "dog0.png"
    (folder / "cut.png").write_bytes(whole.read_bytes()[:2000])
    refused("cut.png cannot be read: .*truncated", images=folder)
    (folder / "cut.png").unlink()
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "deep.png")
    refused("deep.png has the mode I;16 of Pillow; expected 8 bits", images=folder)
    Image.fromarray(np.zeros((1, 99, 3), np.uint8)).save(folder / "deep.png")
    refused("deep.png has 99 × 1 pixels; expected sides in a ratio up to 16", images=folder)
    shutil.copyfile(whole, folder / "deep.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused("deep.png cannot be read: .*decompression bomb", images=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_text_encoder": "no"}, "train_text_encoder is 'no'; expected True or False"),
        ({"out": ""}, "out is ''; expected a name .'.' is the current folder"),
        ({"class_images": ""}, "class_images is ''; expected a name .'.' is the current folder"),
        ({"model": None}, "model is None; expected a text"),
        ({"images": 3}, "images is 3; expected a path"),
        ({"class_images": 3}, "class_images is 3; expected a path or None"),
    ],
)
def test_settings_of_other_types_are_refused(root, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match=message):
        settings(root, **options)


def test_settings_of_the_other_kind_of_runs_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    of_text = nys.finetune.Config(model="m", data="d", task="rte", out=tmp_path / "out")
    for function in (nys.finetune.dreambooth.run, nys.finetune.dreambooth.preview):
        with pytest.raises(ValueError, match=r"expected a nys.finetune.dreambooth.Config .nys.f"):
            list(function(of_text))
    with pytest.raises(ValueError, match=r"expected a nys.finetune.Config .nys.finetune.dream"):
        nys.finetune.run(settings(root, out=tmp_path / "out"))


@pytest.mark.parametrize("kind", ["the same", "relative", "symlink", "copy"])
def test_images_of_the_class_are_not_those_of_the_subject(root, kind, tmp_path, monkeypatch):
    folder = settings(root).images
    monkeypatch.chdir(folder)
    other = tmp_path / "class"
    if kind == "symlink":
        other.symlink_to(folder)
    elif kind == "copy":
        other.mkdir()
        shutil.copyfile(folder / "dog2.png", other / "cat.png")
    folders = {"the same": folder, "relative": Path(), "symlink": other, "copy": other}
    config = settings(root, class_prompt="a photo of a dog", class_images=folders[kind])
    message = "class_images has '.*', which is '.*images/dog[02].png' in images; expected images of"
    with pytest.raises(ValueError, match=message):
        list(nys.finetune.dreambooth.preview(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "full"}, "method is 'full'; expected one of lora, .*, which train adapters"),
        ({"method": "prefix"}, "method is 'prefix'; expected one of .*, which train adapters"),
        ({"method": "none"}, "method is 'none'; expected one of"),
        ({"method": "lora", "damping": 0.1}, "hyperparameter is 'damping'; expected none"),
        ({"class_count": 5}, "class_count is '5' and class_prompt is None; expected the text of"),
        ({"prior_weight": 2.0}, "prior_weight is '2.0' and class_prompt is None"),
        ({"prompt": " "}, "prompt is ' '; expected a text"),
        ({"class_prompt": ""}, "class_prompt is ''; expected a text"),
        ({"sample_prompt": "a dog"}, "sample_prompt is 'a dog' and sample_every is None; expected"),
        ({"resolution": 7}, "resolution is 7; expected a multiple of 2"),
        (
            {"resolution": 12, "model": str(FOLDER / "sd1")},
            "resolution is 12; expected a multiple of 8",
        ),
        ({"crop": "left"}, "crop is 'left'; expected one of random, center"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of float32, bfloat16"),
        ({"task": "rte"}, "task is 'rte'; expected one of dreambooth"),
        ({"log": "x"}, "log is 'x'; expected one of tensorboard, wandb"),
        ({"mesh": "fsdp=2"}, "mesh is 'fsdp=2' and batch_size is 1; expected a multiple of 2"),
        ({"steps": 0}, "steps is 0; expected an integer ≥ 1"),
        ({"rank": 7}, "rank is 7; expected 1 ≤ rank ≤ 6"),
        ({"targets": r"conv_in"}, "matches only conv_in, a Conv"),
        ({"sweep": "rank=2,4"}, "sweep is 'rank=2,4'; expected None .nys.finetune.sweep has it"),
        ({"train_text_encoder": True, "rank": 6, "targets": "conv_in"}, "matches only conv_in, a"),
        ({"dry_run": True}, "dry_run is True; expected False .nys.finetune.dreambooth.preview"),
        ({"model": str(FOLDER / "absent")}, "absent is not a folder; expected one with model_inde"),
        ({"model": str(FOLDER / "bk")}, "model_index.json"),
    ],
)
def test_what_is_refused_leaves_the_folder_to_a_mended_command(root, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        nys.finetune.dreambooth.run(settings(root, out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("dropout=0.1", "expected one setting or two, .* of learning_rate, method, rank, alpha"),
        ("train_text_encoder=True", "expected one setting or two"),
        ("rank=1.5", "sweep has rank='1.5'; expected int values"),
        ("rank=0,4", "rank is 0; expected an integer ≥ 1"),
        ("method=nora,prefix", "method is 'prefix'; expected one of lora"),
        ("scale=0.1,auto,x", "sweep has scale='x'; expected float values"),
        ("rank=2,7", r"rank 7: .*rank is 7; expected 1 ≤ rank ≤ 6"),
        ("warmup_steps=2,99", "warmup_steps 99: warmup_steps is 99 and the run has 6 steps"),
    ],
)
def test_sweeps_that_are_refused(root, sweep, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        nys.finetune.sweep(settings(root, out=tmp_path / "out", sweep=sweep))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["2", "yes", "nan"])
def test_a_flag_has_no_value(root, value, capsys):
    assert main([*words(settings(root)), "--train-text-encoder", value, "--dry-run"]) != 0
    assert value in capsys.readouterr().err


def test_the_folder_of_a_run_is_not_in_that_of_its_images(root):
    out = root / "images" / "out"
    with pytest.raises(ValueError, match=r"out is '.*out', which is in images, '.*images'; expec"):
        nys.finetune.dreambooth.run(settings(root, out=out))


@pytest.mark.long
def test_a_dry_run_says_what_will_be_done(root, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(root / "model", model)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9000] + 9000 * b"\xff")  # not numbers
    config = settings(root, model=str(model), out=tmp_path / "out")
    assert main([*words(config), "--dry-run", "--train-text-encoder"]) == 0
    said = capsys.readouterr().out
    # In the text encoder: two times four layers of 6 × 6 numbers.
    numbers = 4 * (6 * 16 + 2 * 14) + 4 * 8 * 12
    assert f"of the U-Net and 8 of the text encoder; {numbers:,} of" in said
    assert main([*words(config), "--dry-run", "--class-prompt", "a dog", "--method", "eva"]) == 0
    said = capsys.readouterr().out
    assert "3 images: dog0.png (12 × 9), dog1.png (12 × 9), dog2.png (12 × 9)\n" in said
    assert "squares of 8 × 8 pixels, random ones" in said
    assert "100 images of the class, 100 of which the base will generate" in said
    assert "'a photo of sks dog' has" in said
    assert "tokens of 77: <|startoftext|> a</w> " in said
    # Of rank 4: six layers of 8 × 8 numbers, and two of 6 × 8.
    assert f"8 adapted layers of the U-Net; {4 * (6 * 16 + 2 * 14)} of" in said
    assert "memory of encoding an image" in said
    assert "memory of a step, compiled before any weight is read: 0." in said
    assert not config.out.exists()
    with pytest.warns(UserWarning, match="a text has .* the model reads 77"):
        list(nys.finetune.dreambooth.preview(dataclasses.replace(config, prompt="dog " * 99)))


def test_help_has_the_options_of_the_task(capsys, tmp_path):
    assert main(["finetune", "--task", "dreambooth", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--class-images" in said
    assert "--data" not in said
    assert main(["finetune", "--help"]) == 0
    assert "--task dreambooth" in capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text("task: dreambooth\nmodel: m\n")
    assert main(["finetune", "--config", str(path)]) == 1
    assert "--images" in capsys.readouterr().err
    path.write_text("task: [dreambooth]\n")
    assert main(["finetune", "--config", str(path)]) == 1
    assert "has task = ['dreambooth']; expected a text" in capsys.readouterr().err
