"""The layout of a GGUF file: metadata, and where each tensor is, checked as llama.cpp checks it.

Counts are compared with the remaining bytes before they are used. Tensors follow one
another, each at the next multiple of the alignment, and the last one ends the file: nothing else
says that an offset, a shape or a type is the one that was meant.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nyscaled.checkpoints import files

MAX_ELEMENTS = 2**23  # of all arrays in the metadata; the largest vocabularies have a tenth

_MAGIC = b"GGUF"
_VERSIONS = 2, 3
_ALIGNMENT = "general.alignment"
# The types of values in the metadata.
_NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4  # of arrays of arrays
# The least bytes of a key with its value, of a tensor's entry, and of what else is counted.
_PAIR, _ENTRY = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
_LEAST = {_STRING: 8, _ARRAY: 4 + 8}


class Tensor(NamedTuple):
    """A tensor of the file.

    Attributes:
        name: llama.cpp's name.
        shape: torch's shape, the reverse of the file's.
        kind: quantization, a `gguf.GGMLQuantizationType`.
        data: mapped bytes, with a row in the last axis.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header of a file.

    The file is mapped. It must keep its length while tensors are read: if it is cut short, the
    system ends the process (SIGBUS).

    Args:
        path: path of the file.

    Returns:
        Metadata and tensors by their names.

    Raises:
        ValueError: on a file that is cut short, has bytes that no tensor has, a type that is not
            known, or a tensor that is not where the one before it ends.
        OSError: on a file that cannot be opened.
    """
    files.require_regular(path)
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    cursor = _Cursor(data.data)
    if bytes(cursor.take(4)) != _MAGIC:
        raise ValueError("GGUF magic invalid")
    version = cursor.number("<u4")
    if version not in _VERSIONS:
        if not version & 0xFFFF:
            raise ValueError("it has the other byte order; expected this machine's")
        raise ValueError(f"it is of version {version}; expected 2 or 3")
    tensor_count, pair_count = cursor.number("<u8"), cursor.number("<u8")
    cursor.require(pair_count * _PAIR + tensor_count * _ENTRY)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"it has the key {key!r} twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    return metadata, _tensors(cursor, data, tensor_count, metadata.get(_ALIGNMENT, 32))


def _tensors(cursor: _Cursor, data: np.ndarray, count: int, alignment: Any) -> dict[str, Tensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{_ALIGNMENT} is {alignment!r}; expected a power of two")

    def aligned(size: int) -> int:
        return -(-size // alignment) * alignment

    entries, end = {}, 0
    for _ in range(count):
        name = cursor.text()
        dimensions = cursor.number("<u4")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions; expected 1 to 4")
        shape = tuple(cursor.number("<u8") for _ in range(dimensions))[::-1]
        number, offset = cursor.number("<u4"), cursor.number("<u8")
        if number not in list(GGMLQuantizationType):
            raise ValueError(f"{name} is of type {number}, which is not known")
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(
                f"{name} has rows of {shape[-1]}; expected a multiple of {block}, as {kind.name} "
                "has"
            )
        if offset != aligned(end):
            raise ValueError(
                f"{name} lies at {offset}; expected {aligned(end)}, where the tensor before it ends"
            )
        if name in entries:
            raise ValueError(f"it has the tensor {name!r} twice")
        rows = (*shape[:-1], shape[-1] // block * size)
        entries[name] = shape, kind, offset, rows
        end = offset + math.prod(rows)
        cursor.require(end)
    start = aligned(cursor.place)
    if count and start + end > len(data):
        raise ValueError(f"it ends before what it announces: {len(data)} bytes of {start + end}")
    if len(data) > start + aligned(end):
        raise ValueError(
            f"it goes on for {len(data) - start - end} bytes after its last tensor; expected its "
            "end"
        )
    return {
        name: Tensor(name, shape, kind, data[start + offset :][: math.prod(rows)].reshape(rows))
        for name, (shape, kind, offset, rows) in entries.items()
    }


def _number(kind: int) -> str:
    """Return NumPy's name for a type of numbers."""
    form = _NUMBERS[kind] if kind < len(_NUMBERS) else None
    if form is None:
        raise ValueError(f"it has a value of type {kind}, which is not known")
    return form


class _Cursor:
    """A position in a file that never goes beyond its end.

    Args:
        data: the bytes of the file.
    """

    def __init__(self, data: memoryview) -> None:
        self.data, self.place, self.elements = data, 0, MAX_ELEMENTS

    def require(self, size: int) -> None:
        """Require bytes that have not been read.

        Args:
            size: number of bytes.

        Raises:
            ValueError: if there are fewer.
        """
        if size > len(self.data) - self.place:
            raise ValueError("it ends before what it announces")

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        self.require(size)
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, form: str) -> Any:
        """Return the next number, whose type is NumPy's `form`."""
        return np.frombuffer(self.take(np.dtype(form).itemsize), form)[0].item()

    def text(self) -> str:
        """Return the next text, which has its length in front."""
        (size,) = struct.unpack("<Q", self.take(8))
        return str(self.take(size), "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return the next value of the metadata."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(depth)
        return self.number(_number(kind))

    def _array(self, depth: int) -> list[Any]:
        kind, count = self.number("<u4"), self.number("<u8")
        form = None if kind in _LEAST else np.dtype(_number(kind))
        self.require(count * (form.itemsize if form else _LEAST[kind]))
        self.elements -= count
        if self.elements < 0 or depth == _MAX_DEPTH:
            raise ValueError(
                f"its arrays have more than {MAX_ELEMENTS} elements, or nest deeper than "
                f"{_MAX_DEPTH}"
            )
        if form is None:
            return [self.value(kind, depth + 1) for _ in range(count)]
        return np.frombuffer(self.take(count * form.itemsize), form).tolist()
