"""Tokenizers from vocabularies without a `tokenizer.json`, as in the metadata of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nyscaled.checkpoints.gguf_config import token_id
from nyscaled.models.tokenizers import soundness
from nyscaled.models.tokenizers.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
# Of `token_type`.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# Characters of the pairs that SentencePiece merges; a vocabulary of 256,000 has 5 million.
_MAX_MERGES = 2**27

# How text is split before bytes are merged. The expression is the one of Llama 3.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {
    "gpt-2": "gpt2",
    "smollm": "digits",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
    "qwen2": "qwen2",
    "smaug-bpe": "llama3",  # the first name of Llama 3
}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a GGUF file, None if it has no vocabulary.

    Args:
        metadata: metadata of the file, `nyscaled.checkpoints.gguf.Gguf.metadata`.

    Raises:
        ValueError: on a kind of vocabulary, or a way to split text, that is not known here, and
            on metadata that is missing or unsound.
        ImportError: without the package tokenizers.
    """
    with soundness.refusing("the tokenizer's metadata is not sound"):
        return _tokenizer(metadata)


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    fields = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
    model = fields.get("model")
    if model in (None, "none", "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise ValueError(f"the tokenizer is {model!r}; expected 'gpt2' or 'llama'")
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ImportError("tokens need tokenizers: pip install 'nyscaled[models]'") from error
    tokens = _texts(fields, "tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens has a token twice")
    for key in ("scores", "token_type"):
        if len(fields.get(key, tokens)) != len(tokens):
            raise ValueError(
                f"{_PREFIX}{key} has {len(fields[key])} entries for {len(tokens)} tokens"
            )
    types = fields.get("token_type", [_NORMAL] * len(tokens))
    roles = {}
    for key, role in _ROLES.items():
        i = token_id(metadata, key, len(tokens))
        if i is not None:
            roles[f"{role}_token"] = tokens[i]
    if model == "gpt2":
        pre = _required(fields, "pre")
        if pre not in _SPLITS:
            raise ValueError(f"{_PREFIX}pre is {pre!r}; expected one of {', '.join(_SPLITS)}")
        # Whether texts begin with a special token, if the metadata does not say it.
        bos = _SPLITS[pre] == "llama3"
        inner = byte_level(vocabulary, _texts(fields, "merges"), _SPLITS[pre])
    else:
        bos, inner = True, _sentence_piece(fields, vocabulary, roles.get("unk_token"))
    # Both kinds are matched whole in a text; decoded texts lack only control tokens.
    for kept, add in ((_CONTROL, inner.add_special_tokens), (_USER_DEFINED, inner.add_tokens)):
        whole = [t for t, token_type in zip(tokens, types, strict=True) if token_type == kept]
        special = kept == _CONTROL
        add([tokenizers.AddedToken(t, special=special, normalized=False) for t in whole])
    ends = {}
    for role, default in (("bos", bos), ("eos", False)):
        if fields.get(f"add_{role}_token", default):
            _required(fields, f"{role}_token_id")
            ends[role] = roles[f"{role}_token"]
    add_ends(inner, **ends)
    return Tokenizer(inner, roles | _templates(metadata))


def byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[str],
    split: str = "gpt2",
) -> Any:
    """Return a tokenizer by BPE over bytes.

    Args:
        vocabulary: ids of the tokens.
        merges: pairs of tokens with a space between, in the order in which they are merged.
        split: how text is split before it is merged: "gpt2", "digits", "llama3" or "qwen2".

    Returns:
        A tokenizer of the package tokenizers.

    Raises:
        ValueError: on merges of tokens outside of the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    if no_pair := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"a merge is {' '.join(no_pair)!r:.80}; expected two tokens with a space")
    with soundness.refusing("the merges are not of these tokens"):
        # Llama 3 keeps a word that is a token whole, regardless of the merges.
        inner = Tokenizer(models.BPE(dict(vocabulary), pairs, ignore_merges=split == "llama3"))
    expressions = {"llama3": _LLAMA3, "qwen2": _QWEN2}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in expressions)
    first = {
        "gpt2": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
    }.get(split)
    if first is None:
        first = [pre_tokenizers.Split(Regex(expressions[split]), behavior="isolated")]
    if split == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentence_piece(
    fields: Mapping[str, Any], vocabulary: dict[str, int], unknown: str | None
) -> Any:
    """Return SentencePiece's BPE, which always merges the pair whose union has the best score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores, types = (_required(fields, key) for key in ("scores", "token_type"))
    if any(score != score for score in scores):
        raise ValueError(f"{_PREFIX}scores has NaN; expected numbers")
    merges, size = [], 0
    # A long token is cut only into parts whose lengths are lengths of tokens.
    lengths = sorted(set(map(len, vocabulary)))
    for token, i in vocabulary.items():
        if types[i] not in (_NORMAL, _USER_DEFINED):
            continue
        for cut in lengths:
            if cut >= len(token):
                break
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], i, left, right))
                size += len(token)
        if size > _MAX_MERGES:
            raise ValueError(
                f"the tokens are made of one another in pairs of more than {_MAX_MERGES} characters"
            )
    tokens = list(vocabulary)
    pairs = [(tokens[left], tokens[right]) for *_, left, right in sorted(merges)]
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    inner = Tokenizer(models.BPE(vocabulary, pairs, **options))
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        parts.append(decoders.Strip(" ", 1, 0))
    inner.normalizer = normalizers.Sequence(spaces)
    inner.decoder = decoders.Sequence(parts)
    return inner


def add_ends(inner: Any, bos: str | None = None, eos: str | None = None) -> None:
    """Put tokens around each text.

    Args:
        inner: tokenizer of the package tokenizers.
        bos: token before each text, or None.
        eos: token after each text, or None.
    """
    from tokenizers.processors import TemplateProcessing

    ends = [token for token in (bos, eos) if token is not None]
    if not ends:
        return

    def around(name: str, segment: int) -> list[str]:
        parts = [bos, name, eos]
        return [f"{part}:{segment}" for part in parts if part is not None]

    inner.post_processor = TemplateProcessing(
        single=around("$A", 0),
        pair=around("$A", 0) + around("$B", 1),
        special_tokens=[(token, inner.token_to_id(token)) for token in ends],
    )


def _templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    named = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    if named.keys() <= {"default"}:
        return {"chat_template": named["default"]} if named else {}
    return {"chat_template": [{"name": k, "template": v} for k, v in named.items()]}


def _texts(fields: Mapping[str, Any], key: str) -> list[str]:
    value = _required(fields, key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{_PREFIX}{key} is {value!r:.80}; expected texts")
    return value


def _required(fields: Mapping[str, Any], key: str) -> Any:
    if key not in fields:
        raise ValueError(f"the metadata lacks {_PREFIX}{key}")
    return fields[key]
