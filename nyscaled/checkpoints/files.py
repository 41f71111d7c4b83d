"""Reading and writing pairs of files: a configuration in JSON and its tensors in safetensors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy


def read_object(path: Path, wanted: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: on a missing file (saying what was `wanted`), or one that holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{error}; wanted {wanted}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; wanted an object")
    return value


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: on a file that cannot be read, or is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped into memory: only its header is read.

    Raises:
        ValueError: on a file that is cut short or otherwise broken.
    """
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error


def read_tensor(file: Any, path: Path, name: str, rows: slice | None = None) -> np.ndarray:
    """One tensor of an open file, or some rows of it, of which alone memory is then taken.

    Raises:
        ValueError: on a dtype that NumPy, with ml_dtypes, does not have.
    """
    try:
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a sound safetensors file, at {name}: {error}") from error


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike[str],
    texts: Mapping[str, str | None],
    *,
    last: str,
    stale: re.Pattern[str] | None = None,
) -> Iterator[Path]:
    """A folder aside to write tensors into, which then take the place of those in `folder`.

    Each file is whole whenever it is there: all are written aside and then moved, `last` at the
    end, after the old one was taken away, so that it never sits by other tensors. Nothing has
    changed if the body raises. A process that is killed in the swap leaves the folder without
    `last`; at any time, it leaves a hidden folder `.writing-…`, which may be deleted.

    Args:
        folder: made if missing; other files in it are left alone.
        texts: more files, by their names; None for those that go.
        last: of `texts`, the file without which the others are not read.
        stale: names of further files that go, as they belonged to what is replaced.

    Yields:
        The folder aside.

    Raises:
        ValueError: if a directory is in the place of a file; nothing has changed.
        OSError: if a file cannot be written, and nothing has changed; or cannot be moved, and the
            folder aside is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        yield aside
        for name, text in texts.items():
            if text is not None:
                (aside / name).write_text(text, encoding="utf-8")
        new = {file.name for file in aside.iterdir()}
        for name in new:
            # safetensors lets only their owner read its files.
            shutil.copymode(aside / last, aside / name)
            flush(aside / name)
        there = {file.name for file in folder.iterdir()}
        old = {n for n in there - new if n in texts or (stale and stale.fullmatch(n))}
        for name in sorted(new | old):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                raise ValueError(f"{folder / name} is a directory; wanted a file, or nothing")
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    try:
        for name in (last, *old):
            (folder / name).unlink(missing_ok=True)
        for name in (*sorted(new - {last}), last):
            os.replace(aside / name, folder / name)
    except OSError as error:
        raise OSError(
            f"{error}; the new files are whole: to end what began, move those that are still in "
            f"{aside} into {folder}"
        ) from error
    aside.rmdir()
    flush(folder)


def as_json(value: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file."""
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(arrays, path, metadata=dict(metadata))


def flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
