"""Matrices in files, listed without being read: arrays, sparse matrices, tensors of checkpoints.

Nothing in a file is executed. A file that is cut short, or of another format than its name says, is
a ValueError of one line.
"""

from __future__ import annotations

import functools
import math
import os
import re
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nyscaled.checkpoints.files import brief, open_tensors, read_tensor, require_regular
from nyscaled.checkpoints.folder import open_folder
from nyscaled.checkpoints.gguf import open_gguf
from nyscaled.checkpoints.source import WeightSource
from nyscaled.lowrank import RowBlocks
from nyscaled.numerics import keeping
from nyscaled.typing import MatrixLike

PARTS_OF_SPARSE = {"format", "shape", "data"}
"""Arrays that every `.npz` of `scipy.sparse.save_npz` has."""


class Entry(NamedTuple):
    """A matrix of a file.

    Attributes:
        name: its name in the file; "" if the file holds one matrix without a name.
        shape: (m, n).
        load: reads it.
    """

    name: str
    shape: tuple[int, int]
    load: Callable[[], MatrixLike]


@runtime_checkable
class Stored(Protocol):
    """An array in a file, which indexing reads."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, index: EllipsisType, /) -> np.ndarray: ...


def entries(path: Path, pattern: str | None = None) -> list[Entry]:
    """Return the matrices of a file or of a folder of weights.

    Args:
        path: `.npy`, `.npz` (arrays, or one sparse matrix of SciPy), `.mtx`, `.mtx.gz`, `.h5`,
            `.hdf5`, `.safetensors`, `.gguf`, or a folder that has `config.json`.
        pattern: a regular expression that whole names match; None for all matrices of floats.

    Raises:
        ValueError: on a file that is not sound, or has no matrix of such a name.
        ImportError: if the package that reads this format is missing.

    Examples:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/a.npz", a=np.ones((3, 2)), b=np.ones(2))
        ...     [entry.name for entry in entries(Path(folder) / "a.npz")]
        ['a']
    """
    try:
        chosen = re.compile(".*" if pattern is None else pattern)
    except re.error as error:
        raise ValueError(f"--name is {pattern!r}; expected a regular expression: {error}") from None
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a file or a folder")
    matrices = list(_reader(path)(path))
    if pattern is not None and [entry.name for entry in matrices] == [""]:
        raise ValueError(f"--name is {pattern!r}, but {path} holds one matrix without a name")
    selected = [entry for entry in matrices if chosen.fullmatch(entry.name)]
    if not selected:
        names = brief(", ".join(entry.name for entry in matrices)) or "none"
        which = "" if pattern is None else f" whose name matches {pattern!r}"
        raise ValueError(f"{path} has no matrix of floats{which}; it has: {names}")
    return selected


def _reader(path: Path) -> Callable[[Path], Iterator[Entry]]:
    if path.is_dir():
        return lambda path: _weights(open_folder(path))
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    reader = _READERS.get(ending.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise ValueError(f"{path} ends in {ending!r}; expected one of {known}, or a folder")
    require_regular(path)
    return reader


@contextmanager
def _sound(path: Path, form: str) -> Generator[None]:
    """Make what a parser raises on broken files a ValueError."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # of many classes
        raise ValueError(f"{path} is not a sound {form} file: {brief(error)}") from error


def _npy(path: Path) -> Iterator[Entry]:
    with _sound(path, ".npy"):
        array = np.lib.format.open_memmap(path, mode="r")
    yield _dense(path, "", array)


def _npz(path: Path) -> Iterator[Entry]:
    with _sound(path, ".npz"):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not a zip archive, or is cut short")
        archive = np.load(path, allow_pickle=False)
    if set(archive.files) >= PARTS_OF_SPARSE:
        yield _sparse(path)
        return
    for name in archive.files:
        with _sound(path, ".npz"):
            array = archive[name]
        if _is_floats(array.shape, array.dtype):
            yield Entry(name, array.shape, functools.partial(_floats, path, array))


def _sparse(path: Path) -> Entry:
    import scipy.sparse

    with _sound(path, "sparse .npz"):
        matrix: MatrixLike = scipy.sparse.load_npz(path).tocsr()
        matrix.check_format(full_check=True)  # indices out of range would crash the process
    return Entry("", matrix.shape, functools.partial(_floats, path, matrix))


def _mtx(path: Path) -> Iterator[Entry]:
    from nyscaled.cli import matrix_market

    with _sound(path, "Matrix Market"):
        matrix: MatrixLike = matrix_market.read(path)
    yield Entry("", matrix.shape, functools.partial(_floats, path, matrix))


def _hdf5(path: Path) -> Iterator[Entry]:
    import h5py

    datasets: list[h5py.Dataset] = []

    def visit(_: str, node: object) -> None:
        if isinstance(node, h5py.Dataset):
            datasets.append(node)

    with _sound(path, "HDF5"):
        h5py.File(path, "r").visititems(visit)
    for dataset in datasets:
        if _is_floats(dataset.shape or (), dataset.dtype):
            yield _dense(path, str(dataset.name).lstrip("/"), dataset)


def _safetensors(path: Path) -> Iterator[Entry]:
    file = open_tensors(path)
    for name in file.keys():  # noqa: SIM118  # it is not a mapping
        part = file.get_slice(name)
        if len(part.get_shape()) == 2 and 0 not in part.get_shape() and "F" in part.get_dtype():
            load = functools.partial(read_tensor, file, path, name)
            yield Entry(name, tuple(part.get_shape()), lambda load=load: _floats(path, load()))


def _gguf(path: Path) -> Iterator[Entry]:
    from nyscaled.models.family import gguf_maps

    return _weights(open_gguf(path, gguf_maps()))


def _weights(source: WeightSource) -> Iterator[Entry]:
    for name in source.names:
        shape = source.shape(name)
        if len(shape) == 2 and min(shape) > 0:
            # GGUF has floats only, and dequantizes all of a tensor for its first row.
            row = None if source.path.is_file() else next(source.blocks(name, 1))[1]
            if row is None or _is_floats(shape, row.dtype):
                yield Entry(name, shape, functools.partial(_read, source, name))


def _read(source: WeightSource, name: str) -> MatrixLike:
    return _floats(source.path, source.read(name))


_READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".mtx": _mtx,
    ".mtx.gz": _mtx,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".safetensors": _safetensors,
    ".gguf": _gguf,
}


def _dense(path: Path, name: str, array: Stored) -> Entry:
    """An entry of an array that is read, in whole or by blocks, when it is asked for."""
    if len(array.shape) != 2 or 0 in array.shape:
        raise ValueError(f"{path} has shape {array.shape}; expected a matrix (m, n)")
    return Entry(name, array.shape, functools.partial(_whole_or_blocks, path, array))


def _whole_or_blocks(path: Path, array: Stored) -> MatrixLike:
    dtype = _target(path, array.dtype)
    if math.prod(array.shape) * array.dtype.itemsize > memory() // 4:
        with keeping(dtype):
            return RowBlocks(array, dtype=dtype, progress=True)
    with _sound(path, path.suffix):
        whole = np.array(array[...])  # of a memory map too, which would be read by blocks
    return _floats(path, whole)


def memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _is_floats(shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    return len(shape) == 2 and 0 not in shape and jnp.issubdtype(dtype, jnp.inexact)


def _floats(path: Path, a: MatrixLike) -> MatrixLike:
    """A matrix in a dtype of `factorize`, in the byte order of the machine."""
    with np.errstate(over="ignore"):  # Inf is found in the products
        return a.astype(_target(path, a.dtype), copy=False)


def _target(path: Path, dtype: np.dtype) -> np.dtype:
    """The dtype that a stored one becomes: half precision and integers become float32."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex64 if dtype.itemsize <= 8 else np.complex128)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    if not jnp.issubdtype(dtype, jnp.integer) and dtype.kind != "b":
        raise ValueError(f"{path} has dtype {dtype}; expected numbers")
    return np.dtype(np.float32)
