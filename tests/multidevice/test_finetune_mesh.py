"""A run over a mesh: its base is split, and it gives what it gives on one device."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from mesh_cases import results_of_two
from training_cases import settings

import nyscaled as nys
from nyscaled.finetune import launch, loop, meshes, progress


def metrics(config):
    lines = progress.read_metrics(config.out / progress.METRICS)
    return [line.get("loss", line.get("validation_loss")) for line in lines]


@pytest.mark.parametrize(
    ("base", "mesh"),
    [
        ("llama", "fsdp=4,tensor=2"),
        pytest.param("bert_encoder", "fsdp=8", marks=pytest.mark.long),
    ],
)
def test_a_run_gives_what_it_gives_on_one_device(tmp_path, base, mesh, monkeypatch):
    """Also after it was stopped: a checkpoint is read to where its arrays were."""
    one = settings(tmp_path, base=base, out=tmp_path / "one", steps=6, eval_every=3, log_every=2)
    several = dataclasses.replace(one, out=tmp_path / "several", mesh=mesh)
    nys.finetune.run(one)
    write = progress.Progress.steps

    def pressing(self, lines):
        write(self, lines)
        if lines[-1]["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, "steps", pressing)
        with pytest.raises(loop.Stopped):
            nys.finetune.run(several)
    result = nys.finetune.run(dataclasses.replace(several, resume=True))
    assert result.difference < 1e-4
    np.testing.assert_allclose(metrics(several), metrics(one), rtol=1e-3)
    with meshes.using(mesh):
        plan = launch.prepare(several).plan
        assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(plan.initial()))
    kernels = [x for x in jax.tree.leaves(plan.parts.frozen) if x.ndim > 2]
    assert kernels
    assert not any(x.is_fully_replicated for x in kernels)


@pytest.mark.long
def test_two_processes_give_what_one_gives(tmp_path):
    """Each over two devices, with micro-batches, and stopped by one of them in between."""
    options = {"steps": 6, "eval_every": 3, "log_every": 2, "micro_batch_size": 4}
    one = settings(tmp_path, out=tmp_path / "one", **options)
    loss = nys.finetune.run(one).validation_loss
    for said in results_of_two("two_finetunes.py", str(tmp_path)):
        assert said["stopped"] == "stopped after step 4 of 6, which is saved"
        assert said["loss"] == pytest.approx(loss, rel=1e-4)
        assert said["same"]
    several = dataclasses.replace(one, out=tmp_path / "two")
    np.testing.assert_allclose(metrics(several), metrics(one), rtol=1e-4)
    tensors = [
        safetensors.numpy.load_file(config.out / "adapter" / "adapter_model.safetensors")
        for config in (one, several)
    ]
    for name, expected in tensors[0].items():
        np.testing.assert_allclose(
            tensors[1][name], expected, atol=1e-3 * float(abs(expected).max()), err_msg=name
        )


def test_processes_that_are_refused(tmp_path):
    for text in ("two", "host,2,0", "host:80,2,2", "host:80,2"):
        with pytest.raises(ValueError, match=f"processes is '{text}'; expected auto, or the addr"):
            settings(tmp_path, processes=text)


def test_meshes_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mesh is 'data=8'; expected sizes of the axes fsdp and"):
        settings(tmp_path, mesh="data=8")
    with pytest.raises(ValueError, match="a micro-batch has 8 examples; expected a multiple of 3"):
        settings(tmp_path, mesh="fsdp=3")
    with pytest.raises(ValueError, match="expected at most 8 devices"):
        meshes.mesh_of("fsdp=8,tensor=2")
