"""A sweep: a run per value, what is compared, and how it goes on."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from training_cases import settings

import nyscaled as nys
from nyscaled.cli import main
from nyscaled.finetune import folders, launch, sweeping
from nyscaled.finetune.progress import NotFiniteError
from nyscaled.finetune.sweep_picture import draw
from nyscaled.finetune.sweeping import Run, Sweep, grid_of


@pytest.mark.long
def test_a_run_for_each_value(tmp_path, monkeypatch, capsys):
    made, run = [], launch.run

    def counted(config):
        made.append((config.out.name, config.resume))
        return run(config)

    monkeypatch.setattr(sweeping, "run", counted)
    common = {"steps": 2, "schedule": "constant", "clip": None, "eval_every": 2}
    config = settings(tmp_path, sweep="learning_rate=1e-3,1e38", **common)
    done = nys.finetune.sweep(config)
    fine, broken = done.runs
    assert (done.best, broken.loss) == (fine, None)
    assert "is not finite" in broken.error or "loss is" in broken.error
    table = json.loads((config.out / "sweep.json").read_text())
    assert table["best"] == "learning_rate=0.001"
    alone = settings(tmp_path, out=tmp_path / "alone", **common, learning_rate=1e-3)
    assert fine.loss == nys.finetune.run(alone).validation_loss
    assert "learning_rate 0.001: validation loss" in str(done)
    assert (config.out / "sweep.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="has a sweep; expected --resume"):
        nys.finetune.sweep(config)
    with pytest.raises(ValueError, match=r"has sweep.json and no config.yaml; expected a folder"):
        nys.finetune.run(dataclasses.replace(config, sweep=None))
    made.clear()
    more = dataclasses.replace(config, sweep="learning_rate=1e-3,3e-3", resume=True)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(launch.as_options(more)))
    assert main(["finetune", "--config", str(path)]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith(f"learning_rate 0.001: validation loss {fine.loss:.4f}")
    assert second.startswith("learning_rate 0.003: validation loss")
    assert made == [("learning_rate=0.001", True), ("learning_rate=0.003", False)]


def test_runs_are_in_folders_of_their_own_and_go_on_where_they_began(tmp_path):
    config = settings(tmp_path, sweep="learning_rate=1e-3,2e-3;rank=4", resume=True)
    begun = config.out / "learning_rate=0.002,rank=4"
    begun.mkdir(parents=True)
    (begun / folders.CONFIG).touch()
    (_, first), (swept, second) = sweeping.configs(config)
    assert (first.learning_rate, first.rank, first.resume, first.sweep) == (1e-3, 4, False, None)
    assert (second.out, second.resume) == (begun, True)
    assert swept == {"learning_rate": 2e-3, "rank": 4}


@pytest.mark.parametrize("resume", [False, True])
def test_a_sweep_is_not_made_in_the_folder_of_a_run(tmp_path, resume):
    config = settings(tmp_path, sweep="rank=1,2", resume=resume)
    config.out.mkdir()
    (config.out / folders.CONFIG).touch()
    message = "out has a run; expected another --out for a sweep, also with --resume"
    with pytest.raises(ValueError, match=message):
        nys.finetune.sweep(config)


def test_settings_that_a_method_does_not_have_stop_a_sweep_before_its_first_run(tmp_path):
    with pytest.raises(ValueError, match="typo"):
        list(sweeping.configs(settings(tmp_path, sweep="method=lora,typo")))
    with pytest.raises(ValueError, match="scale"):
        list(sweeping.configs(settings(tmp_path, sweep="method=nora,lora", scale=0.1)))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("rank=2,4000", r"rank 4000: .*rank is 4000; expected 1 ≤ rank ≤"),
        ("warmup_steps=2,99", "warmup_steps 99: warmup_steps is 99 and the run has 12 steps"),
    ],
)
def test_what_a_later_run_would_refuse_is_refused_before_the_first(tmp_path, sweep, message):
    config = settings(tmp_path, sweep=sweep)
    with pytest.raises(ValueError, match=message):
        nys.finetune.sweep(config)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(launch.as_options(config)))
    assert main(["finetune", "--config", str(path), "--dry-run"]) == 1
    assert not config.out.exists()


def test_runs_of_a_sweep_have_the_same_examples(tmp_path, monkeypatch):
    def run(config):
        config.out.mkdir(parents=True)
        digest = {"examples": 2 + len(made), "sha256": ""}
        (config.out / folders.RECORD).write_text(json.dumps({"examples": {"train": digest}}))
        made.append(config)
        raise NotFiniteError("diverged")

    made = []
    monkeypatch.setattr(sweeping, "run", run)
    with pytest.raises(ValueError, match="train has 3 examples, not 2"):
        nys.finetune.sweep(settings(tmp_path, sweep="learning_rate=1,2"))
    assert len(made) == 2
    # Each seed chooses its own.
    with pytest.raises(ValueError, match="no run of the sweep has a finite loss"):
        nys.finetune.sweep(settings(tmp_path, sweep="seed=1,2", out=tmp_path / "seeds"))


def test_a_best_value_at_an_end_of_the_grid_is_said():
    rates = {0.1: 0.7, 0.2: 0.6, 0.4: 0.5}
    runs = [Run({"learning_rate": x, "method": "lora"}, "", loss) for x, loss in rates.items()]
    assert "the best learning_rate is 0.4, an end of the grid" in str(Sweep(Path(), tuple(runs)))
    runs.append(Run({"learning_rate": 0.8, "method": "lora"}, "", 0.9))
    assert "grid" not in str(Sweep(Path(), tuple(runs)))


def test_the_picture_of_two_settings_is_a_table():
    runs = [
        Run({"learning_rate": x, "method": m}, "", None if x == 2.0 else x)
        for x in (1.0, 2.0)
        for m in ("lora", "nora", "nora+")
    ]
    axes = draw(runs).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.000"] * 3 + ["not finite"] * 3
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["lora", "nora", "nora+"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps=3,4", "sweep is 'steps=3,4'; expected one setting or two"),
        ("rank", "expected one setting or two, as in learning_rate"),
        ("rank=a", "sweep has rank='a'; expected int values"),
        ("rank=4,8,4", "expected each value of rank once"),
        ("rank=1;seed=1;alpha=1", "of 3 settings; expected one or two"),
    ],
)
def test_sweeps_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        grid_of(text)


def test_a_run_has_no_sweep(tmp_path):
    config = settings(tmp_path, sweep="rank=1,2")
    with pytest.raises(ValueError, match=r"sweep is 'rank=1,2'; expected None"):
        nys.finetune.run(config)
    with pytest.raises(ValueError, match="sweep is None; expected a setting"):
        nys.finetune.sweep(settings(tmp_path))
    with pytest.raises(ValueError, match="and processes 'auto'; expected one"):
        settings(tmp_path, sweep="rank=1,2", processes="auto")
