"""`nys.factorize`: a truncated SVD from thin products, with an estimate of its error."""

from __future__ import annotations

from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from nyscaled.lowrank import by_rank, streamed
from nyscaled.lowrank.adaptive import adaptive
from nyscaled.lowrank.arguments import (
    known_tolerance,
    largest_rank,
    require_no_options_of_ranks,
)
from nyscaled.lowrank.explicit import with_auto_axes
from nyscaled.lowrank.host import HostMatrix, as_input
from nyscaled.lowrank.result import LowRank, Status
from nyscaled.lowrank.streamed import StreamedMatrix
from nyscaled.typing import LinearMap, MatrixLike, Number
from nyscaled.validation import is_concrete, require_count, require_key, require_rank


@with_auto_axes
def factorize(
    a: MatrixLike,
    rank: SupportsIndex | None = None,
    *,
    tol: Number | None = None,
    key: Key[Array, ""] | None = None,
    passes: int = 6,
    oversampling: int | None = None,
    max_rank: SupportsIndex | None = None,
    jackknife: bool = False,
) -> LowRank:
    """Return a factorization A ≈ L diag(s) Rᴴ of a given rank, or of a given error.

    With `rank`, A is projected onto a block Krylov space, and truncated. It takes `passes` products
    with rank + oversampling columns each, or two if the first shows that A has this rank to
    rounding. Two passes are ScaledGD at η = 1 from a Nyström start (Theorem 3), the
    randomized SVD; more passes come closer to the best error. This form works under jit, vmap
    and grad, for matrices that JAX traces.

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
        passes: how many products with A and Aᴴ are made for a given rank, at least 2.
        oversampling: how many more columns than `rank` each product has, for a given rank. By
            default at least 4, so that the columns are a multiple of 8.
        max_rank: with `tol`, the largest rank that is allowed; min(m, n) by default.
        jackknife: whether `deviations` of the result estimate how far the singular vectors would
            move under another key, which takes an r × r SVD per column (with `rank` only).

    Returns:
        The factors; see `LowRank`. Half precision gives float32.

    Raises:
        ValueError: if A is not a matrix of floats or has NaN or Inf entries; or if not exactly
            one of `rank` and `tol` is given, or one is out of range.

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
    a = as_input("A", a, key)
    if (rank is None) == (tol is None):
        raise ValueError(f"rank is {rank} and tol is {tol}; expected exactly one of them")
    if rank is not None:
        if max_rank is not None:
            raise ValueError(f"max_rank is {max_rank} and rank is {rank}; expected max_rank=None")
        rank = require_rank(rank, a.shape)
        passes = require_count("passes", passes, 2)
        if oversampling is None:
            oversampling = 4 + -(rank + 4) % 8
        width = min(rank + require_count("oversampling", oversampling), *a.shape)
        if jackknife and width < 2:
            raise ValueError(
                f"jackknife is True for {width} column (rank {rank}, A {a.shape}); expected at "
                "least 2: it leaves out one at a time"
            )
        if isinstance(a, StreamedMatrix):
            result = streamed.of_rank(a, key, rank, width, passes, jackknife)
        else:
            result = by_rank.of_rank(a, key, rank, width, passes, jackknife)
    else:
        require_no_options_of_ranks(oversampling, jackknife)
        tolerance, limit = known_tolerance(a, tol, key), largest_rank(max_rank, a.shape)
        if isinstance(a, StreamedMatrix):
            result = streamed.of_tolerance(a, key, tolerance, limit)
        else:
            result = adaptive(a, key, tolerance, limit)
    if is_concrete(result.status):
        _require_sound(a, result)
    return result


def _require_sound(a: LinearMap | HostMatrix, result: LowRank) -> None:
    if Status(int(result.status)) is Status.NON_FINITE:
        raise ValueError("A has NaN or Inf entries, or its products overflow; expected finite ones")
    size, dtype = float(result.norm_estimate), result.norm_estimate.dtype
    limit = float(jnp.finfo(dtype).tiny) / float(jnp.finfo(dtype).eps)
    if 0 < size < limit or (size == 0 and isinstance(a, jax.Array) and np.any(np.asarray(a))):
        raise ValueError(
            f"A has a norm of about {size:.1e}, where {dtype} loses digits; expected at least "
            f"{limit:.1e} (multiply A by a power of two)"
        )
