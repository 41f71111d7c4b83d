"""How a run stops, and how it goes on: Ctrl-C, SIGKILL, a full disk, losses that are not finite."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from training_cases import lines, settings, tensors

import nyscaled as nys
from nyscaled.cli import main
from nyscaled.finetune import folders, launch, loop, progress

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with models, data and a run."""
    folder = tmp_path_factory.mktemp("finetune")
    nys.finetune.run(settings(folder))
    return folder


def interrupted(monkeypatch, after):
    """Press Ctrl-C when that many steps were written."""
    write = progress.Progress.steps

    def pressing(self, lines):
        write(self, lines)
        if lines[-1]["step"] == after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Progress, "steps", pressing)


@pytest.mark.long
def test_ctrl_c_saves_and_says_how_to_go_on(root, tmp_path, monkeypatch, capsys):
    config = settings(root, out=tmp_path / "out")
    path = tmp_path / "run.yaml"
    options = launch.as_options(config)
    path.write_text(yaml.safe_dump({k: v for k, v in options.items() if k != "resume"}))
    words = ["finetune", "--config", str(path)]
    with monkeypatch.context() as patch:
        interrupted(patch, after=6)
        patch.setattr(sys, "argv", ["nyscaled", *words])
        assert main(words) == 130
    message = capsys.readouterr().err
    assert "stopped after step 7 of 12, which is saved; go on with: nyscaled finetune" in message
    assert main([*words, "--resume"]) == 0
    assert "going on after step 7; the validation loss of step 6 is 1." in capsys.readouterr().err
    assert tensors(config.out) == tensors(root / "out")
    assert lines(config.out) == lines(root / "out")
    # A run that is finished is not made again.
    assert main([*words, "--resume"]) == 0
    assert main(words) == 1
    assert "has a run; expected --resume" in capsys.readouterr().err


def test_a_run_of_other_settings_does_not_go_on(root):
    with pytest.raises(ValueError, match="rank was 2 and is 4, seed was 0 and is 1"):
        nys.finetune.run(settings(root, rank=4, seed=1, resume=True))
    with pytest.raises(ValueError, match="has no run"):
        nys.finetune.run(settings(root, out=root / "absent", resume=True))
    assert nys.finetune.run(settings(root, checkpoint_every=5, resume=True)).steps == 12


def test_settings_of_an_earlier_version_had_their_defaults(root, tmp_path):
    """Its file does not have those that are new."""
    shutil.copytree(root / "out", tmp_path / "out")
    path = tmp_path / "out" / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    del saved["remat"], saved["method_options"]
    path.write_text(yaml.safe_dump(saved))
    config = settings(root, out=tmp_path / "out", resume=True)
    assert nys.finetune.run(config).steps == 12
    with pytest.raises(ValueError, match="other settings: remat was False and is True"):
        nys.finetune.run(dataclasses.replace(config, remat=True))


def test_a_run_whose_adapter_is_gone_writes_it_again(root, tmp_path):
    shutil.copytree(root / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adapter")
    nys.finetune.run(settings(root, out=tmp_path / "out", resume=True))
    assert tensors(tmp_path / "out") == tensors(root / "out")


def test_a_run_that_goes_on_elsewhere_is_refused(root, tmp_path):
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()
    config = settings(root, out=tmp_path / "out", resume=True)
    with (
        folders.held(config.out),
        pytest.raises(ValueError, match="out has a run that goes on in another process; expected"),
    ):
        nys.finetune.run(config)
    (config.out / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is not JSON"):
        nys.finetune.run(config)
    shutil.copyfile(root / "out" / "run.json", config.out / "run.json")
    assert nys.finetune.run(config).steps == 12


def test_a_folder_that_another_run_took_meanwhile_is_refused(root, tmp_path, monkeypatch):
    """Its checkpoints are of other settings."""
    prepare = launch.prepare

    def slow(config):
        shutil.copytree(root / "out", config.out)
        return prepare(config)

    monkeypatch.setattr(launch, "prepare", slow)
    with pytest.raises(ValueError, match="out has a run; expected --resume, or another --out"):
        nys.finetune.run(settings(root, out=tmp_path / "out", learning_rate=1e-3))


def test_a_file_may_have_another_name(root, tmp_path):
    (tmp_path / "data").symlink_to(root / "data")
    config = settings(root, resume=True)
    config = dataclasses.replace(config, model=f"{config.model}/", data=tmp_path / "data")
    assert nys.finetune.run(config).steps == 12
    (tmp_path / "data").unlink()
    shutil.copytree(root / "data", tmp_path / "data")
    with pytest.raises(ValueError, match=r"data was .* and is"):  # its rows are not compared yet
        nys.finetune.run(config)


@pytest.mark.parametrize("name", ["facts/metadata", "arrays/manifest.ocdbt"])
def test_a_checkpoint_that_cannot_be_read_is_named(root, tmp_path, name):
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / "checkpoints" / "12" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints/12 cannot be read: .*; expected a whole"):
        nys.finetune.run(settings(root, out=tmp_path / "out", resume=True))


def test_a_result_that_is_not_whole_is_refused(root, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(root / "out", out)
    result = json.loads((out / "result.json").read_text())
    config = settings(root, out=out, resume=True)
    (out / "result.json").write_text(json.dumps(result | {"of a later version": 1}))
    assert nys.finetune.run(config).validation_loss == result["validation_loss"]
    del result["steps"], result["scores"]
    (out / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"out/result.json has no steps, scores; expected the res"):
        nys.finetune.run(config)


def test_a_run_does_not_begin_with_parts_of_another(root, tmp_path):
    """It would go on from their checkpoints, by other settings."""
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"has metrics.jsonl, checkpoints, best, adapter, result"):
        nys.finetune.run(settings(root, seed=1, out=tmp_path / "out"))


@pytest.mark.parametrize("name", ["file", "file/out"])
def test_a_file_is_no_folder_of_a_run(root, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"{name}', and '.*/file' is a file; expected a folder"):
        nys.finetune.run(settings(root, out=tmp_path / name))


@pytest.mark.parametrize("text", ["other: 1\n", "- 1\n", ": : :\n - a\n"])
def test_a_file_of_another_program_is_no_run(root, tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml has no settings of a run; expected those"):
        nys.finetune.run(settings(root, out=tmp_path, resume=True))


@pytest.fixture
def unfinished(root, tmp_path, monkeypatch):
    """Settings of a run with a model and data of its own, which Ctrl-C stopped."""
    model, data, out = tmp_path / "llama", tmp_path / "data", tmp_path / "out"
    shutil.copytree(root / "llama", model)
    shutil.copytree(root / "data", data)
    shutil.copyfile(data / "dev.tsv", data / "test.tsv")
    config = dataclasses.replace(settings(root, out=out), model=str(model), data=data)
    with monkeypatch.context() as patch:
        interrupted(patch, after=6)
        with pytest.raises(loop.Stopped):
            nys.finetune.run(config)
    return dataclasses.replace(config, resume=True)


def perturb(folder, name):
    """Change one value of a tensor in a model's folder."""
    path = folder / "model.safetensors"
    values = safetensors.numpy.load_file(path)
    values[name].flat[0] += 1
    safetensors.numpy.save_file(values, path, metadata={"format": "pt"})


def test_another_base_is_refused(root, unfinished, capsys):
    model = Path(unfinished.model)
    words = ["--task", "sst2", "--data", root / "data", "--adapter", root / "out" / "adapter"]
    command = ["evaluate", *map(str, words), "--model", str(model)]
    assert main(command) == 0  # of the same values
    perturb(model, "model.embed_tokens.weight")
    with pytest.raises(ValueError, match=r"is not the base of .*values of model.embed_tokens"):
        nys.finetune.run(unfinished)
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "they differ in the values of model.embed_tokens.weight; expected" in message
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert main(command) == 1
    assert "they differ in rope_theta (7.0, not 10000.0)" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_goes_on_without_what_identifies_its_base(unfinished):
    (unfinished.out / "base.json").unlink()
    nys.finetune.run(unfinished)
    assert (unfinished.out / "adapter" / "base.json").exists()


@pytest.mark.long
def test_a_base_that_gives_another_loss_is_refused(unfinished):
    """Although nothing else says that it is another one."""
    (unfinished.out / "base.json").unlink()
    perturb(Path(unfinished.model), "model.norm.weight")
    with pytest.raises(ValueError, match=r"step 6 in .* was .* and is .*the base or the data diff"):
        nys.finetune.run(unfinished)


@pytest.mark.parametrize(
    ("split", "old", "new", "message"),
    [
        ("train", "\t0", "\t1", "train has other texts or labels in some of its 40 examples"),
        ("dev", "\t0\n", "\t0\nfilm\t0\n", "validation has 13 examples, not 12"),
        ("test", "\t0", "\t1", "test has other texts or labels in some of its 12 examples"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(unfinished, split, old, new, message):
    path = unfinished.data / f"{split}.tsv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        nys.finetune.run(unfinished)


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path):
    config = settings(
        root, out=tmp_path / "out", learning_rate=1e38, schedule="constant", clip=None
    )
    with pytest.raises(ValueError, match=r"at step \d+, of the examples train.tsv:\d+") as error:
        nys.finetune.run(config)
    assert "a lower --learning-rate (it was 1e+38)" in str(error.value)
    restored = [int(p.name) for p in (tmp_path / "out" / loop.CHECKPOINTS).iterdir()]
    assert restored == [lines(tmp_path / "out")[-1]["step"]]


def test_a_validation_loss_that_is_not_finite_stops_the_run(root, tmp_path, monkeypatch):
    losses = iter([1.0, math.nan])
    validate = loop.Plan.validate
    monkeypatch.setattr(
        loop.Plan,
        "validate",
        lambda self, params: validate(self, params)._replace(loss=next(losses)),
    )
    config = settings(root, out=tmp_path / "out", eval_every=4)
    with pytest.raises(ValueError, match=r"validation loss is nan after step 8; .*learning-rate"):
        nys.finetune.run(config)
    assert [int(p.name) for p in (tmp_path / "out" / loop.CHECKPOINTS).iterdir()] == [4]


def test_a_run_stops_early(root, tmp_path, monkeypatch):
    losses = iter([1.0, 1.1, 0.5, 0.5, 0.6, 0.1])
    validate = loop.Plan.validate
    monkeypatch.setattr(
        loop.Plan,
        "validate",
        lambda self, params: validate(self, params)._replace(loss=next(losses)),
    )
    config = settings(root, out=tmp_path / "out", eval_every=2, patience=2)
    result = nys.finetune.run(config)
    assert (result.steps, result.best_step) == (10, 6)


RUN = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from training_cases import settings
import nyscaled as nys
limit = {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
root = Path({root!r})
nys.finetune.run(settings(root, out=Path({out!r}), resume={resume}, **{options}))
"""


def start(root, out, options, resume, limit=0):
    """A run in a process of its own."""
    code = RUN.format(
        tests=str(ROOT / "tests"), root=str(root), out=str(out), options=options, resume=resume,
        limit=limit,
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_to_the_same_end(root, tmp_path):
    kills = 20
    options = {"steps": 12 + 12 * kills, "log_every": 1, "checkpoint_every": 3, "dropout": 0.1}
    whole, out = tmp_path / "whole", tmp_path / "out"
    nys.finetune.run(settings(root, out=whole, **options))
    chance, killed = random.Random(kills), 0
    for _ in range(kills):
        before = len(lines(out))
        process = start(root, out, options, resume=(out / "config.yaml").exists())
        while len(lines(out)) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed
    nys.finetune.run(settings(root, out=out, resume=True, **options))
    assert tensors(out) == tensors(whole)
    assert lines(out) == lines(whole)


@pytest.mark.long
def test_a_full_disk_loses_nothing_that_was_written(root, tmp_path):
    options = {"log_every": 1, "checkpoint_every": 2, "steps": 150, "eval_every": 150}
    whole, out = tmp_path / "whole", tmp_path / "out"
    nys.finetune.run(settings(root, out=whole, **options))
    sizes = [path.stat().st_size for path in (whole / loop.CHECKPOINTS).rglob("*")]
    # Files may have so many bytes: checkpoints fit, and the metrics of all steps do not.
    assert max(sizes) + 1000 < (whole / progress.METRICS).stat().st_size
    process = start(root, out, options, resume=False, limit=max(sizes) + 1000)
    assert process.wait() != 0
    message = process.stderr.read().decode()
    assert "OSError" in message, message
    step = max(int(p.name) for p in (out / loop.CHECKPOINTS).iterdir() if p.name.isdigit())
    assert step > 0
    nys.finetune.run(settings(root, out=out, resume=True, **options))
    assert tensors(out) == tensors(whole)
    assert lines(out) == lines(whole)


@pytest.mark.long
def test_gradients_of_a_resumed_pissa_use_its_saved_start(root, tmp_path, monkeypatch):
    """A machine that rounds the SVD otherwise must not change what is subtracted."""
    config = settings(root, out=tmp_path / "out", method="pissa")
    with monkeypatch.context() as patch:
        interrupted(patch, after=6)
        with pytest.raises(loop.Stopped):
            nys.finetune.run(config)
    prepare = launch.prepare

    def perturbed(config):
        prepared = prepare(config)
        scale = jax.tree.map(lambda x: x * 1.01, prepared.plan.parts.frozen)
        kept = loop.nnx.filter_state(scale, loop.AdapterState)
        frozen = loop.nnx.merge_state(prepared.plan.parts.frozen, kept)
        parts = prepared.plan.parts._replace(frozen=frozen)
        return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, parts=parts))

    monkeypatch.setattr(launch, "prepare", perturbed)
    result = nys.finetune.run(dataclasses.replace(config, resume=True))
    monkeypatch.setattr(launch, "prepare", prepare)
    whole = nys.finetune.run(settings(root, out=tmp_path / "whole", method="pissa"))
    np.testing.assert_allclose(result.validation_loss, whole.validation_loss, rtol=1e-6)
    assert tensors(config.out) == tensors(tmp_path / "whole")
