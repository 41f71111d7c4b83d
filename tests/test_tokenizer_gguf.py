"""Tokenizers of GGUF metadata, whose tokens and pieces are those of their sources."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, pre_tokenizers

from nyscaled.models.tokenizers import gguf
from nyscaled.models.tokenizers.gguf import gguf_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
MESSAGES = [{"role": "user", "content": "hi"}]


def metadata(**changes):
    """A byte-level vocabulary: every byte, some merges, control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["l o", "lo w", "Ġ low", "1 2", "Ġ Ġ"]
    tokens = [*letters, *(m.replace(" ", "") for m in merges), "Ġlower", "<end>", "<think>"]
    found = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": merges,
        "token_type": [1] * (len(tokens) - 2) + [3, 4],
        "eos_token_id": len(tokens) - 2,
        **changes,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in found.items() if v is not None}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ĠĠ", "Ġlow", "'s", "Ġ12345", "ĊĊĠ", "Ġ-=", "ĠX"]),
        ("smollm", ["ĠĠ", "Ġlow", "'s", "Ġ", *"12345", "ĊĊĠ", "Ġ-=", "ĠX"]),
        ("llama-bpe", ["ĠĠ", "Ġlow", "'s", "Ġ", "123", "45", "ĊĊ", "Ġ", "Ġ-=", "ĠX"]),
        ("qwen2", ["ĠĠ", "Ġlow", "'s", "Ġ", *"12345", "ĊĊ", "Ġ", "Ġ-=", "ĠX"]),
        ("smaug-bpe", ["ĠĠ", "Ġlow", "'s", "Ġ", "123", "45", "ĊĊ", "Ġ", "Ġ-=", "ĠX"]),
    ],
)
def test_how_text_is_split_before_it_is_merged(pre, pieces):
    tokenizer = gguf_tokenizer(metadata(pre=pre, bos_token_id=0))
    text = "   low's 12345\n\n  -= X"
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_byte_level_vocabularies():
    tokenizer = gguf_tokenizer(metadata())
    got = tokenizer.encode(" lower 12<end><think>é")
    assert got.tokens == ["Ġlow", *"erĠ12", "<end>", "<think>", "Ã", "©"]
    assert tokenizer.pad_id == tokenizer.token_to_id("<end>")
    assert tokenizer.decode(got.ids) == " lower 12<think>é"  # control tokens are left out
    whole = gguf_tokenizer(metadata(pre="llama-bpe", bos_token_id=0))
    # Llama 3 takes words that are tokens whole, and begins a text with its own token.
    assert whole.encode(" lower").ids == [0, whole.token_to_id("Ġlower")]
    without = gguf_tokenizer(metadata(pre="llama-bpe", bos_token_id=0, add_bos_token=False))
    assert without.encode(" lower").tokens == ["Ġlower"]
    both = gguf_tokenizer(metadata(bos_token_id=0, add_bos_token=True, add_eos_token=True))
    _, _, types = both.pairs(["low"], ["l"])
    assert both.encode("low", "l").tokens == ["!", "low", "<end>", "!", "l", "<end>"]
    np.testing.assert_array_equal(types, [[0, 0, 0, 1, 1, 1]])


def test_chat_templates_of_metadata():
    one = {"tokenizer.chat_template": "{{ eos_token }}"}
    assert gguf_tokenizer(metadata() | one).chat(MESSAGES) == "<end>"
    several = gguf_tokenizer(metadata() | one | {"tokenizer.chat_template.tool_use": "two"})
    assert several.chat(MESSAGES, template="tool_use") == "two"
    assert several.chat(MESSAGES) == "<end>"
    with pytest.raises(ValueError, match="chat_template is 5; expected a text"):
        gguf_tokenizer(metadata() | {"tokenizer.chat_template": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "the tokenizer is 't5'; expected 'gpt2' or 'llama'"),
        ({"pre": "tekken"}, "pre is 'tekken'; expected one of gpt-2, smollm, llama-bpe"),
        ({"pre": None}, r"lacks tokenizer\.ggml\.pre"),
        ({"merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({"merges": ["l q q"]}, "merges are not of these tokens|a merge is"),
        ({"merges": ["q q"]}, "merges are not of these tokens|a merge is"),
        ({"tokens": ["a", "a"]}, "has a token twice"),
        ({"model": "llama"}, r"lacks tokenizer\.ggml\.scores"),
        ({"eos_token_id": 10**6}, r"eos_token_id is 1000000; expected an integer from 0 to 2\d\d"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"bos_token_id": "0"}, "bos_token_id is '0'"),
        ({"padding_token_id": [0]}, r"padding_token_id is \[0\]"),
        ({"unknown_token_id": 1.0}, r"unknown_token_id is 1\.0"),
        ({"tokens": [1, 2]}, r"tokens is \[1, 2\]; expected texts"),
        ({"tokens": "ab"}, "tokens is 'ab'; expected texts"),
        ({"merges": [1]}, r"merges is \[1\]; expected texts"),
        ({"token_type": 5}, "metadata is not sound"),
        ({"pre": ["smollm"]}, "metadata is not sound"),
        ({"add_bos_token": True}, r"lacks tokenizer\.ggml\.bos_token_id"),
        ({"token_type": [1]}, r"token_type has 1 entries for \d+ tokens"),
    ],
)
def test_vocabularies_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer(metadata(**changes))


def test_files_without_a_vocabulary_have_no_tokenizer():
    assert gguf_tokenizer({"general.architecture": "llama"}) is None


CASES = json.loads((FIXTURES / "sentencepiece.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=["prefix", "bare"])
def test_tokens_are_those_of_sentencepiece(case):
    """`tests/fixtures/make_sentencepiece.py`; bytes stand for what the vocabulary lacks."""
    roles = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    found = {"model": "llama", **case, **roles}
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in found.items()})
    for text, ids in case["texts"].items():
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.encode("a").ids[0] == 1  # begins with <s>, as nothing says otherwise
    assert len(case["texts"]) == 8


def test_spaces_of_a_vocabulary_that_the_user_defined():
    """Gemma's: runs of spaces are tokens, which the file has as spaces."""
    case = CASES[1]
    spaces = ["  ", "   "]
    found = {"model": "llama", "unknown_token_id": 0, "bos_token_id": 1, **case}
    found["tokens"] = [*case["tokens"], *spaces]
    found["scores"] = [*case["scores"], -1000.0, -1000.0]
    found["token_type"] = [*case["token_type"], 4, 4]
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in found.items()})
    got = tokenizer.encode("a   b  a")
    assert got.tokens == ["<s>", "a", "   ", "b", "  ", "a"]
    assert tokenizer.decode(got.ids) == "a   b  a"
    assert tokenizer.inner.get_added_tokens_decoder()[len(case["tokens"])] == AddedToken(
        "  ", normalized=False
    )


def test_long_tokens_take_no_longer_than_short_ones():
    """Only cuts into tokens are looked at: all cuts of one of a million characters took minutes."""
    case, start = CASES[1], time.process_time()
    found = {"model": "llama", "unknown_token_id": 0, "bos_token_id": 1, **case}
    found["tokens"] = [*case["tokens"], "a" * 10**6, "a" * (10**6 - 1)]
    found["scores"] = [*case["scores"], -1000.0, -1001.0]
    found["token_type"] = [*case["token_type"], 1, 1]
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in found.items()})
    assert time.process_time() - start < 5
    assert (
        tokenizer.encode("a").ids
        == gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in (found | case).items()})
        .encode("a")
        .ids
    )


def test_tokens_that_are_made_of_one_another_have_a_limit(monkeypatch):
    monkeypatch.setattr(gguf, "_MAX_MERGES", 10_000)
    tokens = ["<unk>", *("a" * length for length in range(1, 60))]
    found = {"model": "llama", "tokens": tokens, "scores": [0.0] * 60, "token_type": [1] * 60}
    with pytest.raises(ValueError, match="pairs of more than 10000 characters"):
        gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in found.items()})
    found["scores"] = [float("nan")] * 60
    with pytest.raises(ValueError, match="scores has NaN"):
        gguf_tokenizer({f"tokenizer.ggml.{k}": v for k, v in found.items()})
