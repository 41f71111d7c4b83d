"""Starts beside the Nyström ones: small, spectral, and that of alternating gradient descent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from nyscaled import validation
from nyscaled.initializers.nystrom_starts import random_sketch
from nyscaled.linalg import leading_factors, symmetric_part
from nyscaled.numerics import full_precision
from nyscaled.problems import Asymmetric, Symmetric
from nyscaled.typing import Factors, MatrixLike, Number, Problem, Scalar


def small(
    key: Key[Array, ""], m: int, rank: int, scale: Number = 1e-3, dtype: DTypeLike | None = None
) -> Float[Array, "m r"]:
    """Return a small random start: [X_0]_ij ~ N(0, scale²), scale = ζ.

    Args:
        key: a PRNG key.
        m: the number of rows.
        rank: the number of columns r ≥ 1.
        scale: ζ, the standard deviation of the entries.
        dtype: float32 or float64, the dtype of the result.

    Examples:
        >>> small(jax.random.key(0), m=5, rank=2).shape
        (5, 2)
    """
    validation.require_rank(rank, (m, m))
    return random_sketch(key, m, rank, scale, "gaussian", dtype or jnp.result_type(float))


def small_factors(
    key: Key[Array, ""],
    shape: tuple[int, int],
    rank: int,
    scale: Number = 1e-3,
    dtype: DTypeLike | None = None,
) -> Factors:
    """Return a small random start of both factors of (4).

    Args:
        key: a PRNG key.
        shape: the shape (m, n) of A.
        rank: the number of columns r ≥ 1.
        scale: ζ, the standard deviation of the entries.
        dtype: float32 or float64, the dtype of the result.

    Examples:
        >>> x, y = small_factors(jax.random.key(0), (6, 5), rank=2)
        >>> x.shape, y.shape, bool(jnp.abs(x).max() < 0.01)
        ((6, 2), (5, 2), True)
    """
    validation.require_rank(rank, shape)
    keys = jax.random.split(key)
    dtype = dtype or jnp.result_type(float)
    return Factors(
        *(
            random_sketch(k, s, rank, scale, "gaussian", dtype)
            for k, s in zip(keys, shape, strict=True)
        )
    )


@full_precision
def spectral(
    problem: Problem,
    rank: int,
    *,
    symmetric: bool = False,
    key: Key[Array, ""] | None = None,
) -> Array | Factors:
    """Return the spectral start: the best rank-r approximation of the problem's target, balanced.

    For (1) and (4) it is the solution. For sensing the target is 𝒜*(b), and for robust PCA the
    trimmed Y. ScaledGD's local theory requires this start. A dense target is factorized by LAPACK.
    Otherwise subspace iteration (`linalg.leading_factors`) gives a few digits with 22 products with
    the target or its transpose, and all digits if its rank is at most 2r + 8. No m×n matrix is
    formed then.

    Args:
        problem: one of `nyscaled.problems`. Where 𝒜 does not keep norms on average, as
            `phase.RankOne`, the start has the right directions and another size, which
            `rescaled(start, problem)` repairs.
        rank: 1 ≤ r ≤ min(m, n).
        symmetric: whether the start is X for XXᵀ in place of Factors, for problems that take
            both, as a square `Sensing` does. Negative eigenvalues then count as 0.
        key: for the sketch that the iteration begins with; `jax.random.key(0)` by default.

    Raises:
        ValueError: on a bad rank, `symmetric` of a rectangular problem, and as the problems do.

    Examples:
        >>> from nyscaled.problems import completion
        >>> problem = completion.bernoulli(jax.random.key(0), jnp.ones((30, 1)), probability=0.9)
        >>> x0 = spectral(problem, rank=1, symmetric=True)
        >>> bool(jnp.linalg.norm(x0 @ x0.T - 1) < 0.2 * 30)
        True
    """
    if not isinstance(problem, Problem):
        raise ValueError(
            f"problem is a {type(problem).__name__}; expected one of nyscaled.problems, such as "
            "Symmetric(a)"
        )
    symmetric = symmetric or problem.symmetric
    exact = (
        Symmetric(symmetric_part(problem.target())) if symmetric else Asymmetric(problem.target())
    )
    validation.require_rank(rank, exact.shape)
    if isinstance(exact.a, jax.Array):
        return problem.check(exact.optimum(rank))
    key = jax.random.key(0) if key is None else key
    factors = leading_factors(key, exact.a, rank, symmetric)
    return problem.check(factors.left if symmetric else factors)


@full_precision
def altgd(key: Key[Array, ""], a: MatrixLike, rank: int, norm: float | Scalar) -> Factors:
    """Return the start of alternating gradient descent: X_0 = AΦ₁/(6 √‖A‖), Y_0 = √‖A‖ Φ₂/3.

    In the reference X_0 = AΦ₁/(√η C ‖A‖) and Y_0 = √η D ‖A‖ Φ₂ with D = Cν/9. Here C = 8, ν = ½ and
    η is `solvers.altgd_learning_rate(norm)`.

    Args:
        key: PRNG key for Φ₁ (n, r), entries N(0, 1/r), and Φ₂ (n, r), entries N(0, 1/n). So
            σ_min(VᵀΦ₁) ≈ 1 − √(r_A/r): the count of the reference, κ² log 1/ε times
            r/(√r − √(r_A−1))², holds the inverse square of it.
        a: A (m, n).
        rank: columns of the factors.
        norm: ‖A‖, the largest singular value (`linalg.spectral_norm` estimates it).

    Examples:
        >>> x, y = altgd(jax.random.key(0), jnp.ones((6, 5)), rank=2, norm=30**0.5)
        >>> x.shape, y.shape
        ((6, 2), (5, 2))

    References:
        Ward and Kolda, Convergence of alternating gradient descent for matrix factorization,
        NeurIPS 2023.
    """
    a = Asymmetric(a).a
    validation.require_rank(rank, a.shape)
    validation.require_positive("norm", norm)
    n = a.shape[1]
    first, second = jax.random.split(key)
    root = jnp.sqrt(norm)
    phi1 = jax.random.normal(first, (n, rank), a.dtype) / rank**0.5
    phi2 = jax.random.normal(second, (n, rank), a.dtype) / n**0.5
    x0 = (a @ phi1) / (6 * root)
    return Factors(x0.astype(a.dtype), (root / 3 * phi2).astype(a.dtype))
