"""Find what fails inside of the package tokenizers early, and raise it as ValueError.

Its panics pass `except Exception`, some of its settings fail only on a text, and some ask for more
memory than there is, which ends the process.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from nyscaled.checkpoints import files

# The most that a tokenizer may lengthen a text, over all its steps.
MAX_GROWTH = 2**20
LARGEST_ID = 2**31 - 1  # arrays of tokens are int32

# Nothing, words, signs and numbers, and characters that vocabularies rarely have.
_PROBES = "", "a b", "Hello, world's 12\n", "é你\U0001f600\U0010ffff"


@contextlib.contextmanager
def refusing(what: str) -> Generator[None, None, None]:
    """Raise ValueError for everything that the library raises.

    Args:
        what: beginning of the message.

    Examples:
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
        # A panic of Rust is not an Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {type(error).__name__}: {files.brief(error)}") from error


def require_bounded(document: Mapping[str, Any]) -> None:
    """Require settings of a `tokenizer.json` that need no more memory than the file announces.

    Args:
        document: content of the file.

    Raises:
        ValueError: on a map of characters that is shorter than it says, or steps that together
            make a text longer than `MAX_GROWTH` times.
    """
    for parts in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        growth = 1
        for part in parts:
            for settings in _objects(document.get(part)):
                growth *= _growth(settings, part)
        if growth > MAX_GROWTH:
            raise ValueError(
                f"its {', '.join(parts)} make texts {float(growth):.2g} times as long; expected at "
                f"most {MAX_GROWTH}"
            )


def require_usable(inner: Any) -> None:
    """Require a tokenizer that accepts any text, by passing it some.

    Args:
        inner: tokenizer of the package tokenizers.

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
    """Yield the objects in a value of JSON, at any depth."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)


def _growth(settings: Mapping[str, Any], part: str) -> int:
    """Return how many times a step lengthens a text, at most; 1 for what the library refuses."""
    step, added = settings.get("type"), settings.get("prepend")
    if step == "Precompiled" and isinstance(settings.get("precompiled_charsmap"), str):
        return _longest(settings["precompiled_charsmap"])
    if step == "Replace":
        return _of_replacement(settings.get("pattern"), settings.get("content"))
    if step == "Prepend" and isinstance(added, str):
        return 1 + len(added)
    if step == "ByteLevel" and part != "decoder":
        return 2  # other characters than ASCII become one per byte, of two bytes each
    if step == "TemplateProcessing":
        return _of_templates(settings)
    return 1


def _longest(text: str) -> int:
    """Return the most bytes that a map of characters puts in the place of one.

    The map must be as long as its first four bytes say, because so much memory is allocated.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"its precompiled_charsmap is not in base64: {error}") from error
    size = int.from_bytes(content[:4], "little")
    if len(content) < 4 or size > len(content) - 4:
        raise ValueError(
            f"its precompiled_charsmap announces {size} bytes and has {max(len(content) - 4, 0)}"
        )
    return max(1, *map(len, content[4 + size :].split(b"\0")))


def _of_replacement(pattern: Any, content: Any) -> int:
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1
    whole = pattern.get("String")
    if isinstance(whole, str) and whole:
        return max(1, -(-len(content) // len(whole)))
    return len(content) + 1  # an expression may match between any two characters


def _of_templates(settings: Mapping[str, Any]) -> int:
    """Return the number of texts and tokens in the longer template."""
    tokens = [token.get("ids") for token in _objects(settings.get("special_tokens"))]
    each = max([1, *(len(ids) for ids in tokens if isinstance(ids, list))])
    templates = (settings.get(name) for name in ("single", "pair"))
    return max([1, *(each * len(pieces) for pieces in templates if isinstance(pieces, list))])
