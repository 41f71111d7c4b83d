"""What a factorization of a positive semidefinite matrix returns."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from nyscaled._pytree import pytree_dataclass


@pytree_dataclass
class PSDApproximation:
    """A ≈ U diag(λ) Uᴴ with orthonormal columns in U, from `nystrom`.

    Args:
        vectors: U (m, r). The largest entry of each column is positive. Columns beyond the
            numerical rank are zero.
        eigenvalues: λ (r,), falling, and 0 beyond the numerical rank.
        error_estimate: an estimate of ‖A − U diag(λ) Uᴴ‖_F, in units of A. Of a
            `linalg.KernelMatrix` it is the trace of the difference, which is at least that norm.
        numerical_rank: how many eigenvalues are not rounding.
        passes: how many thin products with A were made; 0 for a `linalg.KernelMatrix`.
        status: a `lowrank.Status`; an array of its integer after jit, vmap and other
            transformations of JAX.
        deviations: with `jackknife=True`, estimates (r,) of how far each vector would move under
            another key: the standard deviation of uuᴴ in the Frobenius norm, which is at most
            1; an estimate above 1 says that the vector is not determined.
        pivots: of a `linalg.KernelMatrix`, the indices (r,) of the columns that span U, in the
            order in which they were chosen.

    Examples:
        >>> import nyscaled as nys
        >>> psd = nys.nystrom(jnp.diag(jnp.array([3.0, 2.0, 1.0])), rank=2)
        >>> bool(jnp.allclose(psd.eigenvalues, jnp.array([3.0, 2.0])))
        True
        >>> psd.factor.shape
        (3, 2)
    """

    vectors: Inexact[Array, "*batch m r"]
    eigenvalues: Float[Array, "*batch r"]
    error_estimate: Float[Array, "*batch"]
    numerical_rank: Int[Array, "*batch"]
    passes: Int[Array, "*batch"]
    status: Any
    deviations: Float[Array, "*batch r"] | None = None
    pivots: Int[Array, "*batch r"] | None = None

    @property
    def factor(self) -> Inexact[Array, "*batch m r"]:
        """X (m, r) with XXᴴ ≈ A and orthogonal columns."""
        return self.vectors * jnp.sqrt(self.eigenvalues)[..., None, :]
