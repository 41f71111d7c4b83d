"""Randomly pivoted Cholesky factorization of a kernel matrix, by blocks of columns.

Pivots are drawn by the diagonal of what is left, A − FFᵀ. In blocks: proposals are drawn by the
diagonal before the block, and a proposal i is kept with the probability that its diagonal entry,
with the pivots that the block has by now, has of the one it was drawn by. So pivots have the
distribution of one draw after another, and columns are still evaluated and multiplied by blocks.

References:
    Chen, Epperly, Tropp and Webber, Randomly pivoted Cholesky: practical approximation of a kernel
    matrix with few entry evaluations, Comm. Pure Appl. Math. 78, 2025.

    Epperly, Tropp and Webber, Embrace rejection: kernel matrix approximation by accelerated
    randomly pivoted Cholesky, 2024.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from nyscaled import validation
from nyscaled.lapack import inverse_upper
from nyscaled.linalg import KernelMatrix
from nyscaled.linalg.kernels import evaluate
from nyscaled.lowrank.explicit import with_auto_axes
from nyscaled.numerics import full_precision, normalized, shift
from nyscaled.typing import MatrixLike, Number, Scalar

_BLOCK = 64  # columns evaluated at once, at most
_ROUNDS = 4  # of proposals per block


class PivotedCholesky(NamedTuple):
    """A ≈ FFᵀ, from `pivoted_cholesky`; FFᵀ equals A in the rows and columns of the pivots."""

    factor: Float[Array, "n r"]
    """F; columns beyond the numerical rank are zero."""
    pivots: Int[Array, " r"]
    """The indices of the columns of A that span F, in the order of F; −1 beyond the rank."""
    residual: Float[Array, " n"]
    """The diagonal of A − FFᵀ, at least 0; its sum is the trace norm of A − FFᵀ."""
    numerical_rank: Int[Array, ""]
    """The number of pivots."""


class _State(NamedTuple):
    factor: Float[Array, "n r"]
    pivots: Int[Array, " r"]
    residual: Float[Array, " n"]
    least: Scalar
    size: Int[Array, ""]
    blocks: Int[Array, ""]


class _Block(NamedTuple):
    """Pivots that were accepted, the Cholesky factor of A − FFᵀ at them, and how many there are."""

    pivots: Int[Array, " b"]
    lower: Float[Array, "b b"]
    size: Int[Array, ""]
    rounds: Int[Array, ""]


@with_auto_axes
def pivoted_cholesky(
    a: MatrixLike,
    rank: SupportsIndex,
    *,
    key: Key[Array, ""] | None = None,
    tol: Number = 0.0,
) -> PivotedCholesky:
    """Return a partial Cholesky factor of a kernel matrix, with random pivots.

    It evaluates (r + 1)·n entries of A, and some thousand more per block of at most 64 columns;
    more only where A has about the rank r to rounding. The trace norm of the error is the sum of
    `residual`. On average it is within a factor 1 + ε of the best error of
    rank s once r is a little more than s/ε. Points whose entry of `residual` is rounding become no
    pivots, so that no square root of a negative number is taken in float32.

    Args:
        a: the kernel matrix (n, n).
        rank: the number of columns r, 1 ≤ r ≤ n; with `tol` the largest number.
        key: PRNG key of the pivots; `jax.random.key(0)` by default.
        tol: the factorization ends once the trace of A − FFᵀ is at most this times that of A;
            0 ≤ tol < 1.

    Raises:
        ValueError: on a rank or a `tol` out of range, a diagonal with entries that are not finite
            or negative, or a kernel that turns out to be indefinite (outside of jit).

    Examples:
        >>> import nyscaled as nys
        >>> points = jnp.linspace(0.0, 1.0, 50)[:, None]
        >>> a = nys.linalg.KernelMatrix(nys.linalg.kernels.gaussian(0.3), points)
        >>> f = pivoted_cholesky(a, rank=8)
        >>> error = a @ jnp.eye(50) - f.factor @ f.factor.T
        >>> bool(jnp.allclose(jnp.trace(error), jnp.sum(f.residual), atol=1e-4))
        True
    """
    if not isinstance(a, KernelMatrix):
        raise ValueError(f"A is a {type(a).__name__}; expected a nys.linalg.KernelMatrix")
    rank = validation.require_rank(rank, a.shape)
    validation.require_nonnegative("tol", tol)
    if jnp.ndim(tol) != 0 or (validation.is_concrete(tol) and float(tol) >= 1):
        raise ValueError(f"tol is {tol}; expected a number in [0, 1)")
    key = jax.random.key(0) if key is None else validation.require_key("key", key)
    result, least, largest = _factorization(a, key, jnp.asarray(tol, a.dtype), rank)
    if validation.is_concrete(largest) and not bool(jnp.isfinite(largest)):
        raise ValueError(
            f"A has a diagonal entry of {largest}; expected a kernel with finite values at the "
            f"points (in {a.dtype}; divide the points or the kernel by a number)"
        )
    if validation.is_concrete(least) and not float(least) > -(float(jnp.finfo(a.dtype).eps) ** 0.5):
        raise ValueError(
            f"A is not positive semidefinite: a diagonal entry of the residual is {least:.1e} "
            "times that of A; expected a positive semidefinite kernel with finite values"
        )
    return result


@functools.partial(jax.jit, static_argnames="rank")
@full_precision
def _factorization(
    a: KernelMatrix, key: Key[Array, ""], tol: Scalar, rank: int
) -> tuple[PivotedCholesky, Scalar, Scalar]:
    """The factorization, the least entry of its residual before it was cut off at 0, and of A the
    largest entry."""
    n, dtype = a.shape[0], a.dtype
    width = -(-rank // -(-rank // _BLOCK))  # so that the last block is about full
    diagonal = a.diagonal()
    rounding = 8 * rank**0.5 * float(jnp.finfo(dtype).eps) * diagonal
    points = a.points
    _, e = normalized(diagonal)  # the trace may be too large for the dtype
    trace = jnp.sum(shift(diagonal, -e))

    def unfinished(state: _State) -> Bool[Array, ""]:
        left = jnp.sum(shift(state.residual, -e)) > tol * trace
        possible = jnp.any(state.residual > rounding) & (state.blocks < rank)
        return (state.size < rank) & left & possible

    def extend(state: _State) -> _State:
        weights = jnp.where(state.residual > rounding, state.residual, 0)
        limit = jnp.minimum(width, rank - state.size)
        block_key = jax.random.fold_in(key, state.blocks)

        def propose(block: _Block) -> _Block:
            draw_key, keep_key = jax.random.split(jax.random.fold_in(block_key, block.rounds))
            proposals = _draws(draw_key, shift(weights, -e), width)
            both = jnp.concatenate([block.pivots, proposals])
            rows = state.factor[both]
            left = evaluate(a.kernel, points[both], points[both]) - rows @ rows.T
            accepted = jnp.arange(width) < block.size
            levels = jax.random.uniform(keep_key, (width,), dtype) * weights[proposals]
            levels = jnp.maximum(levels, rounding[proposals])
            kept, lower = _eliminated(left, accepted, levels, limit)
            order = jnp.argsort(~kept, stable=True)[:width]
            count = jnp.sum(kept, dtype=jnp.int32)
            live = jnp.arange(width) < count
            lower = jnp.where(live & live[:, None], lower[order][:, order], 0)
            return _Block(both[order], lower, count, block.rounds + 1)

        def unfilled(block: _Block) -> Bool[Array, ""]:
            return (block.size < limit) & (block.rounds < _ROUNDS)

        zero = jnp.zeros((), jnp.int32)
        empty = _Block(jnp.zeros(width, jnp.int32), jnp.zeros((width, width), dtype), zero, zero)
        block = lax.while_loop(unfilled, propose, empty)
        live = jnp.arange(width) < block.size
        upper = block.lower.T + jnp.diag(jnp.where(live, 0, 1).astype(dtype))
        root = jnp.where(live, inverse_upper(upper), 0)
        columns = a.columns(block.pivots) - state.factor @ state.factor[block.pivots].T
        columns = columns @ root
        factor = _written(state.factor, columns, state.size, axis=1)
        pivots = _written(state.pivots, jnp.where(live, block.pivots, -1), state.size, axis=0)
        residual = state.residual - jnp.sum(columns**2, axis=1)
        least = jnp.min(residual / jnp.where(diagonal > 0, diagonal, 1))
        residual = jnp.maximum(residual, 0)
        done = jnp.where(live, block.pivots, n)
        residual = residual.at[done].set(0, mode="drop")
        return _State(
            factor,
            pivots,
            residual,
            jnp.minimum(state.least, least),
            state.size + block.size,
            state.blocks + 1,
        )

    zero = jnp.zeros((), jnp.int32)
    start = _State(
        jnp.zeros((n, rank), dtype),
        jnp.full(rank, -1, jnp.int32),
        jnp.maximum(diagonal, 0),
        jnp.min(diagonal),
        zero,
        zero,
    )
    end = lax.while_loop(unfinished, extend, start)
    result = PivotedCholesky(end.factor, end.pivots, end.residual, end.size)
    return result, end.least, jnp.max(diagonal)


def _draws(key: Key[Array, ""], weights: Float[Array, " n"], count: int) -> Int[Array, " b"]:
    """Independent indices with probabilities in proportion to the weights.

    First a group of about √n indices and then one of the group, whose sums lose fewer digits than
    those over all.
    """
    n = len(weights)
    width = max(1, round(n**0.5))
    groups = jnp.pad(weights, (0, -n % width)).reshape(-1, width)
    sums = jnp.sum(groups, axis=1)
    ends = jnp.cumsum(sums)
    place = jax.random.uniform(key, (count,), weights.dtype) * ends[-1]
    group = jnp.minimum(jnp.searchsorted(ends, place, side="right"), len(sums) - 1)
    inside = jnp.cumsum(groups[group], axis=1)
    place = jnp.minimum(place - (ends - sums)[group], inside[:, -1])
    item = jnp.sum(inside < place[:, None], axis=1)
    return jnp.minimum(group * width + item, n - 1).astype(jnp.int32)


def _eliminated(
    left: Float[Array, "c c"],
    accepted: Bool[Array, " b"],
    levels: Float[Array, " b"],
    limit: Int[Array, ""],
) -> tuple[Bool[Array, " c"], Float[Array, "c c"]]:
    """Which rows are pivots, and the Cholesky factor of the matrix at them, zero elsewhere.

    Args:
        left: what is left of A at b accepted pivots and b proposals.
        accepted: which of the first b rows are pivots already.
        levels: how large its diagonal entry must be for a proposal to become a pivot.
        limit: the number of pivots at most.
    """
    size = len(left)
    lowest = jnp.where(accepted, -jnp.inf, jnp.inf).astype(left.dtype)
    levels = jnp.concatenate([lowest, levels])

    def eliminate(
        i: Int[Array, ""],
        state: tuple[Float[Array, "c c"], Bool[Array, " c"], Float[Array, "c c"]],
    ) -> tuple[Float[Array, "c c"], Bool[Array, " c"], Float[Array, "c c"]]:
        left, kept, lower = state
        pivot = left[i, i]
        keep = (pivot > levels[i]) & (jnp.sum(kept) < limit)
        column = jnp.where(keep, left[:, i] / jnp.sqrt(jnp.where(keep, pivot, 1)), 0)
        left = left - column[:, None] * column
        return left, kept.at[i].set(keep), lower.at[:, i].set(column)

    start = left, jnp.zeros(size, bool), jnp.zeros_like(left)
    _, kept, lower = lax.fori_loop(0, size, eliminate, start)
    return kept, lower


def _written(array: Array, block: Array, start: Int[Array, ""], axis: int) -> Array:
    """The array with a block from `start` on; what would lie beyond its end is left out."""
    width, size = block.shape[axis], array.shape[axis]
    first = jnp.minimum(start, size - width)
    old = lax.dynamic_slice_in_dim(array, first, width, axis)
    fresh = jnp.arange(width) >= start - first
    moved = jnp.roll(block, start - first, axis)
    return lax.dynamic_update_slice_in_dim(array, jnp.where(fresh, moved, old), first, axis)
