"""Tiny random models and made-up sentences, for the quick forms of scripts that fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tokenizers
from flax import nnx
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import nyscaled as nys

NAMES = (
    *("[PAD]", "<s>", "</s>", "?", "It", "was", "terrible", "great", "good", "fine"),
    *("dull", "bad", "film", "plot", "scene", "end"),
)
SIZES: dict[str, Any] = {
    **{"vocab_size": 32, "hidden_size": 24, "intermediate_size": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 4},
}


def tokenizer(*, encoder: bool) -> nys.models.Tokenizer:
    """Return a tokenizer with a token per word.

    Args:
        encoder: whether a token ends each text.
    """
    inner = tokenizers.Tokenizer(WordLevel({name: i for i, name in enumerate(NAMES)}, "?"))
    inner.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>" if encoder else "<s> $A",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    inner.add_special_tokens(["[PAD]", "<s>", "</s>"])
    return nys.models.Tokenizer(
        inner, {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>"}
    )


def write_model(folder: Path, kind: Literal["bert", "llama"]) -> str:
    """Write a random model and its tokenizer, and return the folder's name.

    Args:
        folder: the folder to make.
        kind: an encoder, or a causal language model.
    """
    rngs = nnx.Rngs(jax.random.key(0))
    model: Any
    if kind == "bert":
        model = nys.models.Bert(nys.models.BertConfig(**SIZES), rngs=rngs)
    else:
        sizes = nys.models.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=6)
        model = nys.models.Llama(sizes, rngs=rngs)
    nys.models.save(model, folder, tokenizer(encoder=kind == "bert"))
    return str(folder)


def write_sentences(folder: Path, train: int = 40, others: int = 16) -> Path:
    """Write sentences in the format of SST-2, good if they have good words; return the folder.

    Args:
        folder: the folder to make.
        train: number of sentences to train on.
        others: number of those for validation, and of those to test.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("dev", others), ("test", others)):
        lines: list[str] = []
        for _ in range(count):
            label = int(rng.integers(2))
            mood = ("fine", "good") if label else ("dull", "bad")
            words = [*rng.choice(NAMES[12:], rng.integers(1, 9)), *rng.choice(mood, 2)]
            lines.append(f"{' '.join(rng.permutation(words))}\t{label}\n")
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder
