"""Matrices larger than memory, of which each product reads every row block once."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence

import jax
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Int

from nyscaled.lowrank.blocks import BlockFactory, ahead, as_rows
from nyscaled.lowrank.host_arrays import HostArray, all_finite, as_argument
from nyscaled.lowrank.resume import Journal, Pass, describe, describe_file
from nyscaled.numerics import full_precision, normalized
from nyscaled.typing import MatrixLike
from nyscaled.validation import require_count, require_nonnegative

BLOCK_BYTES = 2**24


class RowBlocks:
    """A matrix that is read by blocks of rows, in place of being held in memory.

    A product reads every block once, the next one while the last one is multiplied. So memory
    holds two blocks, or up to four of a function, and thin matrices. Blocks are compared by
    checksums with those of the first pass. Their products are compiled for each height, and summed
    in double precision.

    Args:
        source: what gives rows as `source[i:j]`: `np.memmap`, an h5py dataset, a zarr array, a
            sparse matrix of SciPy, or any object with `shape` and `dtype`. Or a function without
            arguments that returns an iterable of the row blocks, the same ones at each call.
        shape: (m, n), of a function.
        dtype: of the blocks once they are read; by default that of the source, and float32 for
            half precision. float64 becomes float32 where JAX's x64 is off.
        block_bytes: the size of a block in memory; a function chooses its own.
        progress: whether to draw a bar for each pass, with tqdm.
        resume: a folder from which a run that was killed continues, and into which this one
            writes. It must be deleted by hand. Passes that have ended are not made again, so the
            folder knows its matrix by shape, dtype and first block, and that of `np.memmap`, h5py
            or a zarr folder by the size of its files and the time of their last change too. A
            change of other entries of another source is not seen.
        save_seconds: how often the state of a pass is written there.

    Raises:
        ValueError: on a source that is none of these. Its products raise it on files that are cut
            short, on blocks that changed since the first pass, and on NaN and Inf.

    Examples:
        >>> blocks = lambda: (np.full((2, 3), i, np.float32) for i in range(4))
        >>> a = RowBlocks(blocks, shape=(8, 3), dtype=np.float32)
        >>> a.times(np.ones((3, 1), np.float32)).T
        array([[0., 0., 3., 3., 6., 6., 9., 9.]], dtype=float32)
    """

    def __init__(
        self,
        source: MatrixLike | BlockFactory,
        *,
        shape: Sequence[int] | None = None,
        dtype: DTypeLike | None = None,
        block_bytes: int = BLOCK_BYTES,
        progress: bool = False,
        resume: str | os.PathLike[str] | None = None,
        save_seconds: float = 60.0,
    ) -> None:
        block_bytes = require_count("block_bytes", block_bytes, low=1)
        require_nonnegative("save_seconds", save_seconds)
        self._rows = as_rows(source, shape, dtype, block_bytes)
        self.shape = self._rows.shape
        self.dtype = self._rows.dtype
        self.stored = self._rows.stored
        self.passes = 0
        self._checksums: dict[int, int] = {}  # by the row at which a block begins
        self._progress = progress
        self._save_seconds = save_seconds
        self._journal = None
        if resume is not None:
            first = checksum(next(self._rows.read(0)))
            m, n = self.shape
            description = {"shape": f"({m}, {n})", "dtype": str(self.dtype)}
            description["checksum of the first block"] = f"{first:016x}"
            if self._rows.path is not None:
                description |= describe_file(self._rows.path)
            self._journal = Journal(resume, description)

    def times(self, x: Inexact[np.ndarray, "n k"], /) -> Inexact[np.ndarray, "m k"]:
        """Return A x, in one pass."""
        return _known(self._pass("A x", x, image=True, sums=0).image)

    def adjoint_times(self, y: Inexact[np.ndarray, "m k"], /) -> Inexact[np.ndarray, "n k"]:
        """Return Aᴴ y, in one pass."""
        sums = _known(self._pass("Aᴴ y", y, image=False, sums=None).sums)
        return sums.conj().T.astype(self.dtype, order="C")

    def times_both(
        self, x: Inexact[np.ndarray, "n k"], /, columns: int | None = None
    ) -> tuple[Inexact[np.ndarray, "m k"], Inexact[np.ndarray, "n j"]]:
        """Return A x, and Aᴴ A x in double precision, in one pass.

        The second has the size of the square of A, which single precision may not hold.

        Args:
            x: a thin matrix (n, k).
            columns: of how many columns of x, the first ones, Aᴴ A x is made; of all by default.

        Raises:
            ValueError: unless x fits, and has so many columns.
        """
        if columns is not None:
            columns = require_count("columns", columns, 1)
        product = "A x and Aᴴ A x" if columns is None else f"A x and Aᴴ A x[:, :{columns}]"
        state = self._pass(product, x, image=True, sums=columns)
        return _known(state.image), _known(state.sums).conj().T

    def blocks(self) -> Iterator[HostArray]:
        """Yield the row blocks, in one pass, which `resume` does not cover."""
        with self._bar("rows", 0) as show:
            for _, block in ahead(self._blocks(0)):
                yield block
                show(len(block))
        self.passes += 1

    def _pass(self, product: str, x: HostArray, *, image: bool, sums: int | None) -> Pass:
        """Multiply blocks by x, or by rows of x; sum adjoint products of columns (None: all)."""
        m, n = self.shape
        x = np.ascontiguousarray(as_argument(product, x, n if image else m, self.dtype))
        k = x.shape[1]
        sums = k if sums is None else sums
        if sums > k:
            raise ValueError(f"columns is {sums}; expected at most {k}, the columns of x")
        state = Pass(
            row=0,
            image=np.empty((m, k), self.dtype) if image else None,
            sums=np.zeros((sums, n), np.result_type(self.dtype, np.float64)) if sums else None,
        )
        journal = self._journal
        description = {} if journal is None else describe(product, x)
        if journal is not None and (known := journal.load(self.passes, description, state, m)):
            state, checksums = known
            self._checksums = {**checksums, **self._checksums}
        missing, saved = state.row < m, time.monotonic()
        with self._bar(product, state.row) as show:
            for rows, block in ahead(self._blocks(state.row)):
                self._add(rows, block, x, state)
                state.row = rows.stop
                show(len(block))
                late = time.monotonic() - saved >= self._save_seconds
                if journal is not None and late and state.row < m:
                    journal.save(self.passes, description, state, self._checksums)
                    saved = time.monotonic()
        if journal is not None and missing:
            journal.save(self.passes, description, state, self._checksums, ended=True)
        self.passes += 1
        return state

    def _add(self, rows: slice, block: HostArray, x: HostArray, state: Pass) -> None:
        factor = x[rows] if state.image is None else x
        sums = state.sums
        width = 0 if sums is None else len(sums)
        thin, part, e = _products(block, factor, state.image is not None, width)
        result = np.asarray(thin)
        if state.image is not None:
            state.image[rows] = result
        if sums is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                sums += np.multiply(part, 2.0 ** int(e), dtype=sums.dtype)
            result = sums
        if not all_finite(result):
            raise ValueError(
                f"rows {rows.start} … {rows.stop} of {self._rows.label} have NaN or Inf entries, "
                f"or their products overflow {self.dtype}; expected finite ones"
            )

    def _blocks(self, start: int) -> Iterator[tuple[slice, HostArray]]:
        """Yield the blocks and where they are; ValueError on one that was another before."""
        if start == self.shape[0]:
            return
        for block in self._rows.read(start):
            stop, found = start + len(block), checksum(block)
            if self.passes == 0:
                self._checksums.setdefault(start, found)
            if self._checksums.get(start) != found:
                raise ValueError(
                    f"rows {start} … {stop} of {self._rows.label} changed between two passes; "
                    "expected the same rows in each pass"
                )
            yield slice(start, stop), block
            start = stop

    @contextlib.contextmanager
    def _bar(self, product: str, start: int) -> Generator[Callable[[int], object], None, None]:
        """Yield what is called with the number of rows that were read."""
        if not self._progress:
            yield lambda rows: None
            return
        try:
            tqdm = importlib.import_module("tqdm")
        except ModuleNotFoundError as error:
            raise ImportError(
                "progress=True needs tqdm: pip install 'nyscaled[streams]'"
            ) from error
        label = f"pass {self.passes + 1}: {product}"
        with tqdm.tqdm(total=self.shape[0], initial=start, desc=label, unit=" rows") as bar:
            yield bar.update


@functools.partial(jax.jit, static_argnums=(2, 3))
@full_precision
def _products(
    block: Inexact[Array, "b n"], x: Inexact[Array, "_ k"], image: bool, width: int
) -> tuple[Inexact[Array, "b k"], Inexact[Array, "j n"], Int[Array, ""]]:
    """The rows w of A x, or of y, and wᴴA · 2^(−e) for the first columns of w.

    The size of the second is one that single precision holds.
    """
    thin = block @ x if image else x
    scaled, e = normalized(thin[:, :width])
    part = lax.dot_general(scaled.conj(), block, (((0,), (0,)), ((), ())))
    return thin, part, e


def checksum(block: np.ndarray) -> int:
    """Return 64 bits that tell whether a block changed.

    Sums of its machine words over rows and over columns take a fifth of the time of a CRC of all
    bytes. A change is not seen if it keeps each of these sums.

    Args:
        block: rows of a matrix, contiguous.
    """
    per_row = block.shape[1] * block.itemsize
    words = block.view(next(w for w in (np.uint64, np.uint32) if per_row % w().itemsize == 0))
    across, down = (np.add.reduce(words, axis=axis, dtype=words.dtype) for axis in (1, 0))
    return zlib.crc32(across) << 32 | zlib.crc32(down)


def _known(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    return array
