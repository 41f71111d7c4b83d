"""Read and write single files: configurations in JSON and tensors in safetensors."""

from __future__ import annotations

import contextvars
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from nyscaled._files import flush as flush

MAX_TEXT = 2**28  # bytes of a text or JSON file; the largest tokenizers have a tenth of it
MAX_DEPTH = 64  # of objects and lists in JSON

JsonObject = dict[str, Any]
Signature = tuple[int, int, int, int] | None

# What the current reading has looked at, and its state then; see `swap.consistent`.
SEEN: contextvars.ContextVar[dict[Path, Signature] | None] = contextvars.ContextVar(
    "seen", default=None
)


def as_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that a user names.

    Args:
        path: what the user passed.

    Raises:
        ValueError: unless it is a path, which "" is not: it would be the current directory.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ValueError(f"the folder is {path!r}; expected a path")
    if not os.fspath(path):
        raise ValueError("the folder is ''; expected a path ('.' for the current directory)")
    return Path(path)


def signature(path: Path) -> Signature:
    """Return what changes when a file is replaced or written to; None where there is no file.

    Args:
        path: path of the file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: of a name that no file can have
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def note(path: Path) -> None:
    """Remember that the current reading depends on a file, or on its absence.

    Args:
        path: path of the file.
    """
    seen = SEEN.get()
    if seen is not None:
        seen.setdefault(path, signature(path))


def exists(path: Path) -> bool:
    """Return whether something has this name, and let the current reading depend on it.

    A link to nothing counts: a cache that lost a file is broken, and not one without the file.

    Args:
        path: path of the file.
    """
    note(path)
    return os.path.lexists(path)


def require_regular(path: Path) -> None:
    """Require a regular file: a FIFO blocks, a device may have no end.

    Args:
        path: path of the file.

    Raises:
        ValueError: on something other than a regular file.
        OSError: if nothing has this name.
    """
    note(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file; expected one")


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: path of the file.
        expected: what the message says was expected, if the file is missing.

    Raises:
        ValueError: on a missing file, one that holds no object, one that has a key twice in an
            object, or that nests deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(_text(path), object_pairs_hook=_object)
        _require_shallow(value)
    except OSError as error:
        raise ValueError(f"{error}; expected {expected}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def read_text(path: Path) -> str:
    """Return the text of a file.

    Args:
        path: path of the file.

    Raises:
        ValueError: on a file that cannot be read, or is not in UTF-8.
    """
    try:
        return _text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def _text(path: Path) -> str:
    require_regular(path)
    if (size := os.stat(path).st_size) > MAX_TEXT:
        raise ValueError(f"it has {size} bytes; expected at most {MAX_TEXT}")
    return path.read_text(encoding="utf-8")


def brief(value: object) -> str:
    """Return the text of a value, shortened to what fits in a message.

    Args:
        value: what a file holds, or a library says of it.
    """
    text = str(value)
    return text if len(text) <= 1000 else f"{text[:600]} … {text[-300:]}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys differ: readers choose differently among two values of a key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"it has the key {brief(repr(twice))} twice in one object")
    return value


def _require_shallow(value: Any) -> None:
    """Require nesting that recursive functions can walk through."""
    level = [[value]]
    for _ in range(MAX_DEPTH + 1):
        items = [x.values() if isinstance(x, dict) else x for x in level]
        level = [x for part in items for x in part if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError(f"it nests deeper than {MAX_DEPTH}; the limit of recursion is near")


def open_tensors(path: Path) -> Any:
    """Open a safetensors file, mapped into memory: only its header is read.

    The file must keep its length while its tensors are read: if it is cut short, the system ends
    the process (SIGBUS). A save replaces files and cuts none.

    Args:
        path: path of the file.

    Raises:
        ValueError: on a file that is cut short or otherwise broken.
    """
    try:
        require_regular(path)
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a sound safetensors file: {brief(error)}") from error


def read_tensor(file: Any, path: Path, name: str, rows: slice | None = None) -> np.ndarray:
    """Return a tensor of an open file, or some of its rows; memory then holds only these.

    Args:
        file: the open file.
        path: its path, for messages.
        name: name of the tensor.
        rows: rows to read, None for all.

    Raises:
        ValueError: on a dtype that NumPy, with ml_dtypes, does not have.
    """
    try:
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a sound safetensors file, at {brief(name)}: {brief(error)}"
        ) from error


def as_json(value: Mapping[str, Any]) -> str:
    """Return the text of a JSON file.

    Args:
        value: the object.

    Raises:
        ValueError: on values that JSON has no form for.
    """
    try:
        return json.dumps(value, indent=2) + "\n"
    except (TypeError, RecursionError) as error:
        raise ValueError(f"JSON has no form for {brief(repr(value))}: {error}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file.

    Args:
        path: path of the file.
        tensors: values by name.
        metadata: texts for the header.

    Raises:
        OSError: if it cannot be written, for example on a full disk.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        safetensors.numpy.save_file(arrays, path, metadata=dict(metadata))
    except safetensors.SafetensorError as error:  # the library's name for it
        raise OSError(f"{path} cannot be written: {error}") from error
