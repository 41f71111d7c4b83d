"""A run from settings to a folder: what it writes, and what it refuses."""

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import yaml
from training_cases import lines, settings, write_data

import nyscaled as nys
from nyscaled.finetune import launch, objectives, processes, saving, trackers, training


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with models, data and a run."""
    folder = tmp_path_factory.mktemp("finetune")
    nys.finetune.run(settings(folder))
    return folder


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
    # Who may read one file may read all.
    (root / "new").touch()
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert modes == {(root / "new").stat().st_mode}


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"base": "bert_encoder", "method": "lora"},
        {"method": "pissa", "dropout": 0.1},
        {"method": "full"},
        {"method": "lora-one"},
        {"base": "bert_encoder", "method": "linear-probe"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)  # fmt: skip
def test_other_models_and_methods(root, options, tmp_path):
    result = nys.finetune.run(settings(root, steps=4, out=tmp_path / "out", **options))
    assert result.difference < 1e-4
    assert result.steps == 4


@pytest.mark.long
@pytest.mark.parametrize("method", ["nora-grad", "lora-one", "eva"])
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


@pytest.mark.parametrize(("micro", "shape"), [(None, (1, 40)), (16, (3, 16))])
def test_a_batch_is_not_larger_than_the_data(root, micro, shape, capsys):
    config = settings(root, batch_size=64, micro_batch_size=micro)
    prepared = launch.prepare(config)
    assert prepared.plan.batch(0).tokens.shape[:2] == shape
    assert prepared.config == config  # which a run that goes on is compared with
    assert "batch_size is 64 and there are 40 examples to train on" in capsys.readouterr().err


@pytest.mark.parametrize(("settled", "steps"), [({}, 500), ({"checkpoint_every": 700}, 700)])
def test_no_more_than_500_steps_are_between_checkpoints_unless_asked_for(root, settled, steps):
    config = settings(root, steps=2000, eval_every=1000, **settled)
    assert launch.prepare(config).plan.checkpoint_every == steps


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("method", ["full", "linear-probe", "nora+"])
def test_a_narrow_base_is_trained_in_float32(root, method):
    """So that no small update is lost before the model is written, which is said then."""
    config = settings(root, base="bert_encoder", method=method, dtype="bfloat16")
    plan = launch.prepare(config).plan
    state = plan.initial()
    narrow = {"full": plan.parts.dtypes, "linear-probe": plan.parts.dtypes}.get(method, ())
    assert all(dtype == "bfloat16" for dtype in narrow)
    numbers = [x for x in jax.tree.leaves(state[:2]) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype.name for x in numbers} == {"float32"}

    def same_after(factor):
        return saving.unchanged(plan.parts, jax.tree.map(lambda x: factor * x, plan.parts.params))

    zeros = [jnp.mean(x == 0) * x.size for x in jax.tree.leaves(plan.parts.params)]
    zero = float(sum(zeros)) / launch.count(plan.parts.params)
    assert same_after(1.1) == pytest.approx(zero, abs=1e-6)
    assert same_after(1.0001) > 0.9 or method == "nora+"


class Writer:
    """What TensorBoard's writer is asked for."""

    def __init__(self, folder, purge_step):
        WRITTEN.append((Path(folder).name, purge_step))

    def add_text(self, name, text):
        assert "- method: nora+" in text

    def add_scalar(self, name, value, step):
        WRITTEN.append((name, value, step))

    def close(self):
        WRITTEN.append("closed")


class WandbRun:
    """What a run of Weights & Biases is asked for."""

    def log(self, values, step):
        WRITTEN.extend((name, value, step) for name, value in values.items())

    def finish(self):
        WRITTEN.append("closed")


WRITTEN = []


@pytest.mark.long
def test_samples_and_metrics_for_other_programs(root, tmp_path, monkeypatch):
    tensorboard, wandb = types.ModuleType("tensorboardX"), types.ModuleType("wandb")
    monkeypatch.setattr(tensorboard, "SummaryWriter", Writer, raising=False)
    monkeypatch.setattr(wandb, "init", lambda **_: WandbRun(), raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = {"steps": 2, "eval_every": 2, "log_every": 1, "sample_every": 1}
    config = settings(root, out=tmp_path / "out", log="tensorboard", **options)
    WRITTEN.clear()
    nys.finetune.run(config)
    assert WRITTEN[0] == ("tensorboard", 1)
    assert WRITTEN[-1] == "closed"
    losses = [line["loss"] for line in lines(config.out) if "loss" in line]
    assert [x[1:] for x in WRITTEN if x[0] == "loss"] == [(losses[0], 1), (losses[1], 2)]
    assert any(x[0] == "validation_loss" for x in WRITTEN)
    text = (config.out / "samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2]
    assert {sample["right"] for sample in samples} <= {" great", " terrible"}
    assert all(sample["source"].startswith("dev.tsv:") for sample in samples)
    WRITTEN.clear()
    with trackers.Tracked("wandb", tmp_path, {}, 0) as tracked:
        tracked.write({"step": 3, "loss": 0.5})
    assert WRITTEN == [("loss", 0.5, 3), "closed"]
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="which needs tensorboardX: pip install tensorboardX"):
        nys.finetune.run(dataclasses.replace(config, out=tmp_path / "other"))
    encoder = settings(root, out=tmp_path / "bert", base="bert_encoder", sample_every=1)
    with pytest.raises(ValueError, match="sample_every is 1; expected None for an encoder"):
        nys.finetune.run(encoder)


@pytest.mark.long
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
        ({"warmup_steps": 13}, "warmup_steps is 13 and the run has 12 steps; expected at most"),
        ({"warmup_steps": 6, "steps": None, "epochs": 1.0}, "6 and the run has 5 steps; expected"),
        ({"method": "lora", "damping": 0.1}, "hyperparameter is 'damping'; expected none"),
        ({"method": "lora", "scale": 0.1}, "option is 'scale'; expected"),
        ({"dry_run": True}, "dry_run is True; expected False .nyscaled.finetune.preview.preview"),
    ],
)
def test_what_is_refused_leaves_the_folder_to_a_mended_command(root, options, message, tmp_path):
    data = write_data(tmp_path / "data")
    if "max_length" in options:
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


def test_processes_of_an_unknown_cluster_are_refused(root, tmp_path, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"knows no cluster here .*; expected the address of the"):
        nys.finetune.run(settings(root, out=tmp_path / "out", processes="auto"))


def test_settings_of_dreambooth_have_a_run_of_their_own(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    config = nys.finetune.dreambooth.Config(model="m", images="i", prompt="a sks", out="o")
    with pytest.raises(
        ValueError, match=r"dreambooth.config.Config; expected .*dreambooth.run tak"
    ):
        nys.finetune.run(config)


def test_settings_may_be_texts_and_paths(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    given = {"model": Path("m"), "data": "d", "out": "o", "task": "rte"}
    config = nys.finetune.Config(**given)
    assert (config.model, config.data, config.out) == ("m", Path("d"), Path("o"))
    numbers = {"learning_rate": np.float64(1e-3), "dropout": np.float32(0.5), "rank": np.int64(4)}
    own = types.MappingProxyType({"gamma": np.float32(0.5), "niter": np.int64(3), "side": "left"})
    config = nys.finetune.Config(**given, **numbers, method_options=own)
    options = yaml.safe_load(yaml.safe_dump(launch.as_options(config)))
    assert [options[name] for name in numbers] == [1e-3, 0.5, 4]
    assert options["method_options"] == {"gamma": 0.5, "niter": 3, "side": "left"}
    with pytest.raises(ValueError, match="seed is -1"):
        nys.finetune.Config(**given, seed=-1)


def test_processes_with_other_settings_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "gathered", lambda value: [value, value.replace("4", "6")])
    processes.require_same("settings", {"steps": 5})
    with pytest.raises(ValueError, match="process 1 has other settings than process 0; expected"):
        processes.require_same("settings", {"steps": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method_options": {"gamma": math.nan}}, "method_options.gamma is nan; expected a number"),
        ({"method_options": {"gamma": [1]}}, r"method_options.gamma is \[1\]; expected a number"),
        ({"method_options": {"gamma": np.bool_(True)}}, "method_options.gamma is True; expected a"),
        ({"epochs": math.inf}, r"epochs is inf; expected a number in \(0, inf\)"),
        ({"weight_decay": math.inf}, r"weight_decay is inf; expected a number in \[0, inf\)"),
        ({"out": ""}, r"out is ''; expected a name \('.' is the current folder\)"),
        *(
            ({name: "no"}, f"{name} is 'no'; expected True or False")
            for name in ("remat", "resume", "dry_run")
        ),
        ({"epochs": None}, "epochs is None; expected a number"),
        ({"learning_rate": [1e-4, 1e-3]}, r"learning_rate is \[.*\]; expected a number or None"),
        ({"alpha": True}, "alpha is True; expected a number or None"),
        ({"scale": []}, r"scale is \[\]; expected a number or a text or None"),
        ({"mesh": 3}, "mesh is 3; expected a text or None"),
        ({"data": None}, "data is None; expected a path"),
        ({"model": None}, "model is None; expected a text"),
    ],
)
def test_settings_that_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match=message):
        nys.finetune.Config(**{"model": "m", "data": "d", "task": "rte", "out": "o", **options})
