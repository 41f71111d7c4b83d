"""A run from settings to a folder: what it writes, how it stops, and how it goes on."""

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
import types
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
import yaml
from training_cases import settings, write_data

import nyscaled as nys
from nyscaled.cli import main
from nyscaled.finetune import launch, loop, objectives, progress, saving, training

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with models, data and a run."""
    folder = tmp_path_factory.mktemp("finetune")
    nys.finetune.run(settings(folder))
    return folder


def lines(out):
    """The metrics without times."""
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in progress.read_metrics(out / progress.METRICS)
    ]


def tensors(out):
    """The bytes of what was trained."""
    values = safetensors.numpy.load_file(out / "adapter" / "adapter_model.safetensors")
    return {name: value.tobytes() for name, value in values.items()}


def test_the_folder_of_a_run(root):
    out = root / "out"
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    validations = [line for line in lines(out) if "validation_loss" in line]
    assert [line["step"] for line in validations] == [6, 12]
    result = json.loads((out / "result.json").read_text())
    assert result["validation_loss"] == min(line["validation_loss"] for line in validations)
    record = json.loads((out / "run.json").read_text())
    assert record["versions"]["nyscaled"] == nys.__version__
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == "nora+"


def test_the_adapter_is_that_of_the_lowest_validation_loss(root):
    """It is loaded into a fresh base, and gives the loss of the result."""
    out = root / "out"
    result = json.loads((out / "result.json").read_text())
    prepared = launch.prepare(settings(root))
    model, _ = nys.models.load(root / "llama")
    nys.lora.load_peft(model, out / "adapter")
    total = count = 0
    for _, batch in prepared.plan.validation.sorted(8):
        parts = objectives.choice_loss(model, batch)
        total, count = total + float(parts[0]), count + float(parts[1])
    assert total / count == pytest.approx(result["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"base": "bert_encoder", "method": "lora"},
        pytest.param({"method": "pissa", "dropout": 0.1}, marks=pytest.mark.long),
        pytest.param({"method": "full"}, marks=pytest.mark.long),
        pytest.param({"method": "lora-one"}, marks=pytest.mark.long),
        pytest.param({"base": "bert_encoder", "method": "linear-probe"}, marks=pytest.mark.long),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)  # fmt: skip
def test_other_models_and_methods(root, options, tmp_path):
    result = nys.finetune.run(settings(root, steps=4, out=tmp_path / "out", **options))
    assert result.difference < 1e-4
    assert result.steps == 4


@pytest.mark.parametrize(
    "method", ["nora-grad", *(pytest.param(x, marks=pytest.mark.long) for x in ("lora-one", "eva"))]
)  # fmt: skip
def test_starts_are_made_of_micro_batches(root, method, monkeypatch):
    """Although the last batch of an epoch has fewer examples."""
    sizes, loss = set(), objectives.choice_loss

    def counted(model, batch):
        sizes.add(len(batch.tokens))
        return loss(model, batch)

    monkeypatch.setitem(objectives.OBJECTIVES, "choice", counted)
    starts = []
    for size in (None, 2):
        config = settings(root, method=method, micro_batch_size=size, train_examples=21)
        starts.append(jax.tree.leaves(launch.prepare(config).plan.parts.params))
    assert sizes == {8, 2}
    for whole, parts in zip(*starts, strict=True):
        np.testing.assert_allclose(parts, whole, atol=1e-3 * float(abs(whole).max()))


def test_reflora_balances_in_a_short_run(root):
    """A share of the steps passes as in LoRA: one of twelve, ten of two thousand."""
    values = []
    for method in ("lora", "reflora"):
        plan = launch.prepare(settings(root, method=method)).plan
        state, of_method = plan.initial(), []
        for step in range(2):
            inputs = plan.parts.counts, plan.parts.frozen, plan.batch(step), plan.rate(step)
            state, _ = training.train_step(state, *inputs, program=plan.program)
            of_method.append([np.asarray(x) for x in jax.tree.leaves(state.params)])
        values.append(of_method)
    same = [all(map(np.allclose, lora, reflora)) for lora, reflora in zip(*values, strict=True)]
    assert same == [True, False]
    plan = launch.prepare(settings(root, method="reflora", steps=2000)).plan
    assert plan.initial().optimizer.hyperparams["warmup_steps"] == 10


def test_a_head_that_is_not_in_the_adapter_is_noticed(root, tmp_path, monkeypatch):
    def without_head(model, folder, **options):
        save(model, folder, **(options | {"modules_to_save": (), "task_type": None}))

    save = nys.lora.save_peft
    monkeypatch.setattr(saving.lora, "save_peft", without_head)
    options = {"base": "bert_encoder", "method": "lora", "steps": 4, "learning_rate": 0.5}
    with pytest.raises(ValueError, match="differ by"):
        nys.finetune.run(settings(root, out=tmp_path / "out", dtype="bfloat16", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_length": 30},
            r"examples cannot be scored: 1 of 1 examples \(100.0%\) have more than 30 tokens",
        ),
        ({"loss_on": "all"}, "loss_on is 'all'; expected 'answer' for the task sst2"),
        ({"method": "lora", "damping": 0.1}, "hyperparameter is 'damping'; expected none"),
        ({"method": "lora", "scale": 0.1}, "option is 'scale'; expected"),
        ({"dry_run": True}, "dry_run is True; expected False .nyscaled.finetune.preview.preview"),
    ],
)
def test_what_is_refused_leaves_the_folder_to_a_mended_command(root, options, message, tmp_path):
    data = write_data(tmp_path / "data")
    (data / "test.tsv").write_text("film " * 600 + "\t1\n")
    config = settings(root, out=tmp_path / "out", **options)
    with pytest.raises(ValueError, match=message):
        nys.finetune.run(dataclasses.replace(config, data=data))
    assert not config.out.exists()


def test_splits_of_a_data_set_of_the_hub_are_used(root, monkeypatch, capsys):
    def rows(count, label=1):
        return [{"sentence": "fine film", "label": label} for _ in range(count)]

    splits = {"train": rows(20), "validation": rows(3), "test": rows(4)}
    load = types.SimpleNamespace(load_dataset=lambda name, configuration: splits)
    monkeypatch.setitem(sys.modules, "datasets", load)
    config = dataclasses.replace(settings(root), data=Path("hf:owner/name"))
    examples = launch.prepare(config).examples
    assert list(map(len, (examples.train, examples.validation, examples.test))) == [20, 3, 4]
    assert examples.validation[0].source.startswith("owner/name[validation]")
    splits["test"] = rows(4, label=-1)  # as where the labels are hidden
    del splits["validation"]
    examples = launch.prepare(config).examples
    assert list(map(len, (examples.train, examples.validation, examples.test))) == [18, 2, 0]
    assert "the test split is left out: all its labels are -1" in capsys.readouterr().err


def test_settings_may_be_texts_and_paths(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    given = {"model": Path("m"), "data": "d", "out": "o", "task": "rte"}
    config = nys.finetune.Config(**given)
    assert (config.model, config.data, config.out) == ("m", Path("d"), Path("o"))
    with pytest.raises(ValueError, match="seed is -1"):
        nys.finetune.Config(**given, seed=-1)


def interrupted(monkeypatch, after):
    """Press Ctrl-C when that many steps were written."""
    write = progress.Progress.steps

    def pressing(self, lines):
        write(self, lines)
        if lines[-1]["step"] == after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Progress, "steps", pressing)


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
    assert "going on after step 7" in capsys.readouterr().err
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


@pytest.fixture
def unfinished(root, tmp_path, monkeypatch):
    """Settings of a run with a model and data of its own, which Ctrl-C stopped."""
    model, data, out = tmp_path / "llama", tmp_path / "data", tmp_path / "out"
    shutil.copytree(root / "llama", model)
    shutil.copytree(root / "data", data)
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


@pytest.mark.parametrize(
    ("split", "old", "new", "message"),
    [
        ("train", "\t0", "\t1", "train has other texts or labels in some of its 40 examples"),
        ("dev", "\t0\n", "\t0\nfilm\t0\n", "validation has 13 examples, not 12"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(unfinished, split, old, new, message):
    path = unfinished.data / f"{split}.tsv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        nys.finetune.run(unfinished)


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
    losses = iter([1.0, 0.5, 0.7, 0.6, 0.1])
    validate = loop.Plan.validate
    monkeypatch.setattr(
        loop.Plan,
        "validate",
        lambda self, params: validate(self, params)._replace(loss=next(losses)),
    )
    config = settings(root, out=tmp_path / "out", eval_every=2, patience=2)
    result = nys.finetune.run(config)
    assert (result.steps, result.best_step) == (8, 4)


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


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_that_is_killed_goes_on_to_the_same_end(root, tmp_path, kills):
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
