"""Reading and writing pairs of files: a configuration in JSON and its tensors in safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
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


def read_tensor(file: Any, path: Path, name: str) -> np.ndarray:
    """One tensor of an open file.

    Raises:
        ValueError: on a dtype that NumPy, with ml_dtypes, does not have.
    """
    try:
        return file.get_tensor(name)
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a sound safetensors file, at {name}: {error}") from error


def write_pair(
    folder: str | os.PathLike[str],
    tensors: tuple[str, Mapping[str, np.ndarray]],
    config: tuple[str, Mapping[str, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Writes tensors and their configuration, each given with the name of its file.

    Each file is whole whenever it is there: both are written aside and then moved, the
    configuration last, after the old one was taken away, so that it never sits by other tensors.

    Args:
        folder: made if missing; other files in it are left alone.
        tensors: file name, and arrays by name.
        config: file name, and what to write as JSON.
        metadata: of the safetensors file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors[1].items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        aside = Path(name)
        safetensors.numpy.save_file(arrays, aside / tensors[0], metadata=dict(metadata))
        (aside / config[0]).write_text(json.dumps(config[1], indent=2) + "\n")
        for file in (tensors[0], config[0]):
            flush(aside / file)
        (folder / config[0]).unlink(missing_ok=True)
        for file in (tensors[0], config[0]):
            os.replace(aside / file, folder / file)
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


def flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
