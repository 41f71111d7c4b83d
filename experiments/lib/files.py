"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it, so that a reader never sees half a file.

    Args:
        path: the file to write or replace.
        data: its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_arrays(path: Path, arrays: Sequence[Any]) -> None:
    """Write arrays as an .npz file.

    Args:
        path: the file to write or replace.
        arrays: the arrays.
    """
    buffer = io.BytesIO()
    names: Any = {str(i): np.asarray(x) for i, x in enumerate(arrays)}
    np.savez(buffer, **names)
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path, tree: Any) -> Any:
    """Return a tree whose leaves `write_arrays` wrote.

    Args:
        path: the file.
        tree: a tree of this structure.
    """
    leaves, treedef = jax.tree.flatten(tree)
    with np.load(path) as file:
        return treedef.unflatten([jnp.asarray(file[str(i)]) for i in range(len(leaves))])
