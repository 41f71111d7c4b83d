"""The symmetric problem (1): min over X of ¼‖XXᵀ − A‖_F², A positive semidefinite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nyscaled import linalg, validation
from nyscaled._pytree import pytree_dataclass
from nyscaled.lapack import eigh
from nyscaled.matrices import as_array, as_matrix, reads
from nyscaled.numerics import full_precision
from nyscaled.typing import Scalar


@pytree_dataclass
class Symmetric:
    """Problem (1), f(X) = ¼‖XXᵀ − A‖_F² with X (m, r).

    Args:
        a: A (m, m), float32 or float64: dense, sparse or a `linalg.Operator`; see `matrices`. A
            pytree leaf, so equal shapes share compiled solvers.

    Raises:
        ValueError: if A is not a square, symmetric, finite, non-zero floating matrix. Values are
            checked by four products with random vectors, and only outside of jit. That A is
            positive semidefinite is seen where it costs nothing more: in `initializers.nystrom`
            and in `solvers.scaled_step`.

    Examples:
        >>> problem = Symmetric(jnp.diag(jnp.array([4.0, 1.0])))
        >>> problem.loss(jnp.array([[2.0], [0.0]]))
        Array(0.25, dtype=float32)
    """

    a: Any

    def __post_init__(self) -> None:
        a = as_matrix("A", self.a)
        if a.shape[0] != a.shape[1]:
            raise ValueError(
                f"A has shape {tuple(a.shape)}; a symmetric problem wants a square matrix "
                "(for rectangular ones: problems.Asymmetric)"
            )
        validation.require_sound_matrix("A", a, symmetric=True)
        object.__setattr__(self, "a", a)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, m)."""
        return self.a.shape

    @property
    def dtype(self) -> Any:
        """float32 or float64."""
        return self.a.dtype

    def residual(self, x: Float[Array, "m r"]) -> Scalar:
        """‖XXᵀ − A‖_F, the paper's optimality error, without cancellation: O(m² r) operations."""
        return linalg.residual(self.a, x, x)

    def loss(self, x: Float[Array, "m r"]) -> Scalar:
        """f(X) = ¼‖XXᵀ − A‖_F²."""
        return linalg.squared_residual(self.a, x, x) / 4

    def root_loss(self, x: Float[Array, "m r"]) -> Scalar:
        """√f, of which f may overflow or underflow."""
        return self.residual(x) / 2

    def factor_size(self) -> Scalar:
        """About √‖A‖_F, the size of factors of A."""
        return jnp.sqrt(linalg.probed_norm(self.a))

    @reads(x=as_array)
    @full_precision
    def gradient(self, x: Float[Array, "m r"]) -> Float[Array, "m r"]:
        """∇f(X) = X(XᵀX) − AX, with no m×m intermediate."""
        return x @ (x.T @ x) - self.a @ x

    def optimum(self, rank: int) -> Float[Array, "m r"]:
        """The global optimum X* = Q₁Σ₁^{1/2} of Lemma 3 (dense A only; an eigendecomposition)."""
        validation.require_rank(rank, self.shape)
        if not isinstance(self.a, jax.Array):
            raise ValueError(f"A is a {type(self.a).__name__}; optimum wants a dense matrix")
        values, vectors = eigh(self.a)
        top = jnp.maximum(values[-rank:][::-1], 0)
        return vectors[:, -rank:][:, ::-1] * jnp.sqrt(top)

    def check(self, x: Any) -> Float[Array, "m r"]:
        """`x` as a factor of this problem; ValueError if it cannot be one."""
        m = self.shape[0]
        x = as_array("X", x)
        if x.ndim != 2 or x.shape[0] != m:
            raise ValueError(f"X has shape {x.shape}; expected ({m}, r) for A {self.shape}")
        validation.require_rank(x.shape[1], self.shape)
        validation.require_floating("X", x)
        return jnp.asarray(x, self.dtype)
