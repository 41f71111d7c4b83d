"""Files that appear whole or not at all, and replace others only on request."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nyscaled.checkpoints.files import flush, write_tensors

Writer = Callable[[Path], None]


def require_writable(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Require places for new files, before the work that fills them.

    Args:
        paths: the files.
        overwrite: whether they may exist.

    Raises:
        ValueError: if a file exists, or its folder does not.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} is not a folder; expected one to write {path.name} to")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; expected a file, or nothing")
        if os.path.lexists(path) and not overwrite:
            raise ValueError(f"{path} exists; expected a new name (or --overwrite)")


def write(writers: Mapping[Path, Writer], *, overwrite: bool) -> None:
    """Write files aside, and move them to their places when all are whole.

    Args:
        writers: by file, what writes it under the name that it gets.
        overwrite: whether existing files are replaced.

    Raises:
        ValueError: if a file exists and must not be replaced.
        OSError: if a file cannot be written.
    """
    folder = next(iter(writers)).parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=".nyscaled-") as aside:
        for path, writer in writers.items():
            writer(Path(aside) / path.name)
            os.chmod(Path(aside) / path.name, 0o644)  # safetensors lets only the owner read
            flush(Path(aside) / path.name)
        require_writable(list(writers), overwrite=overwrite)
        for path in writers:
            os.replace(Path(aside) / path.name, path)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name to `.npz` or `.safetensors`.

    Args:
        path: path of the file.
        arrays: values by name.
    """
    if path.suffix == ".safetensors":
        write_tensors(path, arrays, {"format": "pt"})
    else:
        np.savez(path, allow_pickle=False, **arrays)
