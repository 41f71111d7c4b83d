"""Tokenizers from the files of model folders."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nyscaled.checkpoints import files, swap
from nyscaled.models.tokenizers import soundness
from nyscaled.models.tokenizers.gguf import add_ends, byte_level
from nyscaled.models.tokenizers.special_tokens import (
    SETTINGS,
    completed,
    read_settings,
    roles,
)
from nyscaled.models.tokenizers.tokenizer import (
    FILE,
    TEMPLATE,
    TEMPLATES,
    Tokenizer,
    named_templates,
)

_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
# Files of tokenizers that are not read: WordPiece's words, SentencePiece's model.
_OTHERS = _VOCABULARY, "vocab.txt", "tokenizer.model"


def open_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """Return the tokenizer of a model folder, None if there is none that can be read.

    It is read from `tokenizer.json`, else from GPT-2's `vocab.json` and `merges.txt`, which the
    repositories of OPT have. There is a warning if the folder has one of another form.

    Args:
        folder: path of the folder.

    Raises:
        ValueError: on a broken file.
        ImportError: without the package tokenizers.
    """
    path = files.as_folder(folder)
    return swap.consistent(path, functools.partial(_open, path))


def _open(folder: Path) -> Tokenizer | None:
    present = [name for name in (FILE, *_OTHERS) if files.exists(folder / name)]
    if not present:
        return None
    settings = read_settings(folder)
    if FILE not in present and not _is_gpt2(folder, settings):
        warnings.warn(
            f"{folder} has {present[0]}, from which no tokenizer is made here: it is None; "
            f"expected {FILE}, which transformers' AutoTokenizer writes in save_pretrained, or "
            f"{_VOCABULARY} and {_MERGES} of a GPT2Tokenizer",
            stacklevel=8,  # of the call of `nyscaled.models.load`
        )
        return None
    try:
        import tokenizers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{folder / present[0]} needs tokenizers: pip install 'nyscaled[models]'"
        ) from error
    try:
        settings |= _templates(folder, settings)
        inner = _of_json(folder / FILE) if FILE in present else _of_merges(folder)
        with soundness.refusing("the package tokenizers refuses what the settings ask for"):
            inner, settings = completed(inner, settings, folder)
            if FILE not in present:
                _add_ends(inner, settings)
        return Tokenizer(inner, settings)
    except ValueError as error:
        raise ValueError(f"{folder / present[0]}, {SETTINGS}: {files.brief(error)}") from None


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat templates, of which those in separate files override the settings.

    Raises:
        ValueError: on templates of another type, or files that are not texts.
    """
    separate = {}
    if files.exists(folder / TEMPLATE):
        separate["default"] = files.read_text(folder / TEMPLATE)
    files.note(folder / TEMPLATES)
    for path in sorted((folder / TEMPLATES).glob("*.jinja")):
        separate[path.name.removesuffix(".jinja")] = files.read_text(path)
    if not separate:
        return {}
    named = named_templates(settings) | separate
    if named.keys() == {"default"}:
        return {"chat_template": named["default"]}
    return {"chat_template": [{"name": k, "template": v} for k, v in named.items()]}


def _of_json(path: Path) -> Any:
    import tokenizers

    document = files.read_object(path, "a tokenizer")
    try:
        soundness.require_bounded(document)
        with soundness.refusing("the package tokenizers refuses it"):
            return tokenizers.Tokenizer.from_file(str(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a sound tokenizer: {error}") from error


def _is_gpt2(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether `vocab.json` and `merges.txt` are a complete tokenizer."""
    kind = settings.get("tokenizer_class") in ("GPT2Tokenizer", "GPT2TokenizerFast")
    return kind and all(files.exists(folder / f) for f in (_VOCABULARY, _MERGES))


def _of_merges(folder: Path) -> Any:
    vocabulary = files.read_object(folder / _VOCABULARY, "tokens and their ids")
    if not all(type(i) is int and 0 <= i <= soundness.LARGEST_ID for i in vocabulary.values()):
        raise ValueError(f"{folder / _VOCABULARY} has ids that are none; expected integers")
    lines = files.read_text(folder / _MERGES).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    try:
        return byte_level(vocabulary, merges)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _add_ends(inner: Any, settings: Mapping[str, Any]) -> None:
    special = roles(settings)
    ends = {
        role: special[f"{role}_token"]
        for role in ("bos", "eos")
        if settings.get(f"add_{role}_token") and f"{role}_token" in special
    }
    add_ends(inner, **ends)
