"""Tokenizers of a few kinds, and rows, for tests of fine-tuning."""

import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from nyscaled.finetune.records import Row
from nyscaled.models import Tokenizer

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("NYSCALED_DATA") or ROOT.parent / "shared" / "data")
without_data = pytest.mark.skipif(
    not DATA.exists(), reason="NYSCALED_DATA names no folder of data sets"
)

CHAT = (
    "{% for m in messages %}<m>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<m>assistant\n{% endif %}"
)


def row(**fields):
    return Row(fields, "data.jsonl:7")


def characters(begins=True, pad=None, chat=CHAT):
    """A token per byte, as GPT-2 spells it, with merges for words that begin with a space.

    Args:
        begins: whether a token begins each text.
        pad: the token to pad with.
        chat: the chat template.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<m>": 2, **{c: i for i, c in enumerate(alphabet, 3)}}
    merges = [("Ġ", "g"), ("Ġg", "r"), ("Y", "e"), ("Ye", "s"), ("N", "o")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<m>"])
    if begins:
        inner.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat}
    return Tokenizer(inner, settings if pad is None else settings | {"pad_token": pad})


def pieces():
    """A token per character, as LLaMA 2 spells it: a space is put before each text."""
    letters = (
        "\n▁ .?!,'\"0123456789"
        + "".join(map(chr, range(65, 91)))
        + "".join(map(chr, range(97, 123)))
    )
    vocabulary = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(letters)])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(inner, {"bos_token": "<s>", "eos_token": "</s>"})


def words():
    """A token per word, with types, as BERT has it."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
    inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    inner.add_special_tokens(names[:3])
    return Tokenizer(inner, {"pad_token": "[PAD]"})
