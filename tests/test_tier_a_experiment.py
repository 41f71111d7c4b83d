"""experiments/tier_a.py and fig2.py in their quick forms, and their committed records."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows

from experiments import fig2, tier_a
from experiments.lib import comparison, paired
from experiments.lib.adapter_data import Setting
from experiments.lib.journal import Journal
from experiments.lib.tier_methods import AT_ONE_RATE, BASE, CONTROLS_AT_ONE_RATE, ENDPOINTS, METHODS
from experiments.lib.tier_study import KEYS, TUNING_SEED, Study
from experiments.lib.tuning import Point

FIGURES = ROOT / "figures"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("tier_a")
    tier_a.main(tier_a.Config(out=out, quick=True))
    return out


def lines_of(folder):
    return Journal(folder / "tier_a.jsonl", KEYS).lines


@pytest.mark.long
def test_quick_form_goes_on_where_it_stopped(quick, tmp_path):
    """Without lines at the end it makes the same runs again."""
    lines = (quick / "tier_a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tier_a.jsonl").write_text("".join(lines[:-3]) + lines[-3][:40])
    tier_a.main(tier_a.Config(out=tmp_path, quick=True, minutes=0))
    assert len(read_rows(tmp_path / "tier_a.csv")["validation loss"]["PiSSA, LoRA's rate"][0]) < 3
    tier_a.main(tier_a.Config(out=tmp_path, quick=True))
    first, second = lines_of(quick), lines_of(tmp_path)
    assert first.keys() == second.keys()
    for key, line in first.items():
        assert second[key]["validation_loss"] == pytest.approx(line["validation_loss"], rel=1e-3)


@pytest.mark.long
def test_quick_form_compares_paired_seeds(quick):
    how = json.loads((quick / "tier_a.json").read_text())
    assert how["seeds"]["NoRA"] == 3
    panels = read_rows(quick / "tier_a.csv", ("x", "value"))
    one, other = (panels["validation loss"][name][1] for name in ("NoRA", "LoRA"))
    result = how["differences"]["validation_loss"]["NoRA − LoRA"]
    assert result["mean"] == pytest.approx(np.mean(one - other), abs=1e-5)
    assert result["verdict"] == "too few pairs"
    # All methods learn what shuffled labels do not teach.
    accuracy = {name: y.mean() for name, (_, y) in panels["test accuracy"].items()}
    assert accuracy.pop("LoRA, shuffled labels") < min(accuracy.values())
    tuned = [x for x in lines_of(quick).values() if x["seed"] == 100]
    untuned = (
        {"LoRA again", "LoRA, shuffled labels"} | AT_ONE_RATE.keys() | CONTROLS_AT_ONE_RATE.keys()
    )
    for method in how["chosen"].keys() - untuned:
        assert 9 <= sum(x["method"] == method for x in tuned) <= 11


def test_runs_of_other_settings_are_left_out(tmp_path):
    study = Study(tier_a.Config(out=tmp_path), Setting("m", tmp_path), METHODS, "tier_a")
    study.chosen["LoRA"] = point = Point(1e-3, 1.0)
    for seed, (setting, rate, steps) in enumerate(
        [
            (study.name, 1e-3, 200),
            ("quick", 1e-3, 200),
            (study.name, 1e-3, 20),
            (study.name, 1, 200),
        ]
    ):
        identity = zip(KEYS, (setting, "LoRA", rate, point.number, seed, steps), strict=True)
        study.journal.once(dict(identity), dict)
    assert study.finals().keys() == {"LoRA"}
    assert study.finals()["LoRA"].keys() == {0}


@pytest.mark.long
def test_quick_figure_2_has_its_nulls(tmp_path):
    fig2.main(fig2.Config(out=tmp_path, quick=True))
    panels = read_rows(tmp_path / "fig2.csv", ("index", "value"))
    for name in ("changed", "random", "random right"):
        for _, counts in panels[name].values():
            assert counts.sum() == pytest.approx(2 * 3 * 2)  # seeds, weights, r
    how = json.loads((tmp_path / "fig2.json").read_text())
    for name, (_, values) in panels["changed"].items():
        of_seeds = [seed["changed"] for seed in how["counts_in_top"][name].values()]
        assert len(of_seeds) == 2
        assert sum(of_seeds) == values[:2].sum()
    shares = how["shares"]
    assert shares["PiSSA"]["left"] == pytest.approx(1)  # its a is along the first vectors
    assert shares["LoRA"]["left"] < 0.5


def test_committed_record_is_what_its_runs_give():
    """The lines of the runs give the comparisons, the choices, and the table of the page."""
    how = json.loads((FIGURES / "tier_a.json").read_text())
    assert not how["config"]["quick"]
    lines = lines_of(FIGURES)
    assert how["runs"] == len(lines)
    finals, tuned = {}, {}
    for line in lines.values():
        of_method = tuned if line["seed"] == TUNING_SEED else finals
        point = line["seed"], line["steps"], line["rate"], line["number"]
        of_method.setdefault(line["method"], {})[point] = line
    runs = {m: {seed: x for (seed, *_), x in of.items()} for m, of in finals.items()}
    for endpoint in ENDPOINTS:
        for name, result in how["differences"][endpoint.field].items():
            first, second = name.split(" − ")
            seeds = comparison.common(runs, first, second)
            one, other = (
                comparison.values(runs, endpoint.field, method, seeds) for method in (first, second)
            )
            assert result["pairs"] == len(seeds)
            assert result["mean"] == pytest.approx(np.mean(one - other), abs=1e-6)
            np.testing.assert_allclose(
                (result["low"], result["high"]), paired.interval(one - other), atol=1e-6
            )
            assert result["verdict"] == comparison.verdict(result)
            if result["pairs"] < 8:
                assert result["verdict"] == comparison.FEW
    for method, of_method in tuned.items():
        full = [x for (_, steps, *_), x in of_method.items() if steps == how["config"]["steps"]]
        if method in how["chosen"]:
            best = min(full, key=lambda x: x["validation_loss"])
            assert how["chosen"][method]["rate"] == best["rate"]
            assert len(full) == 2
    table = comparison.table(
        {method: runs[method] for method in how["seeds"]},
        ENDPOINTS,
        how["differences"],
        {method: tuple(point.values()) for method, point in how["chosen"].items()},
        BASE,
    )
    assert (FIGURES / "tier_a.md").read_text() == table


def test_committed_figure_2_compares_with_chance():
    how = json.loads((FIGURES / "fig2.json").read_text())
    panels = read_rows(FIGURES / "fig2.csv", ("index", "value"))
    for method, shares in how["shares"].items():
        _, counts = panels["changed"][method]
        assert counts.sum() == how["matrices"] * how["config"]["rank"] * shares["seeds"]
        assert shares["changed"] == pytest.approx(counts[:8].sum() / counts.sum(), abs=1e-5)
