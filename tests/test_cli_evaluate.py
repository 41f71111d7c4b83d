"""`nyscaled evaluate`: what it scores, writes and refuses."""

import json
import shutil

import jax
import pytest
import safetensors.numpy
from finetune_cases import characters, words
from flax import nnx
from test_finetune_evaluation import causal, classifier

import nyscaled as nys
from nyscaled.cli import main
from nyscaled.finetune import TASKS, Row, identity
from nyscaled.models import BertClassifier

ROWS = [("a b c", 1), ("d e", 0), ("h g a", 1), ("b b", 0)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A causal model, an encoder, one with a head, data, and adapters of the first and the last."""
    folder = tmp_path_factory.mktemp("files")
    nys.models.save(causal(), folder / "causal", characters())
    nys.models.save(classifier().bert, folder / "encoder", words())
    encoder = nys.models.load(folder / "encoder")[0]
    head = BertClassifier(encoder, ["negative", "positive"], rngs=nnx.Rngs(3))
    nys.models.save(head, folder / "classifier", words())
    for name, base, modules in (("a", causal(), []), ("b", head, ["classifier", "pooler"])):
        model = nnx.clone(base)
        layers = nys.lora.apply(model, rank=2, targets=r".*(q_proj|query)", key=jax.random.key(0))
        for layer in layers.values():
            layer.adapters["default"].lora_b[...] += 1.0
        paths = [
            ".".join(map(str, path))
            for path, _ in nnx.iter_modules(model)
            if path and path[-1] in modules
        ]
        nys.lora.save_peft(model, folder / name, base_model="base", modules_to_save=paths)
    (folder / "data").mkdir()
    for split in ("train", "dev"):
        lines = [f"{text}\t{label}\n" for text, label in ROWS]
        (folder / "data" / f"{split}.tsv").write_text("".join(lines))
    return folder


def evaluate(files, *options, model="causal", task="sst2", data="data"):
    words = ["--model", files / model, "--data", files / data, *options]
    words += [] if task is None else ["--task", task]
    return main(["evaluate", *map(str, words)])


def test_scores_and_answers(files, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert evaluate(files, "--out", out) == 0
    record = json.loads(out.read_text())
    accuracy = record["scores"]["accuracy"]["value"]
    assert capsys.readouterr().out.startswith(f"sst2: accuracy {100 * accuracy:.2f} ± ")
    assert (record["task"], record["split"], record["examples"]) == ("sst2", "dev", 4)
    answers = [p["answer"] for p in record["predictions"]]
    assert set(answers) <= {" terrible", " great"}
    right = [p["values"]["accuracy"] for p in record["predictions"]]
    assert sum(right) / 4 == accuracy
    assert next(p["source"] for p in record["predictions"]) == "dev.tsv:1"
    assert evaluate(files, "--examples", 2, "--split", "train", "--out", out, "--overwrite") == 0
    record = json.loads(out.read_text())
    assert (record["split"], record["examples"]) == ("train", 2)


@pytest.mark.long
def test_adapters(files, tmp_path):
    """The adapter of an encoder brings its head."""
    answers = {}
    for name, model, options in (
        ("head", "classifier", ()),
        ("adapter of a head", "classifier", ("--adapter", files / "b")),
        ("adapter", "encoder", ("--adapter", files / "b")),
        ("causal", "causal", ("--adapter", files / "a")),
    ):
        out = tmp_path / f"{name}.json"
        assert evaluate(files, *options, "--out", out, model=model) == 0
        answers[name] = json.loads(out.read_text())["predictions"]
    assert answers["adapter"] == answers["adapter of a head"]
    adapted = nys.models.load(files / "classifier")[0]
    nys.lora.load_peft(adapted, files / "b")
    tokens, mask = words()([text for text, _ in ROWS], side="right")
    best = [("negative", "positive")[i] for i in adapted(tokens, mask).argmax(1)]
    assert [p["answer"] for p in answers["adapter"]] == best


def test_other_test_examples_than_those_of_the_run_are_named(files, tmp_path, capsys):
    data, adapter = tmp_path / "data", tmp_path / "adapter"
    data.mkdir()
    shutil.copytree(files / "a", adapter)
    rows = [Row({"sentence": text, "label": label}, "") for text, label in ROWS]
    digest = identity.of_texts(TASKS["sst2"].examples(rows[::-1]))
    (tmp_path / "run.json").write_text(json.dumps({"examples": {"test": digest}}))
    for label, said in ((0, False), (1, True)):  # of the last row
        lines = [f"{text}\t{label}\n" for text, label in (*ROWS[:3], ("b b", label))]
        (data / "test.tsv").write_text("".join(lines))
        assert evaluate(files, "--adapter", adapter, data=data) == 0
        assert (
            "these 4 test examples are not the 4 that the run" in capsys.readouterr().err
        ) == said


@pytest.mark.parametrize("written", [[], {"test": 4}, {"test": {"examples": 4}}])
def test_a_record_of_another_form_is_refused(files, tmp_path, written, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(files / "a", adapter)
    (tmp_path / "run.json").write_text(json.dumps({"examples": written}))
    (data := tmp_path / "data").mkdir()
    (data / "test.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in ROWS))
    assert evaluate(files, "--adapter", adapter, data=data) == 1
    said = capsys.readouterr().err
    assert f"run.json: examples are {written!r}; expected examples and sha256 by name" in said


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("test.tsv", "sentence\na b c\n"),
        ("test.tsv", "sentence\tlabel\na b c\t-1\n"),
        ("test.jsonl", '{"sentence": "a b c", "idx": 0}\n'),
        ("test.jsonl", '{"sentence": "a b c", "label": null}\n'),
    ],
)
def test_the_split_is_dev_where_test_has_no_labels(files, tmp_path, name, hidden, capsys):
    data, out = tmp_path / "data", tmp_path / "scores.json"
    shutil.copytree(files / "data", data)
    (data / name).write_text(hidden)
    assert evaluate(files, "--out", out, data=data) == 0
    said = capsys.readouterr()
    assert said.out.endswith("% on 4 examples of dev\n")
    assert "the test split is left out" in said.err
    assert json.loads(out.read_text())["split"] == "dev"
    assert evaluate(files, "--split", "test", data=data) == 1


@pytest.mark.long
def test_a_run_says_its_classes(files, tmp_path, capsys):
    """They are beside what was trained, and `evaluate` reads them there."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.tsv").write_text(
        "".join(f"a b{' c' * i}\t{['no', 'yes'][i % 2]}\n" for i in range(20))
    )
    (data / "test.tsv").write_text("a b c\tyes\nd e\tyes\n")
    common = {"out": tmp_path / "classes", "steps": 1, "rank": 2, "batch_size": 4}
    encoder = {"model": str(files / "encoder"), "task": "classification", "data": data}
    nys.finetune.run(nys.finetune.Config(**common, **encoder, targets=r".*query"))
    test = tmp_path / "alone"
    test.mkdir()
    shutil.move(data / "test.tsv", test)  # in which one class does not occur
    adapter, out = tmp_path / "classes" / "adapter", tmp_path / "scores.json"
    options = ("--adapter", adapter, "--out", out)
    assert evaluate(files, *options, model="encoder", task="classification", data=test) == 0
    answers = {p["answer"] for p in json.loads(out.read_text())["predictions"]}
    assert answers <= {"no", "yes"}
    assert evaluate(files, *options, "--overwrite", model="encoder") == 1
    assert "the head has the classes no, yes; expected those of the" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("model", ["causal", "encoder"])
def test_a_prefix_is_read(files, tmp_path, model, capsys):
    """With it, the scores are those of the run on the same examples."""
    data, out = tmp_path / "data", tmp_path / "scores.json"
    shutil.copytree(files / "data", data)
    shutil.copy(data / "dev.tsv", data / "test.tsv")
    run = {"model": str(files / model), "data": data, "task": "sst2", "out": tmp_path / "out"}
    run |= {"method": "prefix", "steps": 2, "batch_size": 4, "learning_rate": 1.0}
    nys.finetune.run(nys.finetune.Config(**run))
    adapter = tmp_path / "out" / "adapter"
    assert evaluate(files, "--adapter", adapter, "--out", out, model=model, data=data) == 0
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    again = json.loads(out.read_text())["predictions"]
    by_source = {p["source"]: p["answer"] for p in again}
    assert {p["source"]: p["answer"] for p in written["predictions"]} == by_source
    values = safetensors.numpy.load_file(adapter / "prefix.safetensors")
    name = next(name for name in values if name.endswith("prefix.value"))
    values[name] = values[name][..., :-1]
    safetensors.numpy.save_file(values, adapter / "prefix.safetensors")
    assert evaluate(files, "--adapter", adapter, model=model, data=data) == 1
    assert "expected a prefix of this base" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_says_its_template(files, tmp_path):
    data, out = tmp_path / "train.jsonl", tmp_path / "scores.json"
    data.write_text('{"instruction": "a", "answer": "true"}\n' * 20)
    causal = {"model": str(files / "causal"), "data": data, "out": tmp_path / "out", "steps": 1}
    causal |= {"task": "commonsense-boolq", "template": "compact", "method": "full"}
    nys.finetune.run(nys.finetune.Config(**causal, batch_size=4))
    written = json.loads((tmp_path / "out" / "adapter" / "task.json").read_text())
    assert (written["template"], written["prompt"]["prompt"]) == ("compact", "{instruction}\n")
    options = ("--out", out, "--batch-size", 4)
    model = tmp_path / "out" / "adapter"
    assert evaluate(files, *options, model=model, task="commonsense-boolq", data=data) == 0
    assert json.loads(out.read_text())["template"] == "compact"
    with pytest.raises(ValueError, match="template is 'compact'; expected one of mezo"):
        nys.finetune.run(nys.finetune.Config(**{**causal, "task": "sst2"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "none"}, "task is 'none'; expected one of sst2"),
        ({"data": "none"}, "which does not exist; expected a file, a folder"),
        ({"task": "copa", "model": "encoder"}, "the task copa needs a causal language model"),
        ({"model": "encoder"}, "the model has no head with the classes negative, positive; exp"),
        ({"options": ["--split", "test"]}, "has train, dev; expected a test split"),
        ({"options": ["--split", "validation"]}, "split is 'validation'; expected train, dev or"),
        ({"options": ["--template", "x"]}, "template is 'x'; expected one of mezo"),
        ({"options": ["--examples", "0"]}, "examples is 0"),
        ({"options": ["--out", "x.txt"]}, "out is 'x.txt'; expected a name that ends in .json"),
        ({"options": ["--max-length", "20"]}, "have more than 20 tokens"),
        ({"options": ["--generated"]}, "the task sst2 has no generated answers"),
        ({"options": ["--generated"], "model": "classifier"}, "generated is True and the model is"),
        ({"options": ["--max-length", "0"]}, "max_length is 0"),
        ({"options": ["--harness", "none", "--data", "none"], "task": None}, "nyscaled[eval]"),
        ({"options": ["--harness", "x"]}, "task is 'sst2'; expected none with --harness"),
        (
            {"options": ["--harness", "x", "--generated"], "task": None},
            "generated is True; expected none with --harness",
        ),
        (
            {"options": ["--harness", "x", "--allow-cut", "0.5"], "task": None},
            "allow_cut is 0.5; expected none with --harness",
        ),
        (
            {"options": ["--harness", "x"], "model": "encoder", "task": None},
            "the model is an encoder; expected a",
        ),
    ],
)
def test_what_is_refused(options, message, files, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    options = dict(options)
    assert evaluate(files, *options.pop("options", ()), **options) != 0
    assert message in capsys.readouterr().err


def test_an_adapter_without_a_head_is_refused(files, tmp_path, capsys):
    model = nnx.clone(nys.models.load(files / "classifier")[0])
    nys.lora.apply(model, rank=2, targets=r".*query", key=jax.random.key(0))
    nys.lora.save_peft(model, tmp_path, base_model="base")
    assert evaluate(files, "--adapter", tmp_path, model="encoder") == 1
    assert "has no head; expected one that was trained for the task" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(files / "causal")]) == 1
    assert "data or task is missing; expected both, or --harness" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_lora_weights.safetensors", "an adapter of Stable Diffusion, pytorch_lora"),
        ("adapter/base.json", "has a run; expected its adapter, '"),
        ("config.json", "has a whole model, as full and linear-probe write it; expected it as"),
    ],
)
def test_folders_of_other_things_are_refused(command, name, message, files, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / name).touch()
    words = ["--model", str(files / "causal"), "--adapter", str(tmp_path)]
    words += {"evaluate": ["--task", "sst2", "--data", str(files / "data")]}.get(
        command, ["--out", str(tmp_path / "out")]
    )
    assert main([command, *words]) == 1
    assert message in capsys.readouterr().err


def test_memory_that_is_too_small_is_said(files, capsys, monkeypatch):
    def refusing(*args, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("nyscaled.cli.evaluate.evaluate", refusing)
    assert evaluate(files) == 1
    assert "memory is too small: RESOURCE_EXHAUSTED: Out of memory" in capsys.readouterr().err
