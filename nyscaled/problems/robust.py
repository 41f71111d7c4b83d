"""Robust PCA: a low-rank M from Y = M + S, where S is sparse and its entries may be of any size.

T_α[A] keeps the entries of A that are among the largest, by magnitude, of their row and of their
column, a fraction α of each. At factors (L, R) the residual Y − LRᵀ is read as sparse where T
finds it large, and the factors explain only the remaining entries.

References:
    Tong, Ma, Chi, Accelerating ill-conditioned low-rank matrix estimation via scaled gradient
    descent, JMLR 2021 (ScaledGD; step sizes up to 2/3, 1/2 in its experiments). Yi, Park, Chen,
    Caramanis, Fast algorithms for robust PCA via gradient descent, NeurIPS 2016 (GD).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from nyscaled import validation
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.matrices import as_dense, as_factors, reads, transpose_times
from nyscaled.numerics import full_precision, norm, normalized, shift
from nyscaled.spectra import random_factor
from nyscaled.typing import Factors, Number, Scalar, Values

__all__ = [
    "RobustPCA",
    "corrupted",
    "threshold",
]

_ROWS = 32  # of which thresholds are found at once: they stay in the cache over all passes


def _order_statistics(rows: Int[Array, "m n"], count: Any) -> Int[Array, " m"]:
    """The count-th largest of each row of non-negative integers, bit by bit; beyond all at 0.

    Magnitudes of floats are ordered as their bits, so that 31 counts find what a sort would, at
    less than a tenth of its time on CPU, and `count` may be traced.
    """
    bits = jnp.iinfo(rows.dtype).bits - 1

    def of_row(row: Array) -> Array:
        def refine(i: Any, threshold: Array) -> Array:
            candidate = threshold | (jnp.ones((), row.dtype) << (bits - 1 - i))
            return jnp.where(jnp.sum(row >= candidate) >= count, candidate, threshold)

        return lax.fori_loop(0, bits, refine, jnp.zeros((), row.dtype))

    return lax.map(of_row, rows, batch_size=_ROWS)


@jax.jit
def _largest(a: Float[Array, "m n"], fraction: Number) -> Bool[Array, "m n"]:
    """Where T keeps entries."""
    integer = jnp.int32 if a.dtype == jnp.float32 else jnp.int64
    bits = lax.bitcast_convert_type(jnp.abs(lax.stop_gradient(a)), integer)
    m, n = a.shape
    row = _order_statistics(bits, jnp.round(fraction * n))
    column = _order_statistics(bits.T, jnp.round(fraction * m))
    return bits >= jnp.maximum(row[:, None], column)


@reads(a=as_dense)
def threshold(a: Float[Array, "m n"], fraction: Number) -> Float[Array, "m n"]:
    """Return T_α[A]: the entries among the largest of their row and of their column.

    Args:
        a: (m, n), float32 or float64.
        fraction: α in [0, 1]: the nearest integers to α n entries of a row and α m of a column
            (more if magnitudes tie). May be traced.

    Raises:
        ValueError: on another dtype and on a fraction outside [0, 1].

    Examples:
        >>> threshold(jnp.array([[9.0, 1.0], [-8.0, 2.0]]), fraction=0.5)
        Array([[9., 0.],
               [0., 0.]], dtype=float32)
    """
    validation.require_scalar("fraction", fraction, 0, 1, open_low=False)
    return jnp.where(_largest(a, fraction), a, 0)


@pytree_dataclass
class RobustPCA:
    """f(L, R) = ½‖LRᵀ + S − Y‖_F² with S = T_γα[Y − LRᵀ], at `Factors`.

    S is constant except where magnitudes tie, so ∇f is that of (4) with A = Y − S. A step costs
    the three products of a dense residual, 6 m n r operations, and 62 passes over it for T (126 in
    float64), which take longer where r is small.

    The condition number κ of M does not slow ScaledGD, but the start has to be near: from the
    spectral one α may be of the order of 1/(μ r^{3/2} κ), where M is μ-incoherent.

    Args:
        observed: Y (m, n), dense, float32 or float64.
        fraction: α ≥ the share of corrupt entries in any row or column. May be traced.
        slack: γ ≥ 1, γα < 1. 2 is the reference's, which leaves room for entries that look corrupt
            while the factors are far off.

    Raises:
        ValueError: on Y that is not a finite, non-zero floating matrix (values outside of jit
            only), and on α or γ out of range.

    Examples:
        >>> truth = Factors(jnp.ones((20, 1)), jnp.ones((10, 1)))
        >>> problem = RobustPCA(jnp.ones((20, 10)).at[3, 4].set(1e6), fraction=0.1)
        >>> problem.loss(truth), problem.sparse(truth)[3, 4], problem.target()[3, 4]
        (Array(0., dtype=float32), Array(999999., dtype=float32), Array(0., dtype=float32))
    """

    observed: Array = field(converter=functools.partial(as_dense, "Y"))
    fraction: Number
    slack: Number = 2.0
    symmetric = False

    def __post_init__(self) -> None:
        validation.require_sound_matrix("Y", self.observed, symmetric=False)
        validation.require_scalar("fraction", self.fraction, 0, 1, open_low=True)
        validation.require_at_least("slack", self.slack, 1)
        removed = self.fraction * self.slack
        if validation.is_concrete(removed) and float(removed) >= 1:
            got = f"fraction · slack is {float(removed):g}"
            raise ValueError(f"{got}; expected less than 1, or all entries are corrupt")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (m, n) of Y."""
        return self.observed.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype, float32 or float64."""
        return self.observed.dtype

    @full_precision
    def sparse(self, factors: Factors) -> Float[Array, "m n"]:
        """Return S = T_γα[Y − LRᵀ]."""
        return threshold(-self._residual(factors), self._removed())

    @full_precision
    def loss(self, factors: Factors) -> Scalar:
        """Return f(L, R), of the entries that T leaves to the factors."""
        kept, e = normalized(self._kept(factors))
        return shift(shift(jnp.sum(kept**2) / 2, e), e)

    @full_precision
    def root_loss(self, factors: Factors) -> Scalar:
        """Return √f, where f itself may overflow or underflow."""
        return norm(self._kept(factors)) / 2**0.5

    def factor_size(self) -> Scalar:
        """Return √‖Y‖_F, at least about the size of factors of what is sought."""
        return jnp.sqrt(norm(self.observed))

    @full_precision
    def gradient(self, factors: Factors) -> Factors:
        """Return (GR, GᵀL) with G = LRᵀ + S − Y."""
        kept = self._kept(factors)
        left, right = as_factors(factors)
        return Factors(kept @ right, transpose_times(kept, left))

    def target(self) -> Float[Array, "m n"]:
        """Return Y − T_α[Y] (m, n), the trimmed Y, from which starts are made.

        `initializers.spectral(problem, rank)` is the spectral start, by an SVD;
        `initializers.nystrom_factors(key, problem.target(), rank)` is the Nyström start.
        """
        return self.observed - threshold(self.observed, self.fraction)

    def check(self, factors: object) -> Factors:
        """Return `factors` as a point of this problem; ValueError if it cannot be one."""
        left, right = validation.require_factors(factors, self.shape)
        return Factors(jnp.asarray(left, self.dtype), jnp.asarray(right, self.dtype))

    def _removed(self) -> Number:
        return self.fraction * self.slack

    def _residual(self, factors: Factors) -> Float[Array, "m n"]:
        """LRᵀ − Y."""
        left, right = as_factors(factors)
        return left @ right.T - self.observed

    def _kept(self, factors: Factors) -> Float[Array, "m n"]:
        """LRᵀ + S − Y."""
        residual = self._residual(factors)
        return jnp.where(_largest(residual, self._removed()), 0, residual)


@full_precision
def corrupted(
    key: Key[Array, ""], m: int, n: int, spectrum: Values, fraction: Number, size: Number = 10.0
) -> tuple[RobustPCA, Factors]:
    """Return a random M of given singular values, with a fraction of its entries grossly wrong.

    S is T_α of a Gaussian matrix, at most a fraction α in any row and column, times `size`.

    Args:
        key: PRNG key of M and S.
        m: rows of M.
        n: columns of M.
        spectrum: the k ≤ min(m, n) positive singular values of M.
        fraction: α in (0, ½), of S and of the problem. May be traced.
        size: the scale of the entries of S, in units of the root mean square entry of M. May be
            traced.

    Returns:
        The problem and the balanced factors of M, in JAX's default float.

    Raises:
        ValueError: on a bad spectrum, fraction or size.

    Examples:
        >>> problem, truth = corrupted(jax.random.key(0), 20, 10, [1.0], fraction=0.1)
        >>> wrong = jnp.abs(problem.observed - truth.left @ truth.right.T) > 1e-6
        >>> bool(problem.loss(truth) < 1e-10), int(jnp.max(jnp.sum(wrong, axis=0)))
        (True, 2)
    """
    validation.require_positive("size", size)
    left_key, right_key, sparse_key = jax.random.split(key, 3)
    limit = min(m, n)
    left = random_factor(left_key, m, spectrum, limit)
    right = random_factor(right_key, n, spectrum, limit)
    truth = left @ right.T
    scale = size * norm(truth) / (m * n) ** 0.5
    sparse = threshold(jax.random.normal(sparse_key, (m, n), truth.dtype), fraction)
    return RobustPCA(truth + scale * sparse, fraction), Factors(left, right)
