"""`nys.factorize`: a truncated SVD from thin products, with an estimate of its error."""

from __future__ import annotations

import dataclasses
from typing import SupportsIndex

import jax
import numpy as np
from jax.experimental import sparse
from jaxtyping import Array, Key

from nyscaled.lowrank import by_rank, streamed
from nyscaled.lowrank.adaptive import adaptive
from nyscaled.lowrank.arguments import (
    known_tolerance,
    largest_rank,
    require_sound,
    require_unset,
)
from nyscaled.lowrank.explicit import with_auto_axes
from nyscaled.lowrank.host import HostMatrix, as_input
from nyscaled.lowrank.products import require_adjoint
from nyscaled.lowrank.result import LowRank, Status
from nyscaled.lowrank.stream import RowBlocks
from nyscaled.lowrank.streamed import StreamedMatrix
from nyscaled.matrices import is_scipy
from nyscaled.operators import Operator, as_shape
from nyscaled.typing import LinearMap, MatrixLike, Number
from nyscaled.validation import (
    is_concrete,
    require_count,
    require_digits,
    require_key,
    require_rank,
)


@with_auto_axes
def factorize(
    a: MatrixLike,
    rank: SupportsIndex | None = None,
    *,
    tol: Number | None = None,
    key: Key[Array, ""] | None = None,
    passes: int | None = None,
    oversampling: int | None = None,
    max_rank: SupportsIndex | None = None,
    jackknife: bool = False,
) -> LowRank:
    """Return a factorization A ≈ L diag(s) Rᴴ of a given rank, or of a given error.

    With `rank`, A is projected onto a block Krylov space, and truncated. It takes `passes` products
    with rank + oversampling columns each, or two if the first shows that A has this rank to
    rounding. Two passes are ScaledGD at η = 1 from a Nyström start (Theorem 3), the
    randomized SVD; more passes come closer to the best error. This form works under jit, vmap
    and grad, for matrices that JAX traces. Second derivatives are right only where the singular
    values of the result differ.

    With `tol`, blocks are added until the estimated error is at most tol·‖A‖_F; then the smallest
    rank that meets it is kept.

    The error is estimated from products of A with random columns that are made anyhow. It is below
    half the error with a probability of at most 2 %, for two passes if `oversampling` is at least
    3; see `lowrank.estimate`.

    Args:
        a: A (m, n): a dense array of NumPy or JAX (also bfloat16, float16 and complex), a sparse
            matrix of JAX or SciPy, an operator, or a `lowrank.HostMatrix`.
        rank: 1 ≤ r ≤ min(m, n); or give `tol`.
        tol: a bound of ‖A − L diag(s) Rᴴ‖_F / ‖A‖_F, in Frobenius norms, in (0, 1].
        key: PRNG key of the random columns; `jax.random.key(0)` by default.
        passes: how many products with A and Aᴴ are made for a given rank, at least 2; 6 by
            default.
        oversampling: how many more columns than `rank` each product has, for a given rank. By
            default at least 4, so that the columns are a multiple of 8.
        max_rank: with `tol`, the largest rank that is allowed; min(m, n) by default.
        jackknife: whether `deviations` of the result estimate how far the singular vectors would
            move under another key, which takes an r × r SVD per column (with `rank` only).

    Returns:
        The factors; see `LowRank`. Half precision gives float32.

    Raises:
        ValueError: if A is not a matrix of floats or has NaN or Inf entries; if not exactly one
            of `rank` and `tol` is given, or one is out of range; on an option of the other one;
            and if the two products of an operator disagree for random columns.

    References:
        Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53, 2011.
        Musco and Musco, Randomized block Krylov methods, NeurIPS 2015.

    Examples:
        >>> a = jnp.outer(jnp.arange(4.0), jnp.arange(1.0, 4.0))
        >>> f = factorize(a, rank=1)
        >>> bool(jnp.allclose(f.left * f.singular_values @ f.right.T, a, atol=1e-5))
        True
        >>> factorize(jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.001])), tol=1e-2).left.shape
        (4, 3)
    """
    key = jax.random.key(0) if key is None else require_key("key", key)
    source, a = a, as_input("A", a, key)
    shape = as_shape("A", a.shape)
    if isinstance(a, Operator) and is_concrete((a, np.empty(1), key)):
        require_adjoint("A", a)
    if (rank is None) == (tol is None):
        raise ValueError(f"rank is {rank} and tol is {tol}; expected exactly one of them")
    if rank is not None:
        require_unset(f"rank is {rank}; expected max_rank=None", max_rank=max_rank)
        rank = require_rank(rank, shape)
        passes = 6 if passes is None else require_count("passes", passes, 2)
        if oversampling is None:
            oversampling = 4 + -(rank + 4) % 8
        width = min(rank + require_count("oversampling", oversampling), *shape)
        if jackknife and width < 2:
            raise ValueError(
                f"jackknife is True for {width} column (rank {rank}, A {shape}); expected at "
                "least 2: it leaves out one at a time"
            )
        if isinstance(a, StreamedMatrix):
            result = streamed.of_rank(a, key, rank, width, passes, jackknife)
        else:
            result = by_rank.of_rank(a, key, rank, width, passes, jackknife)
    else:
        require_unset(
            "tol is given; expected a rank",
            passes=passes,
            oversampling=oversampling,
            jackknife=jackknife,
        )
        tolerance, limit = known_tolerance(a, tol, key), largest_rank(max_rank, shape)
        if isinstance(a, StreamedMatrix):
            result = streamed.of_tolerance(a, key, tolerance, limit)
        else:
            result = adaptive(a, key, tolerance, limit)
    if is_concrete(result.status):
        require_sound(result)
        if float(result.norm_estimate) == 0 and _has_entries(source, a):
            require_digits(0.0, result.norm_estimate.dtype)
        result = dataclasses.replace(result, status=Status(int(result.status)))
    return result


def _has_entries(source: MatrixLike, a: LinearMap | HostMatrix) -> bool:
    """Whether NumPy, which keeps numbers that XLA takes as zero, sees an entry of A, or of A x.

    Of an array that was given in double precision also those that single precision takes as zero.
    """
    if isinstance(a, RowBlocks):  # a memory map too, which is not read as a whole
        return any(np.any(block) for block in a.blocks())
    if isinstance(source, np.ndarray) or is_scipy(source):
        return bool(np.any(source if isinstance(source, np.ndarray) else source.tocsr().data))
    if isinstance(a, HostMatrix):
        x = 8 * np.random.default_rng(0).standard_normal((a.shape[1], 2))
        return bool(np.any(a.times(x.astype(a.dtype))))
    entries = a.data if isinstance(a, sparse.BCOO) else a
    known = isinstance(entries, jax.Array) and is_concrete(entries)
    return known and bool(np.any(np.asarray(entries)))
