"""The files that matrices lie in, and whether they are as long as they were."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np


class StoredFile(NamedTuple):
    """A file, the byte at which it ends, and the byte at which the rows begin if it is mapped.

    It must not be shorter: a map then ends the process, and HDF5 reads zeros.
    """

    path: str
    end: int
    begin: int | None


def file_of(source: object) -> StoredFile | None:
    """Return the file of a memory map or of an h5py dataset, None for others.

    Args:
        source: what is sliced by rows.
    """
    if not isinstance(source, np.memmap):
        path = getattr(getattr(source, "file", None), "filename", None)  # of h5py
        if not isinstance(path, str) or not os.path.isfile(path):
            return None
        return StoredFile(path, os.stat(path).st_size, None)
    root = source
    while isinstance(root.base, np.ndarray):
        root = root.base
    if source.filename is None or not isinstance(root, np.memmap):
        return None
    begin = int(root.offset) + source.ctypes.data - root.ctypes.data
    return StoredFile(os.fspath(source.filename), int(root.offset) + root.nbytes, begin)


def store_of(source: object) -> str | None:
    """Return the folder or the archive of a zarr array that lies on this machine, None for others.

    Args:
        source: what is sliced by rows.
    """
    store = getattr(source, "store", None)
    root = getattr(store, "root", None) or getattr(store, "path", None)
    if not isinstance(root, str | os.PathLike):
        return None
    inside = os.path.join(root, str(getattr(source, "path", "")))
    return next((path for path in (inside, os.fspath(root)) if os.path.exists(path)), None)


def require_bytes(path: str, expected: int) -> None:
    """Raise ValueError if a file has fewer bytes than expected.

    Args:
        path: path of the file.
        expected: how many it must have.
    """
    size = os.stat(path).st_size
    if size < expected:
        raise ValueError(f"{path} is cut short: it has {size} bytes; expected {expected}")
