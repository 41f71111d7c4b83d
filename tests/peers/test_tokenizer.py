"""Batches, pairs and chats against transformers' tokenizers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every tokenizer here is a file

import json
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402

from nyscaled.models import Tokenizer  # noqa: E402
from nyscaled.models.tokenizer_files import open_tokenizer  # noqa: E402

MINILM = Path(__file__).parents[2] / "build" / "weights" / "all-MiniLM-L6-v2"
TEXTS = [
    "A matrix of low rank",
    "naïve café 中文 🤖",
    "",
    "one two three four five six seven eight",
]
MESSAGES = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "<é> & 'x'\n"},
    {"role": "assistant", "content": "yes"},
]
# As models have them: ChatML, LLaMA 2's checks, Llama 3's trimming, JSON of tools.
TEMPLATES = [
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>' }}\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}",
    "{%- if messages[0].role == 'system' -%}{%- set sys = messages[0].content | trim -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}{%- for m in messages -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('order') }}"
    "{%- endif -%}  [{{ loop.first and sys or '' }}|{{ m.content }}]  {%- endfor -%}",
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}{% if ns.n > 2 %}{% break %}{% endif %}\n    {% generation %}{{ m | tojson }}"
    "{% endgeneration %}\n{% endfor %}",
    "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% else %}{{ documents is defined }}"
    "{% endif %}{{ unk_token is defined }}",
]


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"no {MINILM.name}: `make weights` fetches it")
def test_batches_and_pairs():
    ours, theirs = open_tokenizer(MINILM), transformers.AutoTokenizer.from_pretrained(MINILM)
    options = {"padding": True, "truncation": True, "return_tensors": "np"}
    for length in (*range(3, 14), 64):
        for side in ("left", "right"):
            wanted = theirs(TEXTS, max_length=length, padding_side=side, **options)
            tokens, mask = ours(TEXTS, max_length=length, side=side)
            np.testing.assert_array_equal(tokens, wanted["input_ids"])
            np.testing.assert_array_equal(mask, wanted["attention_mask"])
        wanted = theirs(TEXTS, TEXTS[::-1], max_length=length, **options)
        names = ("input_ids", "attention_mask", "token_type_ids")
        for got, name in zip(ours.pairs(TEXTS, TEXTS[::-1], max_length=length), names, strict=True):
            np.testing.assert_array_equal(got, wanted[name])


@pytest.mark.parametrize("prefix", [False, True])
def test_a_vocabulary_with_merges_as_opt_has(prefix, tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    inner.train_from_iterator(readme.splitlines(), trainer)
    inner.model.save(str(tmp_path))
    end = {"content": "</s>", "single_word": False, "lstrip": False, "rstrip": False}
    end |= {"normalized": True, "__type": "AddedToken"}
    settings = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    settings |= {"pad_token": end | {"content": "<pad>"}, "add_bos_token": True}
    settings |= {"add_prefix_space": prefix, "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = open_tokenizer(tmp_path)
    texts = [*TEXTS, *readme.splitlines(), "a</s> <pad>b <s>"]
    options = {"padding": True, "return_tensors": "np"}
    wanted = theirs(texts, padding_side="left", **options)
    tokens, mask = ours(texts)
    np.testing.assert_array_equal(tokens, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])
    for row in tokens:
        for skip in (True, False):
            got = ours.decode(list(row), skip_special_tokens=skip)
            assert got == theirs.decode(row, skip_special_tokens=skip)
    wanted = theirs(texts, texts[::-1], padding_side="right", **options)
    np.testing.assert_array_equal(ours.pairs(texts, texts[::-1])[0], wanted["input_ids"])
    # Once saved it has a tokenizer.json, and is the same to transformers.
    ours.save(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(texts)["input_ids"] == theirs(texts)["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats(template):
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.add_special_tokens(["<s>", "</s>"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    ours = Tokenizer(inner, special)
    for options in ({}, {"add_generation_prompt": True}, {"tools": [{"name": "é<>"}]}):
        wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert ours.chat(MESSAGES, **options) == wanted
        assert wanted
