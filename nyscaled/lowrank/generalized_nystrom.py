"""A low-rank factorization of a stream of rows, each of which is seen once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Key

from nyscaled.lowrank.arguments import require_sound
from nyscaled.lowrank.blocks import ahead, as_array, as_block, block_dtype, each
from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.host_arrays import HostArray, all_finite, require_outside_of_jit
from nyscaled.lowrank.orthogonal import adjoint, extend
from nyscaled.lowrank.products import random_block, random_scale
from nyscaled.lowrank.result import LowRank, Status
from nyscaled.lowrank.stream import RowBlocks
from nyscaled.lowrank.truncate import truncate
from nyscaled.numerics import full_precision, norm
from nyscaled.typing import MatrixLike, Scalar
from nyscaled.validation import require_count, require_digits, require_key, require_rank

PROBES = 8  # columns that measure the error
_CHUNK = 4096  # rows of Ψ that are drawn at once


@full_precision
def one_pass(
    a: MatrixLike | Iterable[HostArray],
    rank: int,
    *,
    key: Key[Array, ""] | None = None,
    oversampling: int | None = None,
) -> LowRank:
    """Return a factorization A ≈ L diag(s) Rᴴ of a matrix of which each row is seen once.

    While the rows pass by, AΩ and ΨᴴA are taken for Gaussian Ω (n, k) and Ψ (m, 3k/2), where
    k = rank + oversampling. The result is the generalized Nyström approximation
    AΩ (ΨᴴAΩ)⁺ ΨᴴA, cut to the rank. It is computed as Q (ΨᴴQ)⁺ ΨᴴA for an orthonormal basis Q of
    AΩ: ΨᴴQ is well conditioned where ΨᴴAΩ is not. Before the cut, its expected squared error is
    at most (1 + 2k/(k − 2)) (1 + r/(k − r − 1)) times that of the best approximation of rank r, for
    each r ≤ k − 2. Where a second pass is possible, `factorize` is closer to the best.

    The error is measured by products of A with 8 further Gaussian columns. Their squares are
    unbiased, because the factors do not depend on them. The estimate is below half the error with a
    probability of at most 2 %, and above twice the error with one of at most 0.01 %.

    Args:
        a: the row blocks (rows, n), from an iterator or any iterable, of as many rows as come;
            a `RowBlocks`; or a matrix that it takes.
        rank: 1 ≤ r ≤ min(m, n).
        key: PRNG key of the random columns; `jax.random.key(0)` by default. The result does not
            depend on where blocks begin, but for rounding.
        oversampling: how many more columns than `rank` the sketch has; rank + 5 by default.

    Raises:
        ValueError: on blocks that do not fit together, NaN and Inf, entries that are too small or
            too large for the dtype, and a rank out of range.

    References:
        Nakatsukasa, Fast and stable randomized low-rank matrix approximation, 2020.
        Tropp, Yurtsever, Udell and Cevher, Practical sketching algorithms for low-rank matrix
        approximation, SIAM J. Matrix Anal. Appl. 38, 2017.

    Examples:
        >>> rows = (jnp.outer(jnp.arange(i, i + 4.0), jnp.arange(1.0, 4.0)) for i in (0, 4, 8))
        >>> f = one_pass(rows, rank=1)
        >>> f.left.shape, bool(f.relative_error < 1e-5)
        ((12, 1), True)
    """
    key = jax.random.key(0) if key is None else require_key("key", key)
    require_outside_of_jit("the stream", a if hasattr(a, "shape") else None, key)
    rank = require_count("rank", rank, 1)
    extra = rank + 5 if oversampling is None else require_count("oversampling", oversampling)
    blocks = _blocks(a)
    first = next(blocks, None)
    if first is None:
        raise ValueError("the stream has no rows; expected row blocks")
    n, dtype = first.shape[1], first.dtype
    width = min(rank + extra, n)
    right_key, left_key, probe_key = jax.random.split(key, 3)
    test = np.asarray(random_block(right_key, n, width, dtype))
    probes = np.asarray(random_block(probe_key, n, PROBES, dtype))
    psi = _RandomRows(left_key, width + (width + 1) // 2, dtype)
    images: list[HostArray] = []
    sums = np.zeros((psi.columns, n), np.result_type(dtype, np.float64))
    row, columns = 0, np.concatenate([test, probes], axis=1)
    for block in itertools.chain([first], blocks):
        images.append(block @ columns)
        sums += psi.adjoint_times(row, block)
        if not (all_finite(images[-1]) and all_finite(sums)):
            raise ValueError(
                f"rows {row} … {row + len(block)} have NaN or Inf entries, or their products "
                f"overflow {dtype}; expected finite ones"
            )
        row += len(block)
    require_rank(rank, (row, n))
    image = np.concatenate(images)
    is_zero = not np.any(image)
    images.clear()  # which are as large
    left = extend(None, jnp.asarray(image[:, : min(width, row)]))
    sketched = psi.adjoint_times(0, np.asarray(left)).astype(sums.dtype)
    core = jnp.asarray(np.linalg.lstsq(sketched, sums)[0].astype(dtype))
    scale = random_scale(n) * PROBES**0.5  # so that norms of images are those of errors
    with np.errstate(over="ignore"):  # Inf is found in the result
        images_of_probes = jnp.asarray(image[:, width:] / scale)
    result = _cut(left, core, jnp.asarray(probes / scale), images_of_probes, rank)
    require_sound(result)
    if float(result.norm_estimate) == 0 and not is_zero:  # XLA takes the smallest numbers as zero
        require_digits(0.0, dtype)
    return dataclasses.replace(result, status=Status(int(result.status)))


@functools.partial(jax.jit, static_argnames="rank")
@full_precision
def _cut(
    left: Inexact[Array, "m k"],
    core: Inexact[Array, "k n"],
    probes: Inexact[Array, "n s"],
    images: Inexact[Array, "m s"],
    rank: int,
) -> LowRank:
    """Q X as factors of this rank, with the error that images of Gaussian probes show."""
    right = extend(None, adjoint(core))
    core = core @ right

    def error(left: Array, core: Array, right: Array) -> Scalar:
        return norm(images - left @ (core @ (adjoint(right) @ probes)))

    result = truncate(left, core_svd(core), right, error(left, core, right), rank, 1)
    values = jnp.diag(result.singular_values).astype(core.dtype)
    estimate = error(result.left, values, result.right)
    status = jnp.where(jnp.isfinite(estimate), result.status, int(Status.NON_FINITE))
    return dataclasses.replace(result, error_estimate=estimate, status=status)


class _RandomRows:
    """A Gaussian matrix (∞, columns) whose rows are drawn when they are needed, by their number."""

    def __init__(self, key: Key[Array, ""], columns: int, dtype: np.dtype) -> None:
        self.columns = columns
        self._dtype = dtype
        self._key = key
        self._chunk = -1
        self._rows = np.empty((0, columns), dtype)

    def adjoint_times(self, row: int, block: HostArray) -> HostArray:
        """Return ΨᴴB of the rows of Ψ from `row`, as many as the block has."""
        total = np.zeros((self.columns, block.shape[1]), np.result_type(block, np.float64))
        start = row
        while start < row + len(block):
            chunk, inside = divmod(start, _CHUNK)
            if chunk != self._chunk:
                key = jax.random.fold_in(self._key, chunk)
                self._rows = np.asarray(random_block(key, _CHUNK, self.columns, self._dtype))
                self._chunk = chunk
            part = block[start - row : start - row + _CHUNK - inside]
            total += self._rows[inside : inside + len(part)].conj().T @ part
            start += len(part)
        return total


def _blocks(a: MatrixLike | Iterable[HostArray]) -> Iterator[HostArray]:
    """The row blocks of what a user passes, in the dtype of the first one."""
    if isinstance(a, RowBlocks):
        return a.blocks()
    if hasattr(a, "shape"):
        return RowBlocks(a).blocks()
    if not isinstance(a, Iterable):
        raise ValueError(f"the stream is a {type(a).__name__}; expected row blocks, or a matrix")
    return ahead(_alike(each(lambda: a, "the stream")))


def _alike(blocks: Iterator[MatrixLike]) -> Iterator[HostArray]:
    width = dtype = None
    for i, block in enumerate(blocks):
        rows = as_array(block, f"rows of block {i}")
        if width is None or dtype is None:
            if rows.ndim != 2 or not rows.shape[1]:
                raise ValueError(f"block 0 has shape {rows.shape}; expected a matrix (rows, n)")
            width, dtype = rows.shape[1], block_dtype("block 0", rows.dtype, None)
        yield as_block(rows, f"rows of block {i}", width, dtype, fresh=False)
