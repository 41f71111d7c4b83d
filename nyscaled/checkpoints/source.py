"""The interface through which models read weights, for every format of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

CONFIG = "config.json"


@runtime_checkable
class WeightSource(Protocol):
    """An open file or folder with a configuration and tensors, which are read one by one.

    Names, layouts and values are those that transformers writes for the same model.
    """

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def config_path(self) -> Path:
        """The file that `config` comes from."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What `config.json` holds, or would hold."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it.

        Args:
            name: name of the tensor.

        Raises:
            ValueError: if no tensor has this name.
        """
        ...

    def read(self, name: str) -> np.ndarray:
        """Return a tensor.

        Args:
            name: name of the tensor.

        Raises:
            ValueError: if no tensor has this name, or its type is not known.
        """
        ...

    def blocks(self, name: str, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a tensor in blocks of rows, each with the number of its first row.

        Args:
            name: name of the tensor.
            size: most bytes in a block, which has at least one row.

        Raises:
            ValueError: as `read` does.
        """
        ...


def blocks_of(
    shape: tuple[int, ...],
    read: Callable[[], np.ndarray],
    read_rows: Callable[[slice], np.ndarray],
    size: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a tensor in blocks of rows, each with the number of its first row.

    A scalar is one block, and so is a tensor without entries.

    Args:
        shape: shape of the tensor.
        read: returns all of it.
        read_rows: returns some of its rows.
        size: most bytes in a block, which has at least one row.
    """
    if not shape or 0 in shape:
        yield 0, read()
        return
    count = max(1, size // read_rows(slice(0, 1)).nbytes)
    for first in range(0, shape[0], count):
        yield first, read_rows(slice(first, min(first + count, shape[0])))
