"""Fine-tuning of Stable Diffusion on images of a subject, on a tiny pipeline."""

import dataclasses
import json
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from dreambooth_cases import PROMPT, lines, settings, tensors, words, write_images
from flax import nnx
from PIL import Image

import nyscaled as nys
from nyscaled.cli import main
from nyscaled.finetune import folders, loop, progress
from nyscaled.finetune.dreambooth.config import as_options
from nyscaled.finetune.dreambooth.images import read
from nyscaled.finetune.dreambooth.step import train_step


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with images and a run."""
    folder = tmp_path_factory.mktemp("dreambooth")
    nys.finetune.dreambooth.run(settings(folder))
    return folder


def test_the_folder_of_a_run(root):
    out = root / "out"
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 7))
    assert all(line["learning_rate"] == 1e-4 and line["gradient_norm"] > 0 for line in steps)
    assert not any("validation_loss" in line for line in lines(out))
    evaluations = [line for line in lines(out) if "loss_at_fixed_times" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    result = json.loads((out / "result.json").read_text())
    assert result["base_loss"] == evaluations[0]["loss_at_fixed_times"]
    assert result["loss"] == evaluations[-1]["loss_at_fixed_times"]
    assert result["difference"] < 1e-5
    record = json.loads((out / "run.json").read_text())
    assert record["versions"].keys() >= {"nyscaled", "jax", "pillow"}
    assert record["images"]["images"].keys() == {"dog0.png", "dog1.png", "dog2.png"}
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == "nora"
    assert (out / "curves.png").exists()
    assert not (out / "samples").exists()


def loss_of(pipe, config):
    """The loss at fixed times."""
    pictures = [read(path, 8) for path in sorted(config.images.iterdir())]
    squares = np.stack([p.square(p.center) for p in pictures]).astype("f")
    latents = pipe.autoencoder.encode(squares / 127.5 - 1)
    key = jax.random.fold_in(jax.random.key(0), 2)
    noise = jnp.stack(
        [jax.random.normal(jax.random.fold_in(key, i), latents[:1].shape)[0] for i in range(30)]
    )
    context = jnp.repeat(pipe.encode_texts([PROMPT]), 30, axis=0)
    times = jnp.tile(jnp.arange(50, 1000, 100), 3)
    return float(
        nnx.jit(nys.diffusion.denoising_loss, static_argnums=1)(
            pipe.unet, pipe.schedule, jnp.repeat(latents, 10, axis=0), context, noise, times
        )
    )


@pytest.mark.long
def test_the_adapter_is_that_of_the_last_step(root):
    """It is loaded into a fresh U-Net, and gives the loss of the result, computed here."""
    pipe = nys.diffusion.load(root / "model")
    layers = nys.lora.load_diffusers(pipe.unet, root / "out" / "adapter")
    assert len(layers) == 8
    assert {layer.adapters["default"].rank for layer in layers.values()} == {4}
    result = json.loads((root / "out" / "result.json").read_text())
    assert loss_of(pipe, settings(root)) == pytest.approx(result["loss"], rel=1e-5)


def interrupted(monkeypatch, after):
    """Press Ctrl-C when that many steps were written."""
    write = progress.Progress.steps

    def pressing(self, lines):
        write(self, lines)
        if lines[-1]["step"] == after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Progress, "steps", pressing)


@pytest.mark.long
def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_end(root, tmp_path, monkeypatch, capsys):
    config = settings(root, out=tmp_path / "out")
    programs = train_step._cache_size()
    with monkeypatch.context() as patch:
        interrupted(patch, after=4)
        patch.setattr(sys, "argv", ["nyscaled", *words(config)])
        assert main(words(config)) == 130
    assert train_step._cache_size() == programs
    message = capsys.readouterr().err
    assert "stopped after step 5 of 6, which is saved; go on with: nyscaled finetune --t" in message
    again = ["finetune", "--config", str(config.out / "config.yaml"), "--resume"]
    assert main(again) == 0
    said = capsys.readouterr()
    assert "going on after step 5; the loss of the base is" in said.err
    assert "step 6: loss at fixed times " in said.err
    assert "; the loss at fixed times went from " in said.out
    assert f"{config.out / 'adapter'}: 6 steps in" in said.out
    assert tensors(config.out) == tensors(root / "out")
    assert lines(config.out) == lines(root / "out")
    # A run that is finished is not made again.
    assert main(again) == 0
    assert main(words(config)) == 1
    assert "has a run; expected --resume" in capsys.readouterr().err


@pytest.mark.long
def test_the_text_encoder_is_trained_too(root, tmp_path, monkeypatch):
    """Its adapters are saved and read, generate samples, and go on after an interruption."""
    config = settings(
        root, out=tmp_path / "out", train_text_encoder=True, learning_rate=1e-2, sample_every=6
    )
    result = nys.finetune.dreambooth.run(config)
    pipe = nys.diffusion.load(root / "model")
    assert result.base_loss == pytest.approx(loss_of(pipe, config), rel=1e-5)
    layers = nys.lora.load_diffusers(
        pipe.unet, config.out / "adapter", text_encoder=pipe.text_encoder
    )
    assert len(layers) == 8 + 8
    b = "text_encoder.encoder.layers.1.self_attn.out_proj"
    assert np.abs(layers[b].adapters["default"].lora_b).min() > 1e-3
    assert loss_of(pipe, config) == pytest.approx(result.loss, rel=1e-5)
    assert result.difference < 1e-5
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 3), 4)
    image = nys.diffusion.generate(pipe, [PROMPT], key=keys[3], size=(8, 8))[0]
    sample = np.asarray(Image.open(config.out / "samples" / "step-000006.png"))
    np.testing.assert_allclose(sample[:, 24:] / 255, image, atol=0.51 / 255)

    again = dataclasses.replace(config, out=tmp_path / "again", sample_every=None)
    with monkeypatch.context() as patch:
        interrupted(patch, after=4)
        with pytest.raises(KeyboardInterrupt):
            nys.finetune.dreambooth.run(again)
    nys.finetune.dreambooth.run(dataclasses.replace(again, resume=True))
    assert tensors(again.out) == tensors(config.out)
    assert lines(again.out) == lines(config.out)
    (again.out / "result.json").unlink()
    with pytest.raises(ValueError, match="train_text_encoder was True and is False"):
        nys.finetune.dreambooth.run(
            dataclasses.replace(again, resume=True, train_text_encoder=False)
        )


@pytest.mark.long
def test_a_run_that_was_killed_before_its_end_goes_on(root, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / loop.CHECKPOINTS / "6")
    # How often checkpoints are written changes nothing, and losses at fixed times only the lines.
    nys.finetune.dreambooth.run(settings(root, out=out, resume=True, checkpoint_every=1))
    assert tensors(out) == tensors(root / "out")
    assert lines(out) == lines(root / "out")
    (out / "result.json").unlink()  # after the last checkpoint
    result = nys.finetune.dreambooth.run(settings(root, out=out, resume=True, eval_every=2))
    assert result.loss == json.loads((root / "out" / "result.json").read_text())["loss"]


def test_a_run_that_goes_on_elsewhere_is_refused(root, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    (out / "result.json").unlink()
    with (
        folders.held(out),
        pytest.raises(ValueError, match="out has a run that goes on in another process; expected"),
    ):
        nys.finetune.dreambooth.run(settings(root, out=out, resume=True))


@pytest.mark.long
def test_a_run_goes_on_only_as_it_began(root, tmp_path):
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(root / "out", out)
    (out / "result.json").unlink()
    config = settings(root, out=out, resume=True)
    for changed, message in (
        ({"rank": 2, "seed": 1}, "other settings: rank was 4 and is 2, seed was 0 and is 1"),
        ({"out": root / "absent"}, "has no run; expected a folder with config.yaml"),
    ):
        with pytest.raises(ValueError, match=message):
            nys.finetune.dreambooth.run(dataclasses.replace(config, **changed))
    options = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump(options | {"model": str(model)}))
    config = dataclasses.replace(config, model=str(model))
    shutil.copytree(root / "model", model)
    path = model / "unet" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"norm_eps": 1e-05', '"norm_eps": 0.5'))
    with pytest.raises(ValueError, match=r"they differ in unet.norm_eps \(0.5, not 1e-05\)"):
        nys.finetune.dreambooth.run(config)
    path.write_text(text)
    autoencoder = nys.diffusion.load(model).autoencoder
    for part in (autoencoder.quant_conv, autoencoder.encoder.conv_in):
        part.kernel[...] += 1
    nys.diffusion.save(autoencoder, model / "vae")
    with pytest.raises(ValueError, match=r"they differ in the values of vae\."):
        nys.finetune.dreambooth.run(config)
    (out / "base.json").unlink()
    with pytest.raises(ValueError, match=r"the loss of the base in .* was .* and is .*; expected"):
        nys.finetune.dreambooth.run(config)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{}", "run.json has no hashes of the files in images; expected the file as the run wrote"),
        ('{"images": []}', "run.json has no hashes of the files in images"),
        ('{"images": {"images": {}}}', "run.json has no hashes of the files in class_images"),
        ('{"images":', "run.json is not JSON"),
        (None, "run.json'; expected the record of a run, or another --out"),
    ],
)
def test_a_damaged_record_is_refused(root, record, message, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    (out / "result.json").unlink()
    (out / "run.json").unlink()
    if record is not None:
        (out / "run.json").write_text(record)
    with pytest.raises(ValueError, match=message):
        nys.finetune.dreambooth.run(settings(root, out=out, resume=True))
    (out / "result.json").write_text('{"steps":')
    with pytest.raises(ValueError, match=r"result.json is not JSON"):
        nys.finetune.dreambooth.run(settings(root, out=out, resume=True))
    (out / "result.json").write_text('{"steps": 6}')
    with pytest.raises(ValueError, match=r"result.json has no out, base_loss, loss, difference"):
        nys.finetune.dreambooth.run(settings(root, out=out, resume=True))


@pytest.mark.long
def test_changed_images_are_refused(root, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(root / "images", images)
    config = settings(root, images=images, out=out, steps=3)
    nys.finetune.dreambooth.run(config)
    (out / "result.json").unlink()
    shutil.copyfile(images / "dog0.png", images / "dog2.png")
    (images / "dog1.png").unlink()
    message = r"files in images are not .* with: dog1.png is missing, dog2.png is changed; expected"
    with pytest.raises(ValueError, match=message):
        nys.finetune.dreambooth.run(dataclasses.replace(config, resume=True))


@pytest.mark.long
def test_images_of_the_class_that_are_missing_are_generated(root, tmp_path, monkeypatch):
    own = write_images(tmp_path / "class", count=1, size=(8, 8))
    prior = {"class_prompt": "a photo of a dog", "class_images": own, "class_count": 3}
    config = settings(root, out=tmp_path / "out", steps=3, sample_every=2, **prior)
    nys.finetune.dreambooth.run(config)
    folder = config.out / "class_images"
    assert sorted(path.name for path in folder.iterdir()) == ["0000.png", "0001.png"]
    one, other = (Image.open(folder / f"000{i}.png") for i in range(2))
    assert one.size == (8, 8)
    assert one.tobytes() != other.tobytes()
    samples = config.out / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["step-000002.png", "step-000003.png"]
    assert Image.open(samples / "step-000002.png").size == (4 * 8, 8)
    losses = [line["loss"] for line in lines(config.out) if "loss" in line]
    without = [line["loss"] for line in lines(root / "out") if "loss" in line]
    assert sum(losses) > 1.5 * sum(without[:3])  # the loss of the class is added

    # They are those of the base.
    pipe = nys.diffusion.load(root / "model")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 4), 1)
    image = nys.diffusion.generate(pipe, ["a photo of a dog"], key=key, size=(8, 8))[0]
    np.testing.assert_allclose(np.asarray(other) / 255, image, atol=0.51 / 255)

    # A run that goes on makes those that it had not yet made, and refuses others than it made.
    (config.out / "result.json").unlink()
    path = config.out / "run.json"
    record, kept = json.loads(path.read_text()), (folder / "0001.png").read_bytes()
    del record["images"]["generated"]["0001.png"]
    path.write_text(json.dumps(record))
    (folder / "0001.png").write_bytes(b"half a file")
    again = dataclasses.replace(config, resume=True)
    before = tensors(config.out)
    nys.finetune.dreambooth.run(again)
    assert (folder / "0001.png").read_bytes() == kept
    assert tensors(config.out) == before
    (config.out / "result.json").unlink()
    shutil.copyfile(folder / "0000.png", folder / "0001.png")
    (folder / "0000.png").unlink()
    message = r"generated images in .*: 0000.png is missing, 0001.png is changed; expected them as"
    with pytest.raises(ValueError, match=message):
        nys.finetune.dreambooth.run(again)


@pytest.mark.long
def test_the_loss_on_fixed_times_falls(root, tmp_path):
    options = {"learning_rate": 3e-2, "steps": 60, "eval_every": 30}
    result = nys.finetune.dreambooth.run(settings(root, out=tmp_path / "out", **options))
    assert result.loss < 0.95 * result.base_loss


@pytest.mark.long
@pytest.mark.parametrize(
    "method",
    [n for n, m in nys.finetune.METHODS.items() if m.trains == "adapters"],
)
def test_methods(root, method, tmp_path):
    result = nys.finetune.dreambooth.run(
        settings(root, out=tmp_path / "out", method=method, steps=3, batch_size=2, crop="center")
    )
    assert result.difference < 1e-4
    base = json.loads((root / "out" / "result.json").read_text())["base_loss"]
    # No start changes it, and ten times are a multiple of the batch.
    assert result.base_loss == pytest.approx(base, rel=1e-1)


@pytest.mark.long
def test_a_narrow_base(root, tmp_path):
    options = {"dtype": "bfloat16", "remat": True, "min_snr": 5.0, "steps": 2}
    result = nys.finetune.dreambooth.run(settings(root, out=tmp_path / "out", **options))
    base = json.loads((root / "out" / "result.json").read_text())["base_loss"]
    assert result.base_loss == pytest.approx(base, rel=0.05)
    values = safetensors.numpy.load_file(
        tmp_path / "out" / "adapter" / "pytorch_lora_weights.safetensors"
    )
    assert {value.dtype.name for value in values.values()} == {"float32"}


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path):
    config = settings(root, out=tmp_path / "out", learning_rate=1e38, clip=None)
    with pytest.raises(ValueError, match=r"is (nan|not finite) at step \d, of the examples dog\d"):
        nys.finetune.dreambooth.run(config)
    saved = [int(path.name) for path in (config.out / loop.CHECKPOINTS).iterdir()]
    assert saved == [lines(config.out)[-1]["step"]]


@pytest.mark.long
def test_a_sweep(root, tmp_path, capsys):
    """Its runs are compared by the loss at fixed times, and one may diverge."""
    short = {"steps": 3, "clip": None}
    config = settings(root, out=tmp_path / "out", sweep="learning_rate=1e38,1e-2,1e-3", **short)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(as_options(config)))
    assert main(["finetune", "--config", str(path)]) == 0
    said = capsys.readouterr().out
    table = json.loads((config.out / "sweep.json").read_text())
    assert (table["best"], table["compared"]) == ("learning_rate=0.01", "loss at fixed times")
    losses = [run["loss"] for run in table["runs"]]
    assert losses[0] is None
    assert f"learning_rate 0.01: loss at fixed times {losses[1]:.4f} (best)" in said
    run = settings(root, out=tmp_path / "alone", learning_rate=1e-2, **short)
    assert nys.finetune.dreambooth.run(run).loss == losses[1] < losses[2]
    assert (config.out / "sweep.png").exists()
    # Finished runs are kept, if they saw the same images.
    more = dataclasses.replace(config, sweep="learning_rate=1e-2,1e-3", resume=True)
    assert [run.loss for run in nys.finetune.sweep(more).runs] == losses[1:]
    record = config.out / "learning_rate=0.001" / "run.json"
    record.write_text(record.read_text().replace("dog1.png", "cat.png"))
    with pytest.raises(ValueError, match=r"files in images .*: cat.png is new, dog1.png is missin"):
        nys.finetune.sweep(more)
    assert main(["finetune", "--config", str(path), "--dry-run"]) == 0
    assert "the sweep has 3 runs, of which this is the first" in capsys.readouterr().out


def test_a_base_that_is_not_finite_is_refused(root, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(root / "model", model)
    unet = nys.diffusion.load_unet(model)
    unet.conv_out.bias[...] = jnp.nan
    nys.diffusion.save(unet, model / "unet")
    with pytest.raises(ValueError, match=r"the loss of .*model is nan before any step; expected a"):
        nys.finetune.dreambooth.run(settings(root, model=str(model), out=tmp_path / "out"))
