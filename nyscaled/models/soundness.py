"""What can go wrong inside of the package tokenizers, as ValueErrors, and before a text is lost to it.

Its panics pass `except Exception`, some of its settings fail on the first text only, and some
announce more memory than there is, which ends the process.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from nyscaled.checkpoints import files

# In all that a tokenizer does to it a text may grow this much at the most.
MAX_GROWTH = 2**20
LARGEST_ID = 2**31 - 1  # arrays of tokens are int32

# Nothing, words, signs and numbers, and characters that vocabularies rarely have.
_PROBES = "", "a b", "Hello, world's 12\n", "é你\U0001f600\U0010ffff"


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raise ValueError, with `what` in front, for whatever the library raises.

    Example:
        >>> with refusing("the tokenizer fails"):
        ...     {}["a"]
        Traceback (most recent call last):
        ...
        ValueError: the tokenizer fails: KeyError: 'a'
    """
    try:
        yield
    except (ValueError, ImportError):
        raise
    except BaseException as error:
        # A panic of Rust is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {type(error).__name__}: {files.brief(error)}") from error


def require_bounded(document: Mapping[str, Any]) -> None:
    """Require settings of a `tokenizer.json` that need no more memory than the file announces.

    Raises:
        ValueError: on a map of characters that is shorter than it says, or replacements that make
            a text longer than `MAX_GROWTH` times.
    """
    for part in ("normalizer", "decoder"):
        growth = 1
        for settings in _objects(document.get(part)):
            kind = settings.get("type")
            if kind == "Precompiled":
                _require_whole(settings.get("precompiled_charsmap"))
            elif kind == "Replace":
                growth *= _growth(settings.get("pattern"), settings.get("content"))
        if growth > MAX_GROWTH:
            raise ValueError(
                f"the replacements of its {part} make texts {growth} times as long; expected at "
                f"most {MAX_GROWTH}"
            )


def require_usable(inner: Any) -> None:
    """Require a tokenizer that takes any text, by giving it some.

    Args:
        inner: the library's.

    Raises:
        ValueError: if it fails on one, or has ids that int32 does not hold.
    """
    with refusing("the tokenizer fails on texts"):
        largest = max(inner.get_vocab().values(), default=0)
        pairs = list(zip(_PROBES, _PROBES[::-1], strict=True))
        for special in (True, False):
            for texts in (list(_PROBES), pairs):
                for encoding in inner.encode_batch(texts, add_special_tokens=special):
                    largest = max(largest, *encoding.ids, *encoding.type_ids, 0)
                    inner.decode(encoding.ids, skip_special_tokens=special)
    if largest > LARGEST_ID:
        raise ValueError(f"the tokenizer has the id {largest}; expected at most {LARGEST_ID}")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in a value of JSON, at any depth."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)


def _require_whole(text: Any) -> None:
    """Require a map that is as long as its first four bytes say: that much memory is taken."""
    if not isinstance(text, str):
        return  # which the library refuses
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"its precompiled_charsmap is not in base64: {error}") from error
    size = int.from_bytes(content[:4], "little")
    if len(content) < 4 or size > len(content) - 4:
        raise ValueError(
            f"its precompiled_charsmap announces {size} bytes and has {max(len(content) - 4, 0)}"
        )


def _growth(pattern: Any, content: Any) -> int:
    """How many times as long a text is after a replacement, at the most."""
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1  # which the library refuses
    whole = pattern.get("String")
    if isinstance(whole, str) and whole:
        return max(1, -(-len(content) // len(whole)))
    return len(content) + 1  # an expression may match between any two characters
