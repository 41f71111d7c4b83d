"""What a dry run says, and that it reads no weight before it knows the memory."""

import dataclasses
import re

import pytest
from training_cases import settings

from nyscaled.cli import main
from nyscaled.finetune import launch, preparation, preview


def words(config):
    """The command line of these settings."""
    names = ("model", "data", "task", "out", "rank", "targets", "steps", "batch_size", "method")
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(config, name))) for name in names]
    return ["finetune", *[word for pair in pairs for word in pair], "--dry-run"]


@pytest.mark.long
def test_a_dry_run_says_what_will_be_done(tmp_path, capsys, monkeypatch):
    config = settings(tmp_path)
    (config.data / "test.tsv").write_text("fine film\t1\n" * 20)
    monkeypatch.setattr(preview, "_seconds", lambda work: (work(), (12.0, 60.0))[1])
    assert main(words(config)) == 0
    said = capsys.readouterr().out
    assert re.search(r"train.tsv:\d+: <s> .* It was⟦(great|terrible)⟧", said)
    # Three layers, rank 2: q has 16 rows and 16 columns, v 16 and 8.
    assert f"6 adapted layers; {3 * 2 * (16 + 16 + 16 + 8)} of" in said
    assert "GLUE, Wang et al., 2019), template mezo; the loss is that of choice" in said
    assert "40 examples of" in said
    assert "; 0 (0.0%) are cut" in said
    assert re.search(r"memory of a step.*: 0\.\d\d GB of values", said)
    # Of a minute each: 12 steps, 2 batches in each of 4 validations (an epoch has 5 steps), 20 test
    # examples in batches of 8; and one program, compiled in 12 s.
    match = re.search(
        r"about ([\d.]+) min: 12 steps ([\d.]+) min, 4 validations ([\d.]+) min, (.*)$", said, re.M
    )
    assert match is not None, said
    assert float(match[2]) == pytest.approx(12, rel=0.5)  # shorter batches take less
    assert 4 < float(match[3]) <= 8
    assert match[4] == "scores of 20 test examples 2.5 min, compiling 1 programs, once 12 s"
    assert float(match[1]) == pytest.approx(float(match[2]) + float(match[3]) + 2.7, abs=0.2)
    assert not config.out.exists()


def test_a_start_from_gradients_is_shown_with_its_options(tmp_path):
    lines = preview.preview(settings(tmp_path, method="nora-grad", scale=0.5))
    assert any("6 adapted layers" in line for line in lines)


def test_a_flag_overrides_one_entry_of_a_mapping_in_a_file(tmp_path, capsys, monkeypatch):
    config = settings(tmp_path, method="prefix")

    def lines(config):
        prepared = preparation.prepare(config, outline=True)
        yield str(launch.count(prepared.plan.parts.params))

    def said(file, *more):
        path = tmp_path / "run.yaml"
        path.write_text(file)
        status = main([*words(config), "--config", str(path), *more])
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err.splitlines()[-1]

    monkeypatch.setattr("nyscaled.cli.finetune.preview", lines)
    four = "method_options: {virtual_tokens: 4}"
    assert int(said(four, "--method-options.virtual-tokens", "8")) == 2 * int(said(four))
    file = "method: lora-one\nmethod_options: {gamma: 8, niter: 3}"
    monkeypatch.setattr("nyscaled.cli.finetune.preview", lambda c: [str(c.method_options)])
    assert said(file, "--method-options.gamma=0.5") == "{'gamma': 0.5, 'niter': 3}\n"
    monkeypatch.setattr("nyscaled.cli.finetune.preview", lambda c: [repr(c.scale)])
    assert said("scale: auto") == "'auto'\n"
    monkeypatch.setattr("nyscaled.cli.finetune.preview", lines)
    for file, message in (
        ("method_options: {gamma: 8}", "option is 'gamma'; expected one of virtual_tokens"),
        (
            "method_options: {virtual_tokens: a}",
            "method_options has virtual_tokens = 'a'; expected",
        ),
        ("method_options: 3", "has method_options = 3; expected a mapping of names to values"),
        ("method_options: {a: [1]}", "method_options with {'a': [1]}; expected numbers or texts"),
        ("method_options: {damping: 1}", "has 'damping'; expected the setting damping in its pl"),
        ("seed: 3\nrank: 2\nrank: 4", "not a file of options: it has 'rank' 2 times; expected it"),
        ("method_options: {gamma: 8, gamma: 8}", "it has 'gamma' 2 times; expected it once"),
        ("out: ''", "has out = ''; expected a path"),
    ):
        assert message in said(file)
    assert "--out is ''; expected a path" in said("rank: 2", "--out", "")
    assert "--out is ''; expected a path" in said("rank: 2", "--out=")
    assert "--config is ''; expected a path" in said("rank: 2", "--config=")
    assert "has no value" in said("rank: 2", "--method-options.virtual-tokens")


def test_prompts_of_the_rows_have_no_template(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "It was", "completion": " good"}\n' * 20)
    config = dataclasses.replace(settings(tmp_path), data=data, task="instructions")
    assert preparation.prepare(config, outline=True).described["prompt"] is None
    data.write_text('{"instruction": "It was", "output": " good"}\n' * 20)
    prompt = preparation.prepare(config, outline=True).described["prompt"]
    assert prompt is not None
    assert prompt["name"] == "alpaca"


@pytest.mark.long
def test_no_weight_is_read_before_the_memory_is_known(tmp_path):
    config = settings(tmp_path)
    (weights,) = (tmp_path / "llama").glob("*.safetensors")
    lines = preview.preview(config)
    for line in lines:
        if line.startswith("memory"):
            break
    # Values are wrong from here on, and the header with the shapes is right.
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(ValueError, match="safetensors"):
        list(lines)
