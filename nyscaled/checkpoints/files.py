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
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{error}; wanted {wanted}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; wanted an object")
    return value


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
    config: tuple[str, Mapping[str, Any]],
    stale: re.Pattern[str] | None = None,
) -> Iterator[Path]:
    """A folder aside to write tensors into, which then take the place of those in `folder`.

    Each file is whole whenever it is there: all are written aside and then moved, the
    configuration last, after the old one was taken away, so that it never sits by other tensors.
    Nothing has changed if the body raises.

    Args:
        folder: made if missing; other files in it are left alone.
        config: file name, and what to write as JSON.
        stale: names of files that go, as they belonged to what is replaced.

    Yields:
        The folder aside.
    """
    folder, (name, settings) = Path(folder), config
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
        aside = Path(temporary)
        yield aside
        new = sorted(file.name for file in aside.iterdir())
        (aside / name).write_text(json.dumps(settings, indent=2) + "\n")
        for file in (*new, name):
            # safetensors lets only their owner read its files.
            shutil.copymode(aside / name, aside / file)
            flush(aside / file)
        (folder / name).unlink(missing_ok=True)
        for file in new:
            os.replace(aside / file, folder / file)
        for file in folder.iterdir():
            if stale and stale.fullmatch(file.name) and file.name not in new:
                file.unlink()
        os.replace(aside / name, folder / name)
        flush(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, which is whole whenever it is there; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as name:
        aside = Path(name) / path.name
        aside.write_text(text, encoding="utf-8")
        flush(aside)
        os.replace(aside, path)
    flush(path.parent)


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
