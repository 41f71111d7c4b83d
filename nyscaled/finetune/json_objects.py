"""Objects of a JSON text, each with the line that it begins in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

T = TypeVar("T")
Sourced = tuple[Mapping[str, object], str]
"""An object, and its file and line."""


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, which end only at line feeds.

    Args:
        text: the text. Its sentences may hold other characters that `str.splitlines` cuts at.

    Examples:
        >>> lines_of("a\\u2028b\\r\\nc")
        ['a\\u2028b', 'c']
    """
    return [line.removesuffix("\r") for line in text.split("\n")]


def objects_of(name: str, text: str) -> Iterator[Sourced]:
    """Yield the objects of a list, or of an object per line, each with its file and line.

    Args:
        name: name of the file, for messages.
        text: what the file holds.

    Raises:
        ValueError: on another form; the message names the line.

    Examples:
        >>> [source for _, source in objects_of("train.json", '[{"a": 1},\\n {"a": 2}]')]
        ['train.json:1', 'train.json:2']
    """
    return (_of_list if text.lstrip().startswith("[") else _of_lines)(name, text)


def _of_lines(name: str, text: str) -> Iterator[Sourced]:
    lines = lines_of(text)
    for number, line in enumerate(lines, 1):
        if line.strip():
            source = f"{name}:{number}"
            try:
                value = _parsed(source, number, json.loads, line)
            except ValueError:
                _require_one_line(source, "\n".join(lines[number - 1 :]))
                raise
            yield _object(source, value), source


def _require_one_line(source: str, text: str) -> None:
    """Refuse a text that begins with a value over several lines, which is not a cut one."""
    text = text.lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (RecursionError, ValueError):
        return
    if count := text.count("\n", 0, end):
        raise ValueError(
            f"{source} begins an object that lies over {count + 1} lines; expected an object per "
            "line, or one list of all objects (jq -c . FILE writes an object per line)"
        )


def _of_list(name: str, text: str) -> Iterator[Sourced]:
    """Yield the objects of a list, decoded one by one, so that each has its line."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def skip(position: int) -> int:
        match = space.match(text, position)
        assert match is not None
        return match.end()

    end, line, counted = skip(skip(0) + 1), 1, 0
    if text[end : end + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, end), end
        source = f"{name}:{line}"
        value, end = _parsed(source, 1, decoder.raw_decode, text, end)
        yield _object(source, value), source
        end = skip(end)
        mark, end = text[end : end + 1], skip(end + 1)
        if mark == "]":
            break
        if mark != ",":
            line += text.count("\n", counted, end)
            got = repr(mark) if mark else "the end of the file"
            raise ValueError(f"{name}:{line} has {got} after a row; expected ',' or ']'")
    if end < len(text):
        line += text.count("\n", counted, end)
        raise ValueError(f"{name}:{line} has {text[end]!r} after the list; expected its end")


def _parsed(source: str, line: int, parse: Callable[..., T], *args: object) -> T:
    """Return what `parse` reads for a row, in a text that begins in this line of the file."""
    try:
        return parse(*args)
    except json.JSONDecodeError as error:
        name = source.rpartition(":")[0]
        raise ValueError(
            f"{name}:{line + error.lineno - 1} is not JSON: {error.msg} at its column "
            f"{error.colno} (the file may be cut)"
        ) from None
    except (RecursionError, ValueError) as error:  # too deep, or a number with too many digits
        raise ValueError(f"{source} is not JSON that can be read: {error}") from None


def _object(source: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{source} is {value!r:.80}; expected an object of fields")
    return cast("dict[str, object]", value)
