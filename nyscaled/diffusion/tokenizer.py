"""The tokenizer of CLIP, and texts as rows of tokens of one length."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int

from nyscaled.checkpoints import files
from nyscaled.models.tokenizers.files import open_tokenizer
from nyscaled.models.tokenizers.soundness import refusing
from nyscaled.models.tokenizers.special_tokens import read_settings
from nyscaled.models.tokenizers.tokenizer import FILE, Tokenizer

VOCABULARY, MERGES = "vocab.json", "merges.txt"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
# Endings of English words, words, single digits, and runs of other signs.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def open_clip_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a folder.

    It is read from `tokenizer.json`, else from `vocab.json` and `merges.txt`.

    Args:
        folder: path of the folder.

    Raises:
        ValueError: on a missing or broken file.
    """
    if files.exists(folder / FILE):
        tokenizer = open_tokenizer(folder)
        assert tokenizer is not None
        if not isinstance(tokenizer.inner.model, tokenizers.models.BPE):
            kind = type(tokenizer.inner.model).__name__
            raise ValueError(f"{folder / FILE} has a {kind}; expected BPE, the model of CLIP")
        return tokenizer
    vocabulary = files.read_object(folder / VOCABULARY, f"a tokenizer: {FILE}, or {VOCABULARY}")
    lines = files.read_text(folder / MERGES).split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    lost = [token for token in (BEGIN, END) if token not in vocabulary]
    if lost or not all(len(merge) == 2 for merge in merges):
        what = f"no token {lost[0]}" if lost else "merges that are not pairs"
        raise ValueError(f"{folder} has {what}; expected the vocabulary of CLIP")
    with refusing(f"{folder}: the package tokenizers refuses the vocabulary"):
        inner = _clip(vocabulary, merges)
    return Tokenizer(
        inner, {"tokenizer_class": "CLIPTokenizer", **SPECIAL, **read_settings(folder)}
    )


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> tokenizers.Tokenizer:
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, unk_token=END, end_of_word_suffix=WORD_END
    )
    inner = tokenizers.Tokenizer(model)
    space = tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), space, tokenizers.normalizers.Lowercase()]
    )
    pieces = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "removed", invert=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([pieces, byte_level])
    inner.decoder = tokenizers.decoders.ByteLevel()
    ends = ((END, vocabulary[END]), (BEGIN, vocabulary[BEGIN]))
    inner.post_processor = tokenizers.processors.RobertaProcessing(
        *ends, trim_offsets=False, add_prefix_space=False
    )
    inner.add_special_tokens([BEGIN, END])
    return inner


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str | None]:
    """Return the texts of a tokenizer's files, also in the form that transformers 4 reads.

    Args:
        tokenizer: the tokenizer.
    """
    model = json.loads(tokenizer.to_str())["model"]
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    return {
        **tokenizer.files(),
        VOCABULARY: json.dumps(model["vocab"], ensure_ascii=False),
        MERGES: "\n".join(["#version: 0.2", *merges, ""]),
    }


def text_tokens(
    tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> Int[np.ndarray, "batch length"]:
    """Return the tokens of texts, with padding after them up to one length.

    Where a text is too long its end is cut off, and there is a warning.

    Args:
        tokenizer: the tokenizer of a pipeline.
        texts: a text per row.
        length: number of tokens per row, 77 in Stable Diffusion.

    Raises:
        ValueError: on anything but texts.
    """
    tokens, _ = tokenizer(texts, side="right", max_length=length, multiple_of=length)
    for text, encoding in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        if len(encoding.ids) > length:
            lost = text[encoding.offsets[length - 1][0] :].strip()
            warnings.warn(
                f"a text has {len(encoding.ids)} tokens, and the model reads {length}: it does not "
                f"see {files.brief(repr(lost))}",
                stacklevel=3,
            )
    return tokens
