"""The asymmetric problem (4): min over X, Y of ½‖XYᵀ − A‖_F²."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from nyscaled import linalg, validation
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.lapack import svd
from nyscaled.matrices import as_factors, as_matrix, transpose_times
from nyscaled.numerics import full_precision
from nyscaled.typing import Factors, LinearMap, MatrixLike, Scalar


@pytree_dataclass
class Asymmetric:
    """Problem (4), f(X, Y) = ½‖XYᵀ − A‖_F² with X (m, r) and Y (n, r), given as `Factors`.

    A LoRA layer W₀ + XYᵀ fitted to B on whitened data is this problem with A = B − W₀ (A.2).

    Args:
        a: A (m, n), float32 or float64: dense, sparse or a `linalg.Operator`; see `matrices`. A
            pytree leaf, so equal shapes share compiled solvers.

    Raises:
        ValueError: if A is not a finite, non-zero floating matrix. Values are checked by four
            products with random vectors, and only outside of jit.

    Examples:
        >>> problem = Asymmetric(jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> problem.loss(problem.optimum(rank=1))
        Array(0.5, dtype=float32)
    """

    a: MatrixLike = field(converter=functools.partial(as_matrix, "A"))
    symmetric = False

    def __post_init__(self) -> None:
        validation.require_sound_matrix("A", self.a, symmetric=False)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of A."""
        return self.a.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype, float32 or float64."""
        return self.a.dtype

    def residual(self, factors: Factors) -> Scalar:
        """Return ‖XYᵀ − A‖_F, without cancellation: O(m n r) operations."""
        return linalg.residual(self.a, *factors)

    def loss(self, factors: Factors) -> Scalar:
        """Return f(X, Y) = ½‖XYᵀ − A‖_F²."""
        return linalg.squared_residual(self.a, *factors) / 2

    def root_loss(self, factors: Factors) -> Scalar:
        """Return √f, where f itself may overflow or underflow."""
        return self.residual(factors) / 2**0.5

    def factor_size(self) -> Scalar:
        """Return about √‖A‖_F, the size of factors of A."""
        return jnp.sqrt(linalg.probed_norm(self.a))

    @full_precision
    def gradient(self, factors: Factors) -> Factors:
        """Return (RY, RᵀX), where R = XYᵀ − A; with no m×n intermediate if A is not dense."""
        x, y = as_factors(factors)
        if isinstance(self.a, jax.Array):
            # In a difference of sums the rounding would be that of A, not of R, and ScaledGD
            # multiplies it by κ.
            residual = x @ y.T - self.a
            return Factors(residual @ y, transpose_times(residual, x))
        return Factors(x @ (y.T @ y) - self.a @ y, y @ (x.T @ x) - transpose_times(self.a, x))

    def optimum(self, rank: int) -> Factors:
        """Return the balanced optimum (U₁Σ₁^{1/2}, V₁Σ₁^{1/2}) of Lemma 13, for a dense A."""
        validation.require_rank(rank, self.shape)
        if not isinstance(self.a, jax.Array):
            raise ValueError(
                f"A is a {type(self.a).__name__}; expected a dense matrix, which optimum factorizes"
            )
        u, s, vt = svd(self.a)
        root = jnp.sqrt(s[:rank])
        return Factors(u[:, :rank] * root, vt[:rank].T * root)

    def target(self) -> LinearMap:
        """Return A."""
        return self.a

    def check(self, factors: object) -> Factors:
        """Return `factors` as a point of this problem; ValueError if it cannot be one."""
        left, right = validation.require_factors(factors, self.shape)
        return Factors(jnp.asarray(left, self.dtype), jnp.asarray(right, self.dtype))
