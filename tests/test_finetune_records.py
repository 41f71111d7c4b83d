"""Rows of data files, their splits, and what is refused with file and line."""

import json
import sys
import types

import pytest
from finetune_cases import DATA, without_data, words

from nyscaled.finetune.config import Config
from nyscaled.finetune.inputs import read_examples
from nyscaled.finetune.records import UnlabelledError, find_splits, read_rows, read_split
from nyscaled.finetune.tasks import by_name

SST2 = [("sentence", "label")]
RTE = [("sentence1", "sentence2", "label")]


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lists_have_the_line_of_each_row(tmp_path):
    objects = [{"a": "é\u2028x", "n": 1}, {"a": "[1, {}]"}, {"a": 'with "quotes"'}]
    for name in ("train.json", "train.jsonl"):
        rows = read_rows(written(tmp_path, name, "\n" + json.dumps(objects, indent=2)))
        assert [row.fields for row in rows] == objects
        assert [row.source for row in rows] == [f"{name}:3", f"{name}:7", f"{name}:10"]
    one_line = written(tmp_path, "dev.json", json.dumps(objects))
    assert [row.source for row in read_rows(one_line)] == ["dev.json:1"] * 3


def test_an_object_per_line(tmp_path):
    text = '{"a": "x\u2028y\x85z"}\r\n\n{"a": 2}\n'
    for name in ("train.jsonl", "train.json"):
        rows = read_rows(written(tmp_path, name, text))
        assert [row.source for row in rows] == [f"{name}:1", f"{name}:3"]
        assert rows[0].fields == {"a": "x\u2028y\x85z"}


def test_columns_with_and_without_a_header(tmp_path):
    """Quotes are characters as others, and a mark of the byte order is none of the text."""
    bare = written(tmp_path, "train.tsv", '\ufeff"a fine\u2028film\t1\n\nit\'s "dull"\t0\n')
    rows = read_rows(bare, SST2)
    assert [row.fields["sentence"] for row in rows] == ['"a fine\u2028film', 'it\'s "dull"']
    assert [row.source for row in rows] == ["train.tsv:1", "train.tsv:3"]
    headed = written(tmp_path, "dev.tsv", "index\tlabel\tsentence\n0\t1\ta b\n")
    (row,) = read_rows(headed, SST2)
    assert row.fields == {"index": "0", "label": "1", "sentence": "a b"}
    assert row.source == "dev.tsv:2"
    three = written(tmp_path, "test.tsv", "a\tb\tyes\n")
    (row,) = read_rows(three, [*SST2, ("sentence", "sentence2", "label")])
    assert row.fields["sentence2"] == "b"


@pytest.mark.parametrize(
    ("task", "header", "columns"),
    [
        ("classification", "text\tlabel", ["text", "label"]),
        ("classification", "label\ttext", ["label", "text"]),
        ("classification", "Sentence\tLabel ", ["sentence", "label"]),
        ("classification", "Label\tid\tsentence1", ["label", "id", "sentence1"]),
        ("classification", "sentence2\tTEXT\tlabel", ["sentence2", "text", "label"]),
        ("sst2", "LABEL\tSentence", ["label", "sentence"]),
        ("rte", "Index\tHypothesis\tPremise\tLabel", ["Index", "hypothesis", "premise", "label"]),
    ],
)
def test_headers_in_any_order_and_case(task, header, columns, tmp_path):
    cells = [str(i) for i in range(len(columns))]
    path = written(tmp_path, "train.tsv", header + "\n" + "\t".join(cells) + "\n")
    (row,) = read_rows(path, by_name(task).layouts)
    assert row.fields == dict(zip(columns, cells, strict=True))
    assert row.source == "train.tsv:2"


@pytest.mark.parametrize(
    ("task", "header"),
    [
        ("classification", "sentence2\tlabel"),
        ("classification", "review\tlabel"),
        ("classification", "label\tLabel"),
        ("classification", "Text\ttext\tlabel"),
        ("sst2", "text\tlabel"),
        ("rte", "sentence1\thypothesis\tlabel"),
    ],
)
def test_part_of_a_header_is_no_example(task, header, tmp_path):
    path = written(tmp_path, "train.tsv", f"\n{header}\n" + header.replace("e", "x"))
    with pytest.raises(
        ValueError, match=r"train.tsv:2 is \[.*, part of a header; expected the col"
    ):
        read_rows(path, by_name(task).layouts)


@pytest.mark.parametrize(
    ("task", "header"),
    [
        ("rte", "index\tsentence1\tsentence2"),
        ("sst2", "index\tsentence"),
        ("classification", "index\tsentence1\tsentence2"),
        ("classification", "Text\tgold"),
    ],
)
def test_files_without_labels(task, header, tmp_path):
    path = written(tmp_path, "test.tsv", header + "\n" + header.replace("e", "x"))
    with pytest.raises(
        UnlabelledError, match=r"test.tsv:1 has .* no labels; expected a column lab"
    ):
        read_rows(path, by_name(task).layouts)


def test_a_run_leaves_out_a_test_split_without_labels(tmp_path, capsys):
    """GLUE's test files are published so."""
    rows = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n"
    for name in ("train.tsv", "dev.tsv"):
        written(tmp_path, name, rows)
    bare = "index\tsentence1\tsentence2\n0\te\tf\n"
    written(tmp_path, "test.tsv", bare)
    config = Config(model="none", data=tmp_path, task="rte", out=tmp_path)
    found = read_examples(config, encoder=True, tokenizer=words())
    assert [len(part) for part in (found.train, found.validation, found.test)] == [2, 2, 0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "the test split is left out: test.tsv:1 has the columns index, sentence1"
    )
    written(tmp_path, "dev.tsv", bare)
    with pytest.raises(UnlabelledError, match=r"dev.tsv:1 has .* no labels"):
        read_examples(config, encoder=True, tokenizer=words())


def test_splits_by_the_names_of_files(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.json"):
        written(tmp_path, name, '{"a": "b"}')
    for name in ("README.md", "training.txt", "other.json", ".train.json"):
        written(tmp_path, name, "x")
    splits = find_splits(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 2, "dev": 1}
    assert len(read_split(tmp_path, "train")) == 2
    assert find_splits(tmp_path / "other.json") == {"train": (tmp_path / "other.json",)}
    assert list(find_splits(tmp_path / "validation.json")) == ["dev"]
    with pytest.raises(ValueError, match=r"has train, dev; expected a test split"):
        read_split(tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "train.jsonl:2 has the byte 0xe9, which is"),
        *(
            (
                "train.tsv",
                "\ufeffa\t1\n".encode(f"utf-16-{order}"),
                "train.tsv is in UTF-16, .* -f",
            )
            for order in ("le", "be")
        ),
        (
            "train.jsonl",
            '{"a": 1}\n{\n "a": 2\n}\n',
            "train.jsonl:2 begins an object .* over 3 lines",
        ),
        ("train.json", '{"data": [\n{"a": 2}\n]}', "train.json:1 begins an object .* over 3 lines"),
        ("train.jsonl", '{"a": 1}\n{"a": 2', r"train.jsonl:2 is not JSON: .* \(the file may be"),
        ("train.json", '[{"a": 1},\n {"a":\n  "x', "train.json:3 is not JSON: Unterminated"),
        ("train.json", '[{"a": 1},\n', "train.json:2 is not JSON: Expecting value"),
        ("train.json", '[{"a": 1}\n', "train.json:2 has the end of the file after a row"),
        ("train.json", '[{"a": 1}\n {"a": 2}]', r"train.json:2 has '\{' after a row"),
        ("train.json", '[{"a": 1}]\n\n[', "train.json:3 has '.' after the list; expected its end"),
        ("train.json", '[{"a": 1},\n 5]', "train.json:2 is 5; expected an object of fields"),
        ("train.json", "[]", "has no rows; expected one at least"),
        ("train.json", "", "has no rows"),
        ("train.jsonl", "5", "train.jsonl:1 is 5; expected an object"),
        ("train.tsv", "a b\t1\nc d\n", "train.tsv:2 has 1 columns; expected 2 between tabs"),
        ("train.tsv", "a\tb\tc\td\n", "train.tsv:1 has 4 columns, .*; expected the columns"),
        ("train.csv", "a,b", "ends in '.csv'; expected a file that ends in .json, .jsonl, .tsv"),
        ("train.jsonl", "[" * 100000, "cannot be read|not JSON"),
        ("train.jsonl", '{"a": ' + "1" * 5000 + "}", "train.jsonl:1 is not JSON that can be read"),
    ],
)
def test_files_that_are_refused(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_rows(written(tmp_path, name, content), SST2)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has nothing; expected train, dev or test files"):
        find_splits(tmp_path)
    with pytest.raises(ValueError, match="which does not exist; expected a file, a folder"):
        find_splits(tmp_path / "none")
    written(tmp_path, "train.tsv", "a\t1")
    written(tmp_path, "train.json", "[]")
    with pytest.raises(ValueError, match=r"train.json, train.tsv; expected the train split in one"):
        find_splits(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(tmp_path)


def test_fields_that_are_refused(tmp_path):
    path = written(tmp_path, "train.jsonl", '{"a": 5, "b": null, "c": "\\ud83d"}')
    (row,) = read_rows(path)
    assert row.value("b", "a") == 5
    for call, message in (
        (lambda: row.text("x", "b"), r"train.jsonl:1 has a, b \(null\), c; expected a field x or"),
        (lambda: row.text("a"), "train.jsonl:1: a is 5; expected a text"),
        (lambda: row.text("c"), "train.jsonl:1: c has half of a character"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_data_sets_of_the_package_datasets(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name, configuration):
        calls.append((name, configuration))
        if name == "owner/none":
            raise RuntimeError("no such data set")
        return {"train": [{"a": 1}, {"a": 2}], "validation": [{"a": 3}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = read_split("hf:owner/name:cb", "dev")
    assert [row.source for row in rows] == ["owner/name[validation]:1"]
    assert len(read_split("hf:owner/name", "train")) == 2
    assert calls == [("owner/name", "cb"), ("owner/name", None)]
    with pytest.raises(ValueError, match="has train, validation; expected a test split"):
        read_split("hf:owner/name", "test")
    with pytest.raises(ValueError, match="cannot be loaded: no such data set"):
        read_split("hf:owner/none", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_split("hf:owner/name", "train")


@without_data
def test_published_files():
    assert len(read_split(DATA / "glue/sst2", "test", SST2)) == 1821
    rte = read_split(DATA / "glue/rte", "dev", RTE)
    assert len(rte) == 277
    assert rte[0].source == "dev.tsv:2"
    rows = read_split(DATA / "commonsense/ARC-Easy", "test")
    assert len(rows) == 2376
    lines = (DATA / "commonsense/ARC-Easy/test.json").read_text().split("\n")
    number = int(rows[1000].source.split(":")[1])
    assert json.dumps(rows[1000].text("instruction")) in lines[number]
