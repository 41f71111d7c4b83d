"""experiments/tier_b.py and tier_c.py in their quick forms, and layers above states."""

import json

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows

import nyscaled as nys
from experiments import tier_b, tier_c
from experiments.lib import adapter_data, comparison, made_up, paired, upper_layers
from experiments.lib.adapter_data import Setting
from experiments.lib.journal import Journal
from experiments.lib.tier_methods import ENDPOINTS
from experiments.lib.tier_study import KEYS, TUNING_SEED
from nyscaled.finetune.objectives import choice_scores

FIGURES = ROOT / "figures"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A random language model with sentences, whole and in halves."""
    folder = tmp_path_factory.mktemp("tier_b")
    model = made_up.write_model(folder / "llama", "llama")
    data = made_up.write_sentences(folder / "sentences")
    whole = Setting(model, data, examples=(24, 8, 8), lengths=(8, 16))
    return whole, Setting(model, data, examples=(24, 8, 8), lengths=(8, 16), upper=1)


@pytest.mark.long
def test_upper_layers_over_states_are_the_whole_model(settings):
    whole, upper = (adapter_data.read(setting, 0) for setting in settings)
    models = [
        adapter_data.fresh(setting, data, 0)[0]
        for setting, data in zip(settings, (whole, upper), strict=True)
    ]
    for step in range(3):
        rows = whole.order.rows(step)
        np.testing.assert_array_equal(rows, upper.order.rows(step))
        batches = whole.train.batch(rows), upper.train.batch(rows)
        assert batches[1].tokens.dtype == np.float32
        one, other = (choice_scores(m, b) for m, b in zip(models, batches, strict=True))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_halves_refuse_models_that_they_cannot_cut(settings):
    model = adapter_data.load(settings[0].model)[0]
    for upper in (0, 2):
        with pytest.raises(ValueError, match=f"upper is {upper} of 2 layers"):
            upper_layers.halves(model, upper)


def test_candidates_share_a_prompt_up_to_their_last_token():
    def make(*answers):
        return nys.finetune.Encoded((1, 2), answers, 1)

    rows = adapter_data.in_one_pass([make((5, 6), (5, 7)), make((5, 6), (5, 7)), make((5, 6))])
    assert [row.prompt for row in rows] == [(1, 2, 5)] * 2
    assert rows[0].answers == ((6,), (7,))
    with pytest.raises(ValueError, match="expected ones with another last token"):
        adapter_data.in_one_pass([make((5, 6), (4, 7))])


def test_names_of_settings_tell_them_apart(settings):
    whole, upper = settings
    assert whole.name != upper.name
    assert whole.name.startswith("llama sentences sst2")


@pytest.mark.long
@pytest.mark.parametrize(("script", "file"), [(tier_b, "tier_b_sst2"), (tier_c, "tier_c")])
def test_quick_form_makes_what_a_record_needs(script, file, tmp_path):
    script.main(script.Config(out=tmp_path, quick=True))
    how = json.loads((tmp_path / f"{file}.json").read_text())
    assert how["seeds"]["NoRA"] == how["seeds"]["LoRA, shuffled labels"] == 3
    panels = read_rows(tmp_path / f"{file}.csv", ("x", "value"))
    one, other = (panels["validation loss"][name][1] for name in ("NoRA", "LoRA"))
    result = how["differences"]["validation_loss"]["NoRA − LoRA"]
    assert result["mean"] == pytest.approx(np.mean(one - other), abs=1e-5)
    lines = Journal(tmp_path / f"{file}.jsonl", KEYS).lines
    assert how["runs"] == len(lines)
    # The same command draws what is there.
    script.main(script.Config(out=tmp_path, quick=True, minutes=0))
    assert json.loads((tmp_path / f"{file}.json").read_text())["differences"] == how["differences"]


def test_unknown_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="task is 'cb'; expected one of sst2, commonsense"):
        tier_b.main(tier_b.Config(out=tmp_path, task="cb"))


@pytest.mark.parametrize("name", sorted(x.stem for x in FIGURES.glob("tier_[bc]*.json")))
def test_committed_record_is_what_its_runs_give(name):
    """The lines of the runs give the comparisons; a row with too few pairs claims nothing."""
    how = json.loads((FIGURES / f"{name}.json").read_text())
    lines = Journal(FIGURES / f"{name}.jsonl", KEYS).lines.values()
    assert how["runs"] == len(lines)
    runs = {}
    for line in lines:
        point = how["chosen"].get(line["method"])
        final = line["steps"] == how["config"]["steps"] and line["seed"] != TUNING_SEED
        if final and point == {"rate": line["rate"], "number": line["number"]}:
            runs.setdefault(line["method"], {})[line["seed"]] = line
    for endpoint in ENDPOINTS:
        for pair, result in how["differences"][endpoint.field].items():
            first, second = pair.split(" − ")
            seeds = comparison.common(runs, first, second)
            one, other = (
                comparison.values(runs, endpoint.field, method, seeds) for method in (first, second)
            )
            expected = paired.compare(one - other)
            assert result["pairs"] == len(seeds)
            assert result["mean"] == pytest.approx(expected.mean, abs=1e-6)
            assert result["low"] == pytest.approx(expected.low, abs=1e-6)
            assert result["verdict"] == comparison.verdict(result)
            assert len(seeds) >= 8 or result["verdict"] == comparison.FEW


def test_what_the_pages_say_of_parts_of_the_runs():
    """The results name the last steps, the first epoch, and the loss on the seed of tuning."""

    def of(name, method, part):
        how = json.loads((FIGURES / f"{name}.json").read_text())
        point, steps = how["chosen"][method], how["config"]["steps"]
        lines = [
            x
            for x in Journal(FIGURES / f"{name}.jsonl", KEYS).lines.values()
            if (x["method"], x["steps"]) == (method, steps) and x["seed"] != TUNING_SEED
            if point == {"rate": x["rate"], "number": x["number"]}
        ]
        return np.mean([x["losses"][part] for x in lines])

    last = slice(200, 250)
    for method in ("PiSSA", "NoRA+", "LoRA-One"):
        first = slice(0, 125)
        assert of("tier_b_sst2", method, last) < of("tier_b_sst2", "LoRA", last)
        assert of("tier_b_sst2", method, first) > of("tier_b_sst2", "LoRA", first)
    assert f"{of('tier_b_sst2', 'LoRA-One', slice(10)):.1f}" == "2.7"
    assert f"{of('tier_b_sst2', 'LoRA', slice(10)):.2f}" == "0.73"
    epoch = slice(0, 125)
    assert of("tier_c", "NoRA", epoch) >= of("tier_c", "LoRA", epoch)
    tuned = {
        (x["method"], x["rate"], x["number"], x["steps"]): x["validation_loss"]
        for x in Journal(FIGURES / "tier_c.jsonl", KEYS).lines.values()
        if x["seed"] == TUNING_SEED
    }
    for method, number in (("LoRA", 1.0), ("NoRA", 0.05), ("NoRA+", 0.05)):
        assert tuned[method, 1e-3, number, 375] > tuned[method, 1e-3, number, 60]
    assert f"{tuned['LoRA', 1e-3, 1.0, 60]:.2f}" == "0.37"
    assert f"{tuned['LoRA', 1e-3, 1.0, 375]:.2f}" == "0.47"
