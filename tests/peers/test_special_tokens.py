"""Tokens and settings beside `tokenizer.json` against transformers, also after a save."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every tokenizer here is a file

import random
import shutil

import pytest

transformers = pytest.importorskip("transformers")

from tokenizer_cases import byte_level, sentence_piece, token, word_piece, written  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from nyscaled.models.tokenizers.files import open_tokenizer  # noqa: E402
from nyscaled.models.tokenizers.gguf import byte_level as split_bytes  # noqa: E402

TEXTS = [
    "hello cafe",
    "Hello <|user|>hello  [PAD] x",
    "a<x>b <x> b",
    "café 中文 Café",
    "<end><s> he</s>he hello",
    " hello",
    "he sp lo",
]
TOKENS = ["<|user|>", "[PAD]", "<end>", "<x>", "he", "<s>", " sp ", "Hello", "[CLS]"]
ROLES = [f"{role}_token" for role in ("bos", "eos", "sep", "pad", "cls", "mask", "image")]
FLAGS = "lstrip", "rstrip", "normalized", "single_word"
CLASSES = {
    byte_level: ["PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", None],
    word_piece: ["BertTokenizer", "ElectraTokenizerFast", "PreTrainedTokenizerFast", None],
    sentence_piece: ["PreTrainedTokenizerFast", "TokenizersBackend", None],
}
SETTINGS = {
    "do_lower_case": 0.3,
    "strip_accents": 0.3,
    "tokenize_chinese_chars": 0.3,
    "add_prefix_space": 0.3,
    "add_bos_token": 0.3,
    "add_eos_token": 0.3,
}


class Cases(random.Random):
    """Tokenizers and what stands beside them."""

    def chance(self, p):
        return self.random() < p

    def added(self, **more):
        flags = {flag: self.chance(0.3) for flag in FLAGS}
        if self.chance(0.6):
            flags["special"] = self.chance(0.6)
        return {"content": self.choice(TOKENS), **flags, **more}

    def token(self):
        return self.choice(TOKENS) if self.chance(0.5) else self.added(__type="AddedToken")

    def several(self, count):
        return [self.token() for _ in range(self.randint(0, count))]

    def folder(self, path):
        make = self.choice(list(CLASSES))
        inner = make()
        if make is word_piece and self.chance(0.5):
            inner.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
        if make is not word_piece and self.chance(0.3):
            inner.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
        if self.chance(0.2):
            inner.enable_padding(pad_token="<end>", direction=self.choice(["left", "right"]))
        settings = {role: self.token() for role in ROLES if self.chance(0.2)}
        settings |= {k: self.chance(0.5) for k, p in SETTINGS.items() if self.chance(p)}
        name = self.choice(CLASSES[make])
        if name is not None:
            settings["tokenizer_class"] = name
        if self.chance(0.4):
            settings["additional_special_tokens"] = self.several(3)
        if self.chance(0.2):
            settings["extra_special_tokens"] = {"foo_token": "<foo>", "bar": "<x>"}
        elif self.chance(0.2):
            settings["extra_special_tokens"] = self.several(2)
        others = {}
        if self.chance(0.3):
            decoder = {str(self.choice([5, 17, 270, 301])): self.added() for _ in range(2)}
            settings["added_tokens_decoder"] = decoder
        elif self.chance(0.2):
            settings["split_special_tokens"] = self.chance(0.5)
        if self.chance(0.3):
            values = [self.choice([self.choice(TOKENS), self.added()]) for _ in range(2)]
            special = dict(zip(self.sample(ROLES[:4], 2), values, strict=True))
            others["special_tokens_map"] = special
            if self.chance(0.3):
                special["additional_special_tokens"] = [self.choice(TOKENS)]
        if self.chance(0.2):
            others["added_tokens"] = {t: 290 + i for i, t in enumerate(self.sample(TOKENS, 2))}
        if self.chance(0.2):
            settings["model_specific_special_tokens"] = {"image_token": self.choice(TOKENS)}
        model = "bert" if make is word_piece else "llama"
        return written(path, inner, settings, model, **others)


@pytest.mark.parametrize("block", range(6))
def test_ids_are_those_of_transformers(block, tmp_path):
    refused = 0
    for seed in range(20 * block, 20 * block + 20):
        folder = Cases(seed).folder(tmp_path / str(seed))
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
        except ValueError:  # tokens with spaces at their ends, around a text
            refused += 1
            continue
        ours = open_tokenizer(folder)
        ours.save(tmp_path / "saved")
        shutil.copy(folder / "config.json", tmp_path / "saved")
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        for text in TEXTS:
            expected = theirs(text)["input_ids"]
            assert ours.encode(text).ids == expected, (seed, text)
            assert again(text)["input_ids"] == expected, (seed, text)
            skipped = theirs.decode(expected, skip_special_tokens=True)
            assert ours.decode(expected) == skipped, (seed, text)
        if theirs.pad_token_id is not None:
            assert ours.pad_id == theirs.pad_token_id, seed
            batch = theirs(TEXTS, padding=True, return_tensors="np")
            assert (ours(TEXTS, side=theirs.padding_side)[0] == batch["input_ids"]).all(), seed
    assert refused < 4


@pytest.mark.parametrize("prefix", [None, True, False])
def test_spaces_of_llama(prefix, tmp_path):
    """In texts without special tokens: transformers 5 has no space after those."""
    settings = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": prefix}
    settings["additional_special_tokens"] = [token("<x>")]
    inner = sentence_piece()
    folder = written(tmp_path, inner, settings)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    for text in ("he", "he he", "hehe", "h e"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("<x>").ids[-1] == theirs("<x>")["input_ids"][-1] == 8


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", None])
def test_tokenizers_of_qwen(name, tmp_path, recwarn):
    """As its folders have them: tokens with their ids in the settings, and no first token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "he", "12"])}
    inner = split_bytes(vocabulary, ["h e", "1 2"], "qwen2")
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.add_special_tokens(ends)
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(inner.token_to_id(end)): {
                "content": end,
                **dict.fromkeys(FLAGS, False),
                "special": True,
            }
            for end in ends
        },
        "additional_special_tokens": ends[1:],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    settings |= {"tokenizer_class": name} if name else {}
    folder = written(tmp_path, inner, settings, "qwen2")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    assert not [w for w in recwarn if "tokenizer of the class" in str(w.message)]
    for text in ("he 1234's", "<|im_start|>user\nhe<|im_end|>\n", "cafe\u0301  \n\n he"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.pad_id, ours.padding_side) == (theirs.pad_token_id, "left")


def test_templates_by_name(tmp_path):
    """As transformers writes them, and as they are written here."""
    settings = {"chat_template": "none"}
    theirs = transformers.AutoTokenizer.from_pretrained(
        written(tmp_path / "a", byte_level(), settings)
    )
    theirs.chat_template = {"default": "one", "tool_use": "two", "rag": "three"}
    theirs.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "additional_chat_templates" / "rag.jinja").is_file()
    ours = open_tokenizer(tmp_path / "b")
    ours.save(tmp_path / "b")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    messages = [{"role": "user", "content": "hi"}]
    for options in ({}, {"tools": [{}]}):
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.chat(messages, **options) == expected
        assert again.apply_chat_template(messages, tokenize=False, **options) == expected
    for name in ("default", "tool_use", "rag"):
        expected = theirs.apply_chat_template(messages, tokenize=False, chat_template=name)
        assert ours.chat(messages, template=name) == expected
        assert again.get_chat_template(name) == expected
