"""Models for lm-evaluation-harness; its tests need the package lm_eval."""

import json
import types

import numpy as np
import pytest
from finetune_cases import characters
from test_finetune_evaluation import causal, commonsense, mean_log_p, record

from nyscaled.finetune import harness as harness_module
from nyscaled.finetune.encoding import encode
from nyscaled.finetune.evaluation import evaluate
from nyscaled.finetune.harness import harness_model, log_likelihoods, run_harness
from nyscaled.finetune.tasks import by_name


def test_log_likelihoods_are_those_of_the_whole_text():
    examples = record()[:6]
    encoded, _ = encode(examples, characters(), answers="candidates")
    pairs = [(e.prompt, answer) for e in encoded for answer in e.answers]
    results = log_likelihoods(causal(), pairs, batch_size=4)
    means = np.concatenate([mean_log_p(example) for example in examples])
    sums = means * [len(answer) for _, answer in pairs]
    np.testing.assert_allclose([r.log_p for r in results], sums, rtol=1e-4)
    assert not any(r.greedy for r in results)
    assert log_likelihoods(causal(), []) == []


@pytest.mark.long
def test_greedy_continuations():
    prompt = tuple(characters().encode("It was").ids)
    best = max(range(270), key=lambda i: log_likelihoods(causal(), [(prompt, (i,))])[0].log_p)
    other = (best + 1) % 270
    results = log_likelihoods(causal(), [(prompt, (best,)), (prompt, (other,))])
    assert [r.greedy for r in results] == [True, False]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'nyscaled\[eval\]'"):
        harness_model(causal(), characters(), name="tiny")


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'nyscaled[eval]'")
    return harness_model(causal(), characters(), name="tiny", batch_size=4)


def test_prompts_have_the_room_that_generated_tokens_leave(monkeypatch):
    """Without the package: only the class that its models inherit from is needed."""
    package = types.SimpleNamespace(TemplateLM=object)
    monkeypatch.setattr(harness_module, "_lm_eval", lambda module: package)
    seen = []

    def generated(model, prompts, count, stops, size):
        seen.append((prompts, count))
        return [[5]] * len(prompts)

    monkeypatch.setattr(harness_module, "generated_ids", generated)
    own, most = harness_model(causal(), characters(), name="tiny"), causal().max_length or 2048
    for asked in (most - 3, most - 1, most, 2 * most):
        own.generate_until([Request("It was", {"max_gen_toks": asked})])
    whole = tuple(own.tok_encode("It was"))
    assert seen == [([whole[-3:]], most - 3), *[([whole[-1:]], most - 1)] * 3]


def test_both_scorers_agree(harness):
    """Candidates of equal length: the greatest sum is the greatest mean."""
    task, examples = by_name("commonsense"), commonsense("compact")
    examples = [example for example in examples if len(example.candidates) == 3]
    result = evaluate(causal(), characters(), examples, task)
    for example, prediction in zip(examples, result.predictions, strict=True):
        prompt = example.prompt.removesuffix("\n")  # the harness takes white space to the answer
        requests = [Request(prompt, "\n" + candidate) for candidate in example.candidates]
        sums = [log_p for log_p, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        chosen = example.candidates.index(prediction.answer)
        assert sums[chosen] >= max(sums) - 1e-4


def test_what_the_harness_asks_for(harness):
    text = "It was " * 20
    (whole,) = harness.loglikelihood_rolling([Request(text)])
    ((once, _),) = harness.loglikelihood([Request("", text)], disable_tqdm=True)
    assert whole == pytest.approx(once, rel=1e-4)
    requests = [
        Request("It was", {"until": ["\n"], "max_gen_toks": 8}),
        Request("No", {"until": "e", "max_gen_toks": 4}),
    ]
    texts = harness.generate_until(requests)
    assert len(texts) == 2
    assert "\n" not in texts[0]
    assert harness.apply_chat_template([{"role": "user", "content": "Hi"}]).endswith("assistant\n")
    with pytest.raises(ValueError, match="the task samples text"):
        harness.generate_until([Request("It", {"do_sample": True, "temperature": 1.0})])


@pytest.mark.long
def test_a_task_of_the_harness_on_local_data(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"q": f"Is {i} even?", "label": i % 2} for i in range(10)]
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "even.yaml").write_text(
        f"task: local_even\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: ['Yes', 'No']\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    results = run_harness(
        causal(), characters(), ["local_even"], name="tiny", folder=tmp_path, examples=8
    )
    assert 0 <= results["local_even"]["acc,none"] <= 1
    with pytest.raises(ValueError, match="lm-evaluation-harness fails"):
        run_harness(causal(), characters(), ["no_such_task"], name="tiny", folder=tmp_path)
