"""Tokenizers on which the library fails, or that would end the process, are refused."""

import base64
import json
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models

from nyscaled.models import Tokenizer
from nyscaled.models.tokenizers.files import open_tokenizer


def charsmap(size, content=b""):
    data = size.to_bytes(4, "little") + content
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(special):
    piece = {"SpecialToken": {"id": "[X]", "type_id": 0}}
    pieces = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 2**31}}],
        "special_tokens": special,
    }


X = {"[X]": {"id": "[X]", "ids": [0], "tokens": ["[X]"]}}
BPE = {"type": "BPE", "vocab": {"ab": 0, "a": 1, "b": 2}, "merges": [["a", "b"]]}
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TWICE = template(X)
MANY = template({"[X]": {"id": "[X]", "ids": [0] * 2**11, "tokens": ["[X]"] * 2**11}})
MANY["single"] *= 2**10
SEQUENCE = {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalizer": charsmap(2**32 - 1)}, "announces 4294967295 bytes and has 0"),
        ({"normalizer": charsmap(100, b"abc")}, "announces 100 bytes and has 3"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [charsmap(9)]}},
            "announces 9 bytes and has 0",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "announces 0 bytes"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "announces"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "not in base64"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": 5}}, "refuses it"),
        ({"normalizer": charsmap(0)}, "fails on texts|not a sound tokenizer"),
        ({"normalizer": SEQUENCE}, r"make texts 1\.1e\+12 times as long"),
        ({"normalizer": replace({"Regex": ""}, "x" * 2**21)}, "times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 2**21}}, "times as long"),
        ({"normalizer": charsmap(0, b"x" * 2**21)}, "times as long"),
        ({"normalizer": SEQUENCE | {"normalizers": [LEVEL] * 40}}, "times as long"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LEVEL] * 40}}, "times as long"),
        ({"post_processor": {"type": "Sequence", "processors": [TWICE] * 40}}, "times as long"),
        ({"post_processor": MANY}, "times as long"),
        ({"model": BPE | {"continuing_subword_prefix": "####"}}, "refuses it: PanicException"),
        ({"model": WORDS | {"unk_token": "[UNK]"}}, "fails on texts: .*UNK"),
        ({"model": WORDS | {"vocab": {"a": 2**31}}}, "has the id 2147483648; expected at most"),
        ({"post_processor": template({})}, "fails on texts|refuses it"),
        ({"post_processor": template(X)}, "has the id 2147483648; expected at most"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "fails on texts|refuses it"),
        ({"model": 5}, "refuses it"),
    ],
)
def test_tokenizers_that_are_refused(settings, message, tmp_path):
    document = json.loads(tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(document | settings))
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*({message})"):
        open_tokenizer(tmp_path)


def test_settings_twice_are_refused(tmp_path):
    text = tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str()
    (tmp_path / "tokenizer.json").write_text(text.replace('"a":0', '"a":0,"a":1'))
    with pytest.raises(ValueError, match="has the key 'a' twice"):
        open_tokenizer(tmp_path)


def test_what_the_library_raises_is_a_value_error(capfd):
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="the tokenizer's decode fails: OverflowError"):
        tokenizer.decode([2**40])
    with pytest.raises(ValueError, match="the tokenizer's encode fails: TypeError"):
        tokenizer.encode(5)
    # A part that is put in after the tokenizer was looked at.
    tokenizer.inner.pre_tokenizer = tokenizers.pre_tokenizers.FixedLength(0)
    with pytest.raises(ValueError, match="the tokenizer's encode_batch fails: PanicException"):
        tokenizer(["a"])
    with pytest.raises(AttributeError):
        _ = tokenizer.nothing
    capfd.readouterr()


RELEASED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, -1))
from nyscaled.models.tokenizers.files import open_tokenizer
try:
    open_tokenizer(sys.argv[1])
except ValueError as error:
    print("refused", error)
"""


@pytest.mark.long
def test_a_map_that_announces_gigabytes_does_not_end_the_process(tmp_path):
    pytest.importorskip("resource")
    document = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document | {"normalizer": normalizer}))
    command = [sys.executable, "-c", RELEASED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.startswith("refused"), (run.returncode, run.stderr)
