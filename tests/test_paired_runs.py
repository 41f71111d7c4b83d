"""What experiments/lib has for paired runs: the journal, tuning, comparisons and spectra."""

import itertools
import json
import math

import numpy as np
import pytest

from experiments.lib import comparison
from experiments.lib.adapter_runs import haar
from experiments.lib.comparison import Endpoint
from experiments.lib.journal import Journal
from experiments.lib.spectral_change import Decomposed, Update, changed, energies
from experiments.lib.tuning import RATES, Grid, Point, tune


def test_a_journal_goes_on_after_a_line_that_was_cut(tmp_path):
    path = tmp_path / "runs.jsonl"
    first = Journal(path, ("seed", "rate"))
    first.once({"seed": 1, "rate": None}, lambda: {"loss": 0.25})
    first.once({"seed": 2, "rate": 1e-3}, lambda: {"loss": 0.5})
    text = path.read_text()
    path.write_text(text[:-9])
    again = Journal(path, ("seed", "rate"))
    assert [line["seed"] for line in again.lines.values()] == [1]
    again.once({"seed": 2, "rate": 1e-3}, lambda: {"loss": 0.75})
    whole = Journal(path, ("seed", "rate"))
    assert whole.once({"seed": 2, "rate": 1e-3}, None)["loss"] == 0.75
    with pytest.raises(KeyError):
        whole.once({"seed": 3, "rate": 1e-3}, None)


def test_a_line_without_a_key_is_named(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"loss": 1}\n3\n{"seed": 2, "loss": 0.5}\n')
    assert list(Journal(path, ("seed",)).lines) == [(2,)]
    said = capsys.readouterr().err
    assert f"{path}:1 is left out; expected an object with seed\n{path}:2 is left out" in said


@pytest.mark.parametrize("numbers", [(), (0.1,), (0.1, 0.05, 0.2)])
@pytest.mark.parametrize("optimum", [1e-5, 1e-3, 4e-1])
def test_tuning_gives_each_method_as_many_runs(numbers, optimum):
    """Seven short ones and two in full length, and at most two beyond the grid."""
    seen = {False: [], True: []}

    def loss(point, full):
        seen[full].append(point)
        return abs(math.log(point.rate / optimum)) + 0.01 * abs((point.number or 0) - 0.2)

    best = tune(Grid(numbers=numbers), loss)
    beyond = sum(not min(RATES) <= p.rate <= max(RATES) for p in seen[False])
    inside = min(RATES) < optimum < max(RATES)
    assert len(seen[True]) == 2
    assert len(seen[False]) == (7 if inside else 9)
    assert inside or beyond >= 2
    assert best in seen[True]
    assert len(set(seen[False])) == len(seen[False])
    if len(numbers) == 3:
        assert best.number == 0.2


def test_tuning_takes_no_point_whose_loss_is_not_finite():
    best = tune(Grid(), lambda point, full: math.nan if point.rate > 2e-3 else -point.rate)
    assert best == Point(1.8e-3, None)


def runs_of(differences, base=1.0, start=0):
    """Runs of "one" and "other" with these differences of the loss."""
    rng = np.random.default_rng(0)
    level = base + rng.normal(size=len(differences))
    seeds = range(start, start + len(differences))
    one = {s: {"loss": x + d} for s, x, d in zip(seeds, level, differences, strict=True)}
    return {"one": one, "other": {s: {"loss": x} for s, x in zip(seeds, level, strict=True)}}


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ([-0.11, -0.1, -0.12, -0.1, -0.13, -0.1, -0.09, -0.1], 1e-3, "lower"),
        ([0.11, 0.1, 0.12, 0.1, 0.13, 0.1, 0.09, 0.1], 1e-3, "higher"),
        ([-0.11, -0.1, -0.12, -0.1, -0.13, -0.1, -0.09], 1e-3, "too few pairs"),
        ([0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.1, 0.0], 1e-3, "no difference was seen"),
        ([0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.1, 0.0], 0.5, "equal"),
    ],
)
def test_verdicts(differences, margin, verdict):
    endpoint = Endpoint("loss", "loss", margin, relative=False)
    results = comparison.compare(runs_of(differences), endpoint, [("one", "other")])
    assert results["one − other"]["verdict"] == verdict
    none = comparison.compare(runs_of(differences), endpoint, [("one", "absent")])
    assert none == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_is_not_without_a_difference(value):
    endpoint = Endpoint("loss", "loss", 1e-3, relative=False)
    runs = runs_of([0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.1, 0.0])
    runs["third"] = {seed: {"loss": 10 + line["loss"]} for seed, line in runs["one"].items()}
    runs["one"][3]["loss"] = value
    pairs = [("one", "other"), ("third", "other")]
    results = comparison.compare(runs, endpoint, pairs)
    assert results["one − other"]["verdict"] == "a run diverged"
    assert results["third − other"]["verdict"] == "higher"
    assert "NaN" not in json.dumps(results)
    text = comparison.table(
        runs, [endpoint], {"loss": results}, dict.fromkeys(runs, (0.1, None)), "other"
    )
    assert "; a run diverged (seeds 3) |" in text
    assert "no difference" not in text


def test_more_methods_make_a_claim_harder():
    rng = np.random.default_rng(1)
    differences = 0.1 + 0.09 * rng.normal(size=8)
    endpoint = Endpoint("loss", "loss", 1e-6, relative=False)
    one = comparison.compare(runs_of(differences), endpoint, [("one", "other")])["one − other"]
    pairs = [("one", "other"), *(("absent", str(i)) for i in range(40))]
    many = comparison.compare(runs_of(differences), endpoint, pairs)["one − other"]
    assert one["verdict"] == "higher"
    assert many["corrected"] == pytest.approx(min(1, 41 * one["t_test"]))
    assert many["verdict"] == "no difference was seen"


def test_random_orthogonal_matrices_have_no_direction():
    rng = np.random.default_rng(0)
    q = haar(rng, (400, 3, 3))
    np.testing.assert_allclose(
        np.swapaxes(q, 1, 2) @ q, np.broadcast_to(np.eye(3), q.shape), atol=1e-12
    )
    assert np.abs(q.mean(axis=0)).max() < 0.12
    np.testing.assert_allclose((q**2).mean(axis=0), 1 / 3, atol=0.06)


def test_updates_move_the_singular_values_that_they_are_along():
    rng = np.random.default_rng(0)
    weight = Decomposed.of(rng.normal(size=(9, 6)))
    left, right = weight.left[:, [1, 4]], weight.right[:, [1, 4]]
    update = Update.of(left * [1e-3, 2e-3], right.T)
    assert changed(weight, update, 2).tolist() == [1, 4]
    for energy in energies(weight, update):
        np.testing.assert_allclose(energy[[1, 4]], [0.2, 0.8], rtol=1e-9)
        assert energy.sum() == pytest.approx(1)
    expected = (left * [1e-3, 2e-3]) @ right.T
    np.testing.assert_allclose(update.matrix, expected, atol=1e-15)
    for keep_left in (True, False):
        other = update.randomized(rng, keep_left=keep_left)
        values = np.linalg.svd(other.matrix, compute_uv=False)[:2]
        np.testing.assert_allclose(values, [2e-3, 1e-3], rtol=1e-9)
        same = np.allclose(energies(weight, other)[0][[1, 4]], [0.2, 0.8])
        assert same == keep_left


def test_chance_has_no_preferred_direction():
    rng = np.random.default_rng(0)
    weight = Decomposed.of(rng.normal(size=(12, 12)))
    update = Update.of(weight.left[:, :2], weight.right[:, :2].T)
    means = [
        energies(weight, update.randomized(rng, keep_left=False))[0][:2].sum() for _ in range(200)
    ]
    assert np.mean(means) == pytest.approx(2 / 12, abs=0.03)


def test_lines_are_json(tmp_path):
    journal = Journal(tmp_path / "runs.jsonl", ("seed",))
    for seed in range(3):
        journal.once({"seed": seed}, lambda: {"losses": [0.5, 0.25]})
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 2]
    assert all(list(itertools.chain(line)) == ["seed", "losses"] for line in lines)
