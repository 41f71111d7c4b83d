"""What transformers applies over `tokenizer.json`: added tokens, and settings of its classes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nyscaled.checkpoints import files

SETTINGS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
DECODER = "added_tokens_decoder"
EXTRA, ADDITIONAL = "extra_special_tokens", "additional_special_tokens"  # its older name
OF_MODEL = "model_specific_special_tokens"  # by their roles

# Tokens that transformers' classes have where the settings do not name others.
_END = "<|endoftext|>"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "BertTokenizer": {
        f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")
    },
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        f"{role}_token": f"<{role}>" for role in ("unk", "bos", "eos", "pad", "mask")
    },
}
# Classes that do what BertTokenizer does.
_BERTS = {
    f"{name}Tokenizer"
    for name in (
        "DistilBert",
        "Electra",
        "MobileBert",
        "ConvBert",
        "SqueezeBert",
        "LayoutLM",
        "Lxmert",
    )
}
# Classes that read everything from `tokenizer.json`.
_PLAIN = "PreTrainedTokenizer", "TokenizersBackend", "CLIPTokenizer", ""
_OF_MODEL = {
    "bert": "BertTokenizer",
    "gemma": "GemmaTokenizer",
    "opt": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
_ROLES = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_FLAGS = "single_word", "lstrip", "rstrip", "normalized", "special"


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what the files beside `tokenizer.json` say, as transformers combines them.

    Where `tokenizer_config.json` has no `added_tokens_decoder`, `special_tokens_map.json`
    overrides it, and the added tokens are those of `added_tokens.json`.

    Args:
        folder: path of the folder.

    Raises:
        ValueError: on a broken file.
    """

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return files.read_object(path, "settings of the tokenizer") if files.exists(path) else {}

    settings = read(SETTINGS)
    if not settings.get(EXTRA) and ADDITIONAL in settings:
        settings[EXTRA] = settings.pop(ADDITIONAL)
    if DECODER in settings:
        return settings
    for name, value in read(SPECIAL).items():
        several = [_special(part) for part in value] if isinstance(value, list) else value
        if name == EXTRA and isinstance(value, list) and isinstance(settings.get(EXTRA), list):
            several = [*settings[EXTRA], *several]
        settings[name] = _special(several)
    # Those that transformers knows by now: tokens with flags in `tokenizer_config.json` are not.
    extra = settings.get(EXTRA)
    values = [*map(settings.get, _ROLES), *(extra if isinstance(extra, list) else [])]
    typed = [v for v in values if isinstance(v, Mapping) and v.get("special") is True]
    texts = [*values, *(v.get("content") for v in typed)]
    special = {text for text in texts if isinstance(text, str)}
    added = {
        str(i): {"content": token, "special": token in special, "normalized": token not in special}
        for token, i in read(ADDED).items()
    }
    return settings | ({ADDED: added} if added else {})


def roles(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by their roles, `bos_token`, …, of `tokenizer_config.json`.

    Args:
        settings: what the file holds.
    """
    return {name: token["content"] for name, token in _named(settings)}


def with_sides(inner: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, with padding and truncation of the tokenizer where they lack it.

    Args:
        inner: tokenizer of the package tokenizers.
        settings: what `tokenizer_config.json` holds.
    """
    padding, truncation = inner.padding or {}, inner.truncation or {}
    defaults = {
        "pad_token": padding.get("pad_token"),
        "padding_side": padding.get("direction"),
        "truncation_side": truncation.get("direction"),
    }
    return {k: v for k, v in defaults.items() if v is not None} | dict(settings)


def completed(inner: Any, settings: Mapping[str, Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a tokenizer with everything that transformers applies over its file, and the settings.

    Tokens that only the settings have are added in transformers' order, so that they have its ids.
    The settings also say how a `BertTokenizer` normalizes, and whether a `GPT2Tokenizer` and a
    `LlamaTokenizer` begin texts with a space.

    Args:
        inner: tokenizer of the package tokenizers.
        settings: result of `read_settings`.
        folder: folder with `config.json`, whose model decides the class of the tokenizer if the
            settings do not.

    Raises:
        ValueError: on tokens or settings of another type.
    """
    class_name = _class(inner, settings, folder)
    settings = with_sides(inner, _DEFAULTS.get(class_name, {}) | dict(settings))
    if class_name and DECODER in settings:
        inner = _without_others(inner, settings)
    if class_name == "BertTokenizer":
        _normalize(inner, settings)
    elif class_name == "GPT2Tokenizer":
        _begin_with_space(inner, _flag(settings, "add_prefix_space", default=False))
    elif class_name == "LlamaTokenizer" and not _flag(settings, "add_prefix_space", default=True):
        inner = _without_prefix(inner)
    _add(inner, settings)
    if class_name == "BertTokenizer":
        _surround(inner, settings)
    if "split_special_tokens" in settings:
        inner.encode_special_tokens = _flag(settings, "split_special_tokens", default=False)
    return inner, settings


def _class(inner: Any, settings: Mapping[str, Any], folder: Path) -> str:
    """Return the name of the class in transformers; "" for the one without settings."""
    name = settings.get("tokenizer_class")
    if not isinstance(name, str):
        config = folder / "config.json"
        model = files.read_object(config, "a model") if files.exists(config) else {}
        model_type = model.get("model_type")
        name = _OF_MODEL.get(model_type, "") if isinstance(model_type, str) else ""
    name = name.removesuffix("Fast")
    if name == "LlamaTokenizer" and "ByteLevel" in f"{inner.pre_tokenizer!r}{inner.decoder!r}":
        return ""  # Llama 3's, labelled as before
    name = "BertTokenizer" if name in _BERTS else name
    if name not in (*_DEFAULTS, *_PLAIN):
        warnings.warn(
            f"{folder} has a tokenizer of the class {name}: what that does in transformers over "
            "tokenizer.json is not known here, and left out",
            stacklevel=10,  # of the call of `nyscaled.models.load`
        )
    return name if name in _DEFAULTS else ""


def _without_others(inner: Any, settings: Mapping[str, Any]) -> Any:
    """Return the tokenizer without added tokens that the settings do not list.

    transformers' classes make their tokenizers from the vocabulary and these lists.
    """
    listed = [*_decoder(settings).values(), *(t for _, t in _named(settings)), *_extra(settings)]
    present = inner.get_added_tokens_decoder().values()
    fields = "content", *_FLAGS
    if all({field: getattr(t, field) for field in fields} in listed for t in present):
        return inner
    document = json.loads(inner.to_str())
    document["added_tokens"] = []
    return type(inner).from_str(json.dumps(document))


def _decoder(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    decoder = settings.get(DECODER, settings.get(ADDED)) or {}
    if not isinstance(decoder, Mapping) or not all(str(i).isdecimal() for i in decoder):
        raise ValueError(f"{DECODER} is {decoder!r:.80}; expected tokens by their ids")
    return {int(i): _token(token, DECODER) for i, token in decoder.items()}


def _add(inner: Any, settings: Mapping[str, Any]) -> None:
    """Add the tokens of the settings that the tokenizer does not have."""
    contents_by_id = {i: token.content for i, token in inner.get_added_tokens_decoder().items()}
    entries = sorted(_decoder(settings).items())
    # Where the file of the tokenizer has another token of this id, that one counts.
    tokens = [
        token for i, token in entries if contents_by_id.get(i, token["content"]) == token["content"]
    ]
    named = [token for _, token in _named(settings)]
    contents = {token["content"] for token in named}
    known = {*contents_by_id.values(), *(token["content"] for token in tokens)}
    for token in (*named, *_extra(settings)):  # of one content the flags of the last count
        if token["content"] not in known and token not in tokens:
            tokens.append(token)
    from tokenizers import AddedToken

    for token in tokens:
        token["special"] |= token["content"] in contents
    inner.add_tokens([AddedToken(**token) for token in tokens])


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each special token with its role; extra tokens may have roles too.

    The roles that every tokenizer may have come first.
    """
    extra = settings.get(EXTRA)
    extra_roles = extra if isinstance(extra, Mapping) else {}
    own = [
        name
        for name, value in settings.items()
        if name.endswith("_token") and name not in _ROLES and isinstance(value, str | Mapping)
    ]
    own.sort(key=lambda name: isinstance(settings[name], str))  # as transformers sets them
    # transformers uses either of these instead.
    if not extra_roles and not any(isinstance(settings[name], str) for name in own):
        of_model = settings.get(OF_MODEL)
        extra_roles = of_model if isinstance(of_model, Mapping) else {}
    for name in (*_ROLES, *own, *extra_roles):
        value = extra_roles.get(name, settings.get(name))
        if isinstance(value, str) or (isinstance(value, Mapping) and "content" in value):
            yield name, _token(value, name)


def _extra(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the special tokens without a role."""
    extra = settings.get(EXTRA)
    if EXTRA not in settings or isinstance(extra, Mapping):
        extra = settings.get(ADDITIONAL)
    extra = extra or []
    if not isinstance(extra, list):
        raise ValueError(f"{EXTRA} is {extra!r:.80}; expected a list of tokens")
    return [_token(token, EXTRA) for token in extra]


def _token(value: Any, name: str) -> dict[str, Any]:
    """Return the content and the flags of a token, which is a text or a mapping."""
    if isinstance(value, str):
        flags = dict.fromkeys(_FLAGS, False)
        return {"content": value, **flags, "special": True}
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {flag: value.get(flag, False) for flag in _FLAGS}
        if "normalized" not in value:
            flags["normalized"] = not flags["special"]
        if all(type(flag) is bool for flag in flags.values()):
            return {"content": value["content"], **flags}
    raise ValueError(f"{name} has {value!r:.80}; expected a text, or a token's content and flags")


def _special(value: Any) -> Any:
    """Return a token of `special_tokens_map.json` in the form of `tokenizer_config.json`."""
    if isinstance(value, Mapping) and "content" in value:
        return {"__type": "AddedToken", **value, "special": True}
    return value


def _flag(settings: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = settings.get(name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{name} is {value!r}; expected true or false")
    return default if value is None else value


def _normalize(inner: Any, settings: Mapping[str, Any]) -> None:
    from tokenizers import normalizers

    if not isinstance(inner.normalizer, normalizers.BertNormalizer):
        return
    strip = None
    if settings.get("strip_accents") is not None:
        strip = _flag(settings, "strip_accents", default=False)
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_flag(settings, "tokenize_chinese_chars", default=True),
        strip_accents=strip,
        lowercase=_flag(settings, "do_lower_case", default=True),
    )


def _surround(inner: Any, settings: Mapping[str, Any]) -> None:
    """Make texts [CLS] a [SEP] b [SEP], with the tokens of the settings."""
    from tokenizers.processors import TemplateProcessing

    tokens = roles(settings)
    first, last = tokens.get("cls_token"), tokens.get("sep_token")
    if first is None or last is None:
        return
    inner.post_processor = TemplateProcessing(
        single=[f"{first}:0", "$A:0", f"{last}:0"],
        pair=[f"{first}:0", "$A:0", f"{last}:0", "$B:1", f"{last}:1"],
        special_tokens=[(token, inner.token_to_id(token)) for token in (first, last)],
    )


def _begin_with_space(inner: Any, begin: bool) -> None:
    from tokenizers import pre_tokenizers

    level = inner.pre_tokenizer
    if isinstance(level, pre_tokenizers.ByteLevel) and level.add_prefix_space != begin:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=begin, trim_offsets=level.trim_offsets, use_regex=level.use_regex
        )


def _without_prefix(inner: Any) -> Any:
    """Return SentencePiece's tokenizer without the space that begins a text."""
    from tokenizers import Tokenizer

    document = json.loads(inner.to_str())
    changed = False
    for part, several, kinds in (
        ("normalizer", "normalizers", ("Prepend",)),
        ("pre_tokenizer", "pretokenizers", ()),
        ("decoder", "decoders", ("Strip",)),
    ):
        whole = document[part] or {}
        entries = whole.get(several, [whole] if whole else [])
        kept = [entry for entry in entries if entry["type"] not in kinds]
        changed |= len(kept) < len(entries)
        for entry in kept:
            if entry["type"] == "Metaspace" and entry.get("prepend_scheme") != "never":
                entry["prepend_scheme"], changed = "never", True
        document[part] = {"type": "Sequence", several: kept} if kept else None
    if not changed:
        return inner
    if document["model"]["type"] != "BPE":
        warnings.warn("add_prefix_space is not applied to this tokenizer.json", stacklevel=2)
        return inner
    return Tokenizer.from_str(json.dumps(document))
