"""Fine-tuning on images over a mesh: the losses of one device, and a run that goes on."""

import json
import shutil

import pytest
from dreambooth_cases import lines, settings, tensors

import nyscaled as nys
from nyscaled.finetune import loop


def test_a_run_over_a_mesh_is_that_of_one_device(tmp_path):
    options = {"batch_size": 2, "learning_rate": 1e-2}
    one, two = tmp_path / "one", tmp_path / "two"
    expected = nys.finetune.dreambooth.run(settings(tmp_path, out=one, **options))
    config = settings(tmp_path, out=two, mesh="fsdp=2", **options)
    result = nys.finetune.dreambooth.run(config)
    assert (result.base_loss, result.loss) == pytest.approx(
        (expected.base_loss, expected.loss), rel=1e-5
    )
    for line, other in zip(lines(one), lines(two), strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    before = tensors(two)
    (two / "result.json").unlink()
    shutil.rmtree(two / loop.CHECKPOINTS / "6")
    nys.finetune.dreambooth.run(settings(tmp_path, out=two, mesh="fsdp=2", resume=True, **options))
    assert tensors(two) == before
    assert json.loads((two / "result.json").read_text())["loss"] == result.loss
