"""Tiny tokenizers, and folders with settings beside them."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "hello",
    "cafe",
    "café",
    "Hello",
    "Cafe",
    "中",
    "中文",
    "<s>",
]


def byte_level(prefix=False):
    """One token a byte, `he`, and two special tokens: 259 in all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<end>", "<s>", *letters, "he"]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("h", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>", "<s>"])
    return inner


def word_piece(**options):
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(**options)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return inner


def sentence_piece():
    """As early conversions have it: a text begins with a space."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "h", "e", "he", "▁he"]
    merges = [("h", "e"), ("▁", "he")]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, **options))
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(parts)
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


def written(folder, inner, settings, model_type="llama", **others):
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    others = {"tokenizer_config": settings, "config": {"model_type": model_type}, **others}
    for name, value in others.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def token(content, **flags):
    return {"__type": "AddedToken", "content": content, **flags}
