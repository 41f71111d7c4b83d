"""Sources of row blocks: files, arrays that are sliced, and functions that make the blocks."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike

from nyscaled.lowrank.explicit import on_auto_axes
from nyscaled.lowrank.host_arrays import HOST_DTYPES, as_dtype
from nyscaled.lowrank.stored import file_of, require_bytes, store_of
from nyscaled.matrices import is_scipy, require_floating
from nyscaled.operators import as_shape
from nyscaled.typing import MatrixLike

_ALIGNMENT = 64  # bytes, of which XLA asks

T = TypeVar("T")

BlockFactory = Callable[[], Iterable[np.ndarray]]


@runtime_checkable
class SlicedRows(Protocol):
    """A matrix of which `source[i:j]` gives rows: `np.memmap`, h5py, zarr, or a class of yours."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Rows(NamedTuple):
    """A matrix by its row blocks; `read(start)` yields those from row `start`, a block's first.

    Its `path` is that of the file or the folder that it lies in, or None, and `stored` is the dtype
    there.
    """

    label: str
    path: str | None
    shape: tuple[int, int]
    dtype: np.dtype
    stored: np.dtype
    read: Callable[[int], Iterator[np.ndarray]]


def as_rows(
    source: MatrixLike | BlockFactory,
    shape: Sequence[int] | None,
    dtype: DTypeLike | None,
    block_bytes: int,
) -> Rows:
    """Return the row blocks of a source, converted to a dtype that products are made in.

    Args:
        source: a matrix that is sliced by rows, or a function that yields its blocks.
        shape: (m, n), of a function; of a matrix its own, or None.
        dtype: of the blocks that are returned; by default that of the source.
        block_bytes: of a block in memory.

    Raises:
        ValueError: on other sources, and on dtypes that are not floats or complex numbers.
    """
    path = None
    if is_scipy(source):
        source = cast(MatrixLike, source).tocsr()
    if isinstance(source, jax.Array):
        source = on_auto_axes(source)
    if isinstance(source, SlicedRows):
        label, file = _label(source), file_of(source)
        path = store_of(source) if file is None else file.path
        size = as_shape(label, source.shape)
        stored = as_dtype(f"the dtype of {label}", source.dtype)
        if shape is not None and as_shape("the source", shape) != size:
            raise ValueError(f"shape is {shape!r} for {label} {size}; expected None")
    elif callable(source):
        label = getattr(source, "__name__", "the stream")
        if shape is None or dtype is None:
            raise ValueError("shape or dtype is None; expected both for a function of blocks")
        size, stored = as_shape(label, shape), as_dtype("dtype", dtype)
    else:
        raise ValueError(
            f"the source is a {type(source).__name__}; expected an array that is sliced by rows "
            "(np.memmap, h5py, zarr), or a function that yields row blocks"
        )
    target = block_dtype(label, stored, dtype)
    # What a user's function gives, it may write over while the next block is read ahead.
    fresh = type(source).__module__.partition(".")[0] in ("numpy", "h5py", "zarr", "scipy")
    if not isinstance(source, SlicedRows):
        read = _made(cast(BlockFactory, source), label)
    else:
        per_row = max(size[1] * max(stored.itemsize, target.itemsize), 1)
        height = _height(source, max(block_bytes // per_row, 1))
        read = _from_file(source, height) or _sliced(source, height, label)
    return Rows(label, path, size, target, stored, _checked(read, label, size, target, fresh))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item


def each(source: Callable[[], Iterable[T]], label: str) -> Iterator[T]:
    """Yield what an iterable of somebody else yields; ValueError where it raises.

    Args:
        source: returns the iterable.
        label: what errors call it.
    """
    try:
        items = iter(source())
    except Exception as error:  # what somebody else's function raises
        raise ValueError(
            f"{label} gives no row blocks ({type(error).__name__}: {error}); expected an iterable "
            "of them, from a function without arguments"
        ) from error
    for number in itertools.count():
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(
                f"block {number} of {label} failed ({type(error).__name__}: {error})"
            ) from error
        yield item


def _label(source: SlicedRows) -> str:
    """The name of a file where there is one."""
    file = getattr(source, "filename", None) or getattr(
        getattr(source, "file", None), "filename", None
    )
    return f"a {type(source).__name__}" if file is None else os.fspath(file)


def block_dtype(label: str, stored: np.dtype, dtype: DTypeLike | None) -> np.dtype:
    """Return the dtype in which blocks are multiplied.

    Args:
        label: what errors call the source.
        stored: the dtype of the source.
        dtype: what was asked for.

    Raises:
        ValueError: if it is not a float or complex dtype, or loses imaginary parts.
    """
    if dtype is None:
        half = stored.kind in "fV" and stored.itemsize == 2  # NumPy multiplies no half precision
        target = np.dtype(np.float32) if half else stored.newbyteorder("=")
        if target not in HOST_DTYPES:
            raise ValueError(
                f"{label} has dtype {stored}; expected floats or complex numbers "
                "(nys.lowrank.RowBlocks(…, dtype=np.float32) converts blocks as they are read)"
            )
    else:
        target = as_dtype("dtype", dtype)
    target = np.dtype(jax.dtypes.canonicalize_dtype(target))
    require_floating("the dtype of blocks", np.empty(0, target), HOST_DTYPES)
    if stored.kind == "c" and target.kind != "c":
        raise ValueError(f"dtype is {target} for the {stored} of {label}; expected a complex one")
    return target


def _height(source: SlicedRows, rows: int) -> int:
    """Rows of a block, in whole chunks of a chunked file where they fit."""
    chunks = cast(Sequence[int] | None, getattr(source, "chunks", None))
    if chunks and 0 < chunks[0] <= rows:
        rows -= rows % chunks[0]
    return min(rows, source.shape[0])


def as_block(
    block: MatrixLike, name: str, width: int, dtype: np.dtype, *, fresh: bool
) -> np.ndarray:
    """Return a row block as an array of this dtype, row after row in memory.

    Args:
        block: the block: an array, or a sparse matrix of SciPy.
        name: what errors call it.
        width: how many columns it must have.
        dtype: of the result.
        fresh: whether nobody will write into the block; others are copied.

    Raises:
        ValueError: if it is not a matrix of numbers with so many columns.
    """
    rows = as_array(block, name)
    numbers = rows.dtype.kind in "fViub" or rows.dtype.kind == dtype.kind == "c"
    if rows.ndim != 2 or rows.shape[1] != width or not numbers:
        got = f"shape {rows.shape} and dtype {rows.dtype}"
        raise ValueError(f"{name} have {got}; expected numbers (rows, {width}) for {dtype}")
    aligned = rows.flags.c_contiguous and rows.ctypes.data % _ALIGNMENT == 0
    if fresh and rows.dtype == dtype and aligned:
        return rows
    result = _aligned(rows.shape, dtype)
    with np.errstate(over="ignore"):  # Inf is found in the products
        result[...] = rows
    return result


def as_array(rows: MatrixLike, name: str) -> np.ndarray:
    """Return rows as an array of NumPy; ValueError on what NumPy does not read.

    Args:
        rows: an array, or a sparse matrix of SciPy.
        name: what errors call them.
    """
    try:
        if np.ma.isMA(rows):
            raise TypeError("NumPy would drop its mask")
        return rows.toarray() if is_scipy(rows) else np.asarray(rows)
    except Exception as error:  # of many classes; a traced array is one
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} are a {type(rows).__name__} ({reason})") from error


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that JAX multiplies where it lies, in place of a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _checked(
    read: Callable[[int], Iterator[np.ndarray]],
    label: str,
    shape: tuple[int, int],
    dtype: np.dtype,
    fresh: bool,
) -> Callable[[int], Iterator[np.ndarray]]:
    """Blocks of the right width and dtype, which end after m rows."""
    m, n = shape

    def blocks(start: int) -> Iterator[np.ndarray]:
        row = start
        for block in read(start):
            block = as_block(block, f"rows {row} … of {label}", n, dtype, fresh=fresh)
            row += len(block)
            if row > m:
                raise ValueError(f"{label} has more than {m} rows; expected shape {shape}")
            if len(block):
                yield block
        if row < m:
            raise ValueError(f"{label} ended after {row} rows; expected {m}")

    return blocks


def _made(factory: BlockFactory, label: str) -> Callable[[int], Iterator[np.ndarray]]:
    def blocks(start: int) -> Iterator[np.ndarray]:
        row = 0
        for block in each(factory, label):
            if row >= start:
                yield block
            row += np.shape(block)[0]
        if row < start:
            raise ValueError(f"{label} ended after {row} rows; expected more than {start}")

    return blocks


def _sliced(source: SlicedRows, height: int, label: str) -> Callable[[int], Iterator[np.ndarray]]:
    m, file = source.shape[0], file_of(source)

    def blocks(start: int) -> Iterator[np.ndarray]:
        for row in range(start, m, height):
            if file is not None:
                require_bytes(file.path, file.end)
            stop = min(row + height, m)
            try:
                block = source[row:stop]
                shape = np.shape(block)
            except Exception as error:  # what h5py, zarr or somebody's class raises
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"rows {row} … {stop} of {label}: {reason}") from error
            if shape[:1] != (stop - row,):
                got = f"rows {row} … {stop} of {label} have shape {shape}"
                raise ValueError(f"{got}; expected {stop - row} rows")
            yield block

    return blocks


def _from_file(source: SlicedRows, height: int) -> Callable[[int], Iterator[np.ndarray]] | None:
    """Reading a mapped file as a file, so that its pages do not count as memory of the process."""
    file = file_of(source)
    if file is None or file.begin is None or not isinstance(source, np.memmap):
        return None
    if not source.flags.c_contiguous or source.mode == "c":  # changes of such a map are in no file
        return None
    path, end, begin = file.path, file.end, file.begin
    (m, n), dtype = source.shape, source.dtype

    def blocks(start: int) -> Iterator[np.ndarray]:
        require_bytes(path, end)
        with open(path, "rb", buffering=0) as file:
            file.seek(begin + start * n * dtype.itemsize)
            for row in range(start, m, height):
                block = _aligned((min(height, m - row), n), dtype)
                view, filled = block.reshape(-1).view(np.uint8).data, 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        require_bytes(path, end)
                        raise ValueError(f"{path} cannot be read at row {row}")
                    filled += count
                yield block

    return blocks
