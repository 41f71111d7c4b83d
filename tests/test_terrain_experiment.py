"""experiments/terrain.py in its quick form, its parts, and its record; the reader of weights."""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_cases import ROOT, read_rows
from flax import nnx
from safetensors.numpy import load_file, save_file

from experiments import terrain
from experiments.lib import comparison, paired, terrain_runs
from experiments.lib.journal import Journal
from experiments.lib.paired_study import KEYS, TUNING_SEED
from experiments.lib.subject_methods import BASE, CONTROLS
from experiments.lib.subject_runs import Job, models
from experiments.lib.terrain_unet import PARTS, TerrainUNet, denoise, load

sys.path.append(str(ROOT / "tests" / "fixtures"))
import onnx_weights

FIGURES = ROOT / "figures"
PLAN = terrain_runs.Plan(steps=3, batch_size=2, side=16, levels=2)


def message(*fields):
    """A message of protocol buffers with these numbers and values of fields."""

    def varint(value):
        low = bytes([value & 127 | (128 if value > 127 else 0)])
        return low + varint(value >> 7) if value > 127 else low

    data = b""
    for number, value in fields:
        if isinstance(value, int):
            data += varint(8 * number) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            data += varint(8 * number + 2) + varint(len(value)) + value
    return data


def tensor(name, values, *, packed=False):
    values = np.asarray(values)
    kind = {"f": 1, "i": 7}[values.dtype.kind]
    dims = [(1, size) for size in values.shape]
    if packed:
        dims = [(1, bytes(values.shape))]  # sizes below 128 are a byte each
    return 5, message(*dims, (2, kind), (8, name), (9, values.tobytes()))


def node(operation, *inputs):
    return 1, message(*((1, name) for name in inputs), (4, operation))


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_an_onnx_file_become_safetensors(tmp_path, packed):
    rng = np.random.default_rng(0)
    layer = "network.input_blocks.1.0.in_layers.2"
    kernel = rng.normal(size=(3, 2, 3, 3)).astype(np.float32)
    bias, scale, shift = (rng.normal(size=s).astype(np.float32) for s in (3, (2, 1, 1), (2, 1, 1)))
    graph = message(
        node("InstanceNormalization", "x", "ones", "zeros"),
        node("Shape", "x"),
        node("Reshape", "y", "sizes"),
        node("Mul", "y", "val_1"),
        node("Add", "y", "val_2"),
        node("Mul", "y", "gate"),
        node("Conv", "y", f"{layer}.weight", f"{layer}.bias"),
        tensor("ones", np.ones(32, np.float32)),
        tensor("sizes", np.array([0, 32, -1])),
        tensor(f"{layer}.weight", kernel, packed=packed),
        tensor(f"{layer}.bias", bias),
        tensor("val_1", scale, packed=packed),
        tensor("val_2", shift),
    )
    (tmp_path / "model.onnx").write_bytes(message((1, 10), (2, "pytorch"), (7, graph)))
    onnx_weights.convert(tmp_path / "model.onnx", tmp_path / "model.safetensors")
    values = load_file(tmp_path / "model.safetensors")
    name = layer.removeprefix("network.")
    norm = "input_blocks.1.0.in_layers.0"
    expected = {f"{name}.weight": kernel, f"{name}.bias": bias}
    expected |= {f"{norm}.weight": scale.ravel(), f"{norm}.bias": shift.ravel()}
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(values[key], value)


def test_reader_refuses_what_is_no_protocol_buffer():
    with pytest.raises(ValueError, match="wire type 3"):
        list(onnx_weights.fields(struct.pack("<B", 8 + 3)))


@pytest.fixture(scope="module")
def small():
    """A U-Net with random weights, also those whose start is 0 or 1."""
    unet = TerrainUNet(terrain.SMALL, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = nnx.state(unet, nnx.Param)
    nnx.update(unet, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), state))
    return unet


@pytest.mark.long
def test_weights_are_read_by_name(small, tmp_path):
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(small, nnx.Param)):
        value = np.asarray(variable[...])
        order = {2: (1, 0), 4: (3, 2, 0, 1)}.get(value.ndim, (0,))
        name = ".".join([*map(str, path[:-1]), PARTS[path[-1]]])
        tensors[name] = np.ascontiguousarray(value.transpose(order))
    name = "middle_block.1.qkv.weight"
    tensors[name] = tensors[name][..., None, None]  # a convolution with a kernel of one pixel
    save_file(tensors, tmp_path / "unet.safetensors")
    for actual, expected in zip(
        jax.tree.leaves(nnx.state(load(tmp_path / "unet.safetensors", terrain.SMALL))),
        jax.tree.leaves(nnx.state(small)),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)
    save_file({x: v for x, v in tensors.items() if x != name}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"differs in middle_block\.1\.qkv\.weight"):
        load(tmp_path / "less.safetensors", terrain.SMALL)
    save_file(tensors | {"out.2.bias": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"out\.2\.bias .* has shape \(2,\)"):
        load(tmp_path / "other.safetensors", terrain.SMALL)


def test_halves_of_the_map_are_apart():
    halves = terrain_runs.jacksboro()
    assert halves.trained.shape[1] + halves.held_out.shape[1] == 403
    heights = np.concatenate(halves, axis=1)
    assert (heights.min(), heights.max()) == (-1, 1)


def test_a_step_draws_crops_of_the_trained_half():
    heights = terrain_runs.jacksboro().trained
    clean, noise, sigma = terrain_runs.drawn(heights, jax.random.key(0), PLAN)
    assert clean.shape == noise.shape == (2, 16, 16, 1)
    assert bool(jnp.all(sigma > 0))
    places = np.lib.stride_tricks.sliding_window_view(np.asarray(heights), (16, 16))
    for crop in clean[..., 0]:
        assert np.any(np.all(places == crop, axis=(2, 3)))
    other, *_ = terrain_runs.drawn(heights, jax.random.key(1), PLAN)
    assert np.abs(np.subtract(clean, other)).max() > 0


def jobs_of(label, rates=(1e-2,)):
    row = terrain.ROWS[label]
    return [Job(row, rate, row.first, i, 0, i) for i, rate in enumerate(rates)]


@pytest.mark.long
def test_runs_of_one_program_are_plain_loops(small):
    """All methods begin at the base; NoRA's second run is that of an nnx model and optimizer."""
    import optax

    import nyscaled as nys

    halves, rates = terrain_runs.jacksboro(), (1e-2, 3e-3)
    outcomes = {
        label: terrain_runs.train(small, halves, jobs_of(label, rates), PLAN, before=True)
        for label in terrain.METHODS
    }
    for label, outcome in outcomes.items():
        base = outcomes[BASE]
        np.testing.assert_allclose(outcome.losses[:, 0], base.losses[:, 0], rtol=1e-5)
        np.testing.assert_allclose(outcome.before["instance"], base.before["instance"], rtol=1e-5)
        if label != BASE:
            assert np.abs(outcome.losses[:, 2] / base.losses[:, 2] - 1).max() > 1e-6
    assert terrain_runs._steps._cache_size() == 1
    model, key = nnx.clone(small), jax.random.fold_in(jax.random.key(0), 1)
    nys.lora.apply(model, 4, 4, targets=terrain_runs.TARGETS, init="nora", key=jax.random.key(1))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    def loss(model, batch):
        return jnp.mean(terrain_runs.loss(model, *batch))

    for step in range(PLAN.steps):
        batch = terrain_runs.drawn(halves.trained, jax.random.fold_in(key, step), PLAN)
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, gradient = nnx.value_and_grad(loss, argnums=wrt)(model, batch)
        optimizer.update(model, gradient)
        assert float(value) == pytest.approx(outcomes["NoRA"].losses[1, step], rel=1e-4)
    clean, noise, sigma = terrain_runs.grid(halves.held_out, PLAN)
    errors = [
        terrain_runs.loss(model, clean, noise[i], jnp.full(len(clean), sigma[i])) for i in range(2)
    ]
    after = outcomes["NoRA"].errors["held_out"][1]
    assert float(jnp.mean(jnp.stack(errors))) == pytest.approx(after, rel=1e-4)


@pytest.mark.long
def test_controls_have_the_size_of_nora(small):
    starts = {
        label: jax.tree.leaves(models(small, jobs_of(label), terrain_runs.TARGETS).params)
        for label in ("NoRA", *CONTROLS)
    }
    for label in CONTROLS:
        for own, nora in zip(starts[label], starts["NoRA"], strict=True):
            assert float(jnp.linalg.norm(own)) == pytest.approx(float(jnp.linalg.norm(nora)), 1e-5)
        assert float(jnp.abs(starts[label][0] - starts["NoRA"][0]).max()) > 1e-4


def test_missing_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="make weights"):
        terrain.main(terrain.Config(out=tmp_path, weights=tmp_path / "unet.safetensors"))


@pytest.mark.long
def test_quick_form_claims_nothing_and_goes_on(tmp_path):
    terrain.main(terrain.Config(out=tmp_path, quick=True))
    how = json.loads((tmp_path / "terrain.json").read_text())
    verdicts = [x["verdict"] for own in how["differences"].values() for x in own.values()]
    assert set(verdicts) == {"too few pairs"}
    assert how["stable_ranks"]["random"]["median"] > 1
    first = (tmp_path / "terrain.md").read_bytes()
    terrain.main(terrain.Config(out=tmp_path, quick=True, minutes=0))
    assert (tmp_path / "terrain.md").read_bytes() == first


@pytest.mark.skipif(not (FIGURES / "terrain.json").exists(), reason="the runs are not there")
def test_committed_record_is_what_its_runs_give():
    how = json.loads((FIGURES / "terrain.json").read_text())
    panels = read_rows(FIGURES / "terrain.csv", ("x", "value"))
    lines = Journal(FIGURES / "terrain.jsonl", KEYS).lines.values()
    assert how["runs"] == len(lines)
    runs = {}
    for label, point in how["chosen"].items():
        row, rate = terrain.AT_ONE_RATE.get(label, (label, point["rate"]))
        own = [x for x in lines if x["method"] == row and x["rate"] == point["rate"] == rate]
        own = [x for x in own if x["number"] == point["number"] and x["seed"] != TUNING_SEED]
        runs[label] = {line["subject"]: line for line in own}
        tuned = [x for x in lines if x["method"] == row and x["seed"] == TUNING_SEED]
        assert len(tuned) == 8 + 1  # the last is above the rates to choose from
        if label == row:
            assert min(tuned, key=lambda x: x["instance"])["rate"] == point["rate"]
    for endpoint in terrain.ENDPOINTS:
        for pair, result in how["differences"][endpoint.field].items():
            first, second = pair.split(" − ")
            seeds = comparison.common(runs, first, second)
            one, other = (
                comparison.values(runs, endpoint.field, name, seeds) for name in (first, second)
            )
            np.testing.assert_allclose(panels[endpoint.title][first][1], one, rtol=1e-5)
            expected = paired.compare(one - other)
            assert result["pairs"] == len(seeds)
            assert result["mean"] == pytest.approx(expected.mean, abs=2e-6)
            assert result["low"] == pytest.approx(expected.low, abs=2e-6)
            assert result["verdict"] == comparison.verdict(result)
    chosen = {label: tuple(point.values()) for label, point in how["chosen"].items()}
    parts = ((terrain.ROWS, BASE), (terrain.AT_ONE_RATE, terrain.AT_ONE_BASE))
    tables = [
        comparison.table(
            {label: runs[label] for label in chosen if label in rows},
            terrain.ENDPOINTS,
            how["differences"],
            chosen,
            base,
            pairs="pairs",
            digits=4,
        )
        for rows, base in parts
    ]
    assert (FIGURES / "terrain.md").read_text() == "\n".join(tables)


@pytest.mark.long
def test_denoised_image_is_the_noisy_one_where_there_is_no_noise(small):
    image = jax.random.normal(jax.random.key(0), (1, 16, 16, 1))
    least = jnp.full(1, 0.002)
    np.testing.assert_allclose(denoise(small, image, least, least), image, atol=1e-6)
