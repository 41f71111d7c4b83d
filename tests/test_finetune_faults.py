"""Runs that a fault of the machine broke, and that Ctrl-C meets in their last step."""

import dataclasses
import json
import signal

import pytest
from training_cases import settings

import nyscaled as nys
from nyscaled.finetune import loop


@pytest.mark.long
def test_a_run_goes_on_as_if_there_had_been_no_fault(tmp_path, monkeypatch):
    options = {"sample_every": 1, "steps": 5, "log_every": 1}
    config = settings(tmp_path, **options)
    step = loop.training.train_step

    def broken(state, counts, frozen, batch, rate, **kwargs):
        if int(state.step) == 3:  # the log-probability of no candidate is NaN
            batch = batch._replace(labels=batch.labels + 99)
        return step(state, counts, frozen, batch, rate, **kwargs)

    monkeypatch.setattr(loop.training, "train_step", broken)
    with pytest.raises(ValueError, match="the loss is nan at step 4"):
        nys.finetune.run(config)
    monkeypatch.undo()
    lost = {"step": 4, "generated": "of a step that was not saved"}
    with open(config.out / "samples.jsonl", "a") as file:
        file.write(json.dumps(lost) + "\n")
    result = nys.finetune.run(dataclasses.replace(config, resume=True))
    expected = nys.finetune.run(settings(tmp_path, out=tmp_path / "whole", **options))
    assert result.validation_loss == expected.validation_loss
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("out", "whole")]
    assert texts[0] == texts[1]


@pytest.mark.long
def test_ctrl_c_in_the_last_step_loses_no_result(tmp_path, monkeypatch):
    batch = loop.Plan.batch

    def pressing(self, step):
        if step == self.steps - 1:
            signal.raise_signal(signal.SIGINT)
        return batch(self, step)

    monkeypatch.setattr(loop.Plan, "batch", pressing)
    assert nys.finetune.run(settings(tmp_path, steps=2, log_every=1)).steps == 2
