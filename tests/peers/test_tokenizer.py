"""Batches, pairs and chats against transformers' tokenizers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every tokenizer here is a file

import json
import typing
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

import test_chat  # noqa: E402
import tokenizers  # noqa: E402

from nyscaled.models import Tokenizer  # noqa: E402
from nyscaled.models.tokenizers.files import open_tokenizer  # noqa: E402
from nyscaled.models.tokenizers.gguf import gguf_tokenizer  # noqa: E402
from nyscaled.models.tokenizers.tools import tool_schema  # noqa: E402

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
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}\n    "
    "{% set ns.n = ns.n + 1 %}"
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
            expected = theirs(TEXTS, max_length=length, padding_side=side, **options)
            tokens, mask = ours(TEXTS, max_length=length, side=side)
            np.testing.assert_array_equal(tokens, expected["input_ids"])
            np.testing.assert_array_equal(mask, expected["attention_mask"])
        expected = theirs(TEXTS, TEXTS[::-1], max_length=length, **options)
        names = ("input_ids", "attention_mask", "token_type_ids")
        for got, name in zip(ours.pairs(TEXTS, TEXTS[::-1], max_length=length), names, strict=True):
            np.testing.assert_array_equal(got, expected[name])


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
    expected = theirs(texts, padding_side="left", **options)
    tokens, mask = ours(texts)
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    for row in tokens:
        for skip in (True, False):
            got = ours.decode(list(row), skip_special_tokens=skip)
            assert got == theirs.decode(row, skip_special_tokens=skip)
    expected = theirs(texts, texts[::-1], padding_side="right", **options)
    np.testing.assert_array_equal(ours.pairs(texts, texts[::-1])[0], expected["input_ids"])
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
    for options in (
        {},
        {"add_generation_prompt": True},
        {"tools": [{"name": "é<>"}]},
        {"tools": [test_chat.search]},
        {"documents": [{"title": "a", "text": "b"}], "enable_thinking": True},
    ):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert ours.chat(MESSAGES, **options) == expected
        assert expected


@pytest.mark.parametrize("template", [*TEMPLATES[:3], test_chat.TURNS, test_chat.PARTS])
def test_messages_that_go_on(template):
    """Each final message, of texts with spaces at both ends, parts and reasoning."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.add_special_tokens(["<s>", "</s>"])
    template += "{% if messages[-1].thinking is defined %}[{{ messages[-1].thinking }}]{% endif %}"
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    theirs.chat_template = template
    ours = Tokenizer(inner, special | {"chat_template": template})
    finals = ["yes", " yes ", "yes\n", [{"text": "a "}, {"text": "b"}], ""]
    cases = [({"content": final}, True) for final in finals]
    cases += [({"content": "x", "thinking": "so "}, field) for field in ("thinking", "reasoning")]
    cases += [({"content": "x", "reasoning": "so"}, "reasoning"), ({"content": "x"}, "nothing")]
    outcomes = []
    for final, field in cases:
        talk = [*MESSAGES[:2], {"role": "assistant", **final}]
        try:
            expected = theirs.apply_chat_template(
                talk, tokenize=False, continue_final_message=field
            )
        except (ValueError, TypeError):
            with pytest.raises(ValueError, match=r"message|template"):
                ours.chat(talk, continue_final_message=field)
            outcomes.append(False)
        else:
            assert ours.chat(talk, continue_final_message=field) == expected, (final, field)
            outcomes.append(True)
    assert set(outcomes) == {True, False}


class Tools:
    """Methods, and functions of many types."""

    def method(self, x: float, y: bool = True) -> dict:
        """
        A method.
        Args:
            x: one
            y (bool): not found by that name
              y: nor so
        """

    def described(self, x: float, y: bool = True) -> dict:
        """
        A method, with a list: of things.

        Args:
            x:
                on the next line
                  and deeper: than that

            y: two  (Choices: ["a ", "b"])
        Raises:
            ValueError: never
        """

    @staticmethod
    def types(
        a: list,
        b: tuple,
        c: dict,
        d: tuple[int, str],
        e: dict[str, list[int]],
        f: int | str,
        g: list | tuple | None,
        h: typing.Optional[list[int]],  # noqa: UP045
        i: typing.Literal["x", 1, None],
        j: typing.Union[int, list[str], None],  # noqa: UP007
        k: None,
    ) -> np.ndarray:
        """Many.

        Args:
            a: a
            b: b
            c: c
            d: d
            e: e
            f: f
            g: g
            h: h
            i: i
            j: j
            k: k

        Returns:
            An array: of things
            in two lines.
        """

    @staticmethod
    def ellipsis(x: tuple[int, ...]):
        """One.

        Args:
            x: many
        """

    @staticmethod
    def nothing() -> int:
        """No arguments."""

    @staticmethod
    def silent(x: int):
        pass


@pytest.mark.parametrize(
    "tool",
    [test_chat.search, test_chat.bare, test_chat.undescribed, test_chat.strange]
    + [getattr(Tools(), name) for name in vars(Tools) if not name.startswith("_")],
    ids=lambda tool: tool.__name__,
)
def test_schemas_of_functions(tool):
    try:
        expected = transformers.utils.get_json_schema(tool)
    except Exception:  # of several classes
        with pytest.raises(ValueError, match=f"the tool {tool.__name__} has no schema"):
            tool_schema(tool)
    else:
        assert json.dumps(tool_schema(tool)) == json.dumps(expected)


def test_the_vocabulary_of_a_gguf_file_of_qwen():
    """Against the tokenizer that transformers makes of the same tokens and merges."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["l o", "lo w", "Ġ low", "1 2", "Ġ Ġ", "Ã ©"]
    tokens = [*letters, *(m.replace(" ", "") for m in merges), "<|endoftext|>", "<|im_end|>"]
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "merges": merges,
        "token_type": [1] * (len(tokens) - 2) + [3, 3],
        "eos_token_id": len(tokens) - 1,
    }
    ours = gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        eos_token="<|im_end|>",
    )
    for text in ("   low's 12345\n\n  -= X", "caf\u00e9 cafe\u0301<|im_end|>\n", "LOW'LL  \t1"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
