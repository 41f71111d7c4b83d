"""The symmetric problem (1): min over X of ¼‖XXᵀ − A‖_F², A positive semidefinite."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nyscaled import linalg, validation
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.lapack import eigh
from nyscaled.matrices import as_array, as_matrix, reads
from nyscaled.numerics import full_precision, norm
from nyscaled.typing import LinearMap, MatrixLike, Scalar


@pytree_dataclass
class Symmetric:
    """Problem (1), f(X) = ¼‖XXᵀ − A‖_F² with X (m, r).

    Args:
        a: A (m, m), float32 or float64: dense, sparse or a `linalg.Operator`; see `matrices`. A
            pytree leaf, so equal shapes share compiled solvers.

    Raises:
        ValueError: if A is not a square, symmetric, finite, non-zero floating matrix. Values are
            checked by four products with random vectors, and only outside of jit. Whether A is
            positive semidefinite is checked by `initializers.nystrom`, and at the start of a run
            of `solvers.scaled_step`.

    Examples:
        >>> problem = Symmetric(jnp.diag(jnp.array([4.0, 1.0])))
        >>> problem.loss(jnp.array([[2.0], [0.0]]))
        Array(0.25, dtype=float32)
    """

    a: MatrixLike = field(converter=functools.partial(as_matrix, "A"))
    symmetric = True

    def __post_init__(self) -> None:
        if self.shape[0] != self.shape[1]:
            raise ValueError(
                f"A has shape {tuple(self.shape)}; expected a square matrix "
                "(for rectangular ones: problems.Asymmetric)"
            )
        validation.require_sound_matrix("A", self.a, symmetric=True)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, m) of A."""
        return self.a.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype, float32 or float64."""
        return self.a.dtype

    def residual(self, x: Float[Array, "m r"]) -> Scalar:
        """Return ‖XXᵀ − A‖_F, the paper's error, without cancellation: O(m² r) operations."""
        return linalg.residual(self.a, x, x)

    def loss(self, x: Float[Array, "m r"]) -> Scalar:
        """Return f(X) = ¼‖XXᵀ − A‖_F²."""
        return linalg.squared_residual(self.a, x, x) / 4

    def root_loss(self, x: Float[Array, "m r"]) -> Scalar:
        """Return √f, where f itself may overflow or underflow."""
        return self.residual(x) / 2

    def factor_size(self) -> Scalar:
        """Return about √‖A‖_F, the size of factors of A."""
        return jnp.sqrt(linalg.probed_norm(self.a))

    @reads(x=as_array)
    @full_precision
    def gradient(self, x: Float[Array, "m r"]) -> Float[Array, "m r"]:
        """Return ∇f(X) = (XXᵀ − A)X, with no m×m intermediate if A is not dense."""
        if isinstance(self.a, jax.Array):  # as in `Asymmetric.gradient`
            return (x @ x.T - self.a) @ x
        return x @ (x.T @ x) - self.a @ x

    def optimum(self, rank: int) -> Float[Array, "m r"]:
        """Return the optimum X* = Q₁Σ₁^{1/2} of Lemma 3, by eigenvectors of a dense A."""
        validation.require_rank(rank, self.shape)
        if not isinstance(self.a, jax.Array):
            raise ValueError(
                f"A is a {type(self.a).__name__}; expected a dense matrix, which optimum factorizes"
            )
        values, vectors = eigh(self.a)
        top = jnp.maximum(values[-rank:][::-1], 0)
        return vectors[:, -rank:][:, ::-1] * jnp.sqrt(top)

    def target(self) -> LinearMap:
        """Return A."""
        return self.a

    @full_precision
    def measured_norm(self, x: Float[Array, "m r"]) -> Scalar:
        """Return ‖XXᵀ‖_F."""
        return norm(x.T @ x)

    def check(self, x: object) -> Float[Array, "m r"]:
        """Return `x` as a factor of this problem; ValueError if it cannot be one."""
        return jnp.asarray(validation.require_factor("X", x, self.shape), self.dtype)
