"""What a factorization returns."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int

from nyscaled._outcome import Outcome
from nyscaled._pytree import pytree_dataclass


class Status(Outcome):
    """How a factorization ended; under jit and vmap, an array of integers.

    Examples:
        >>> Status.EXACT.message
        'the factors are the matrix, to rounding'
    """

    RANK_REACHED = 0, "the factors have the rank that was asked for"
    CONVERGED = 1, "the estimated error is at most the tolerance"
    EXACT = 2, "the factors are the matrix, to rounding"
    MAX_RANK = 3, "the estimated error is above the tolerance at the largest rank allowed"
    NON_FINITE = 4, "the matrix, or a product with it, has NaN or Inf entries"
    INDEFINITE = 5, "the matrix is not positive semidefinite"


class Deviations(NamedTuple):
    """Jackknife estimates of how far singular vectors would move under another key.

    Each is an estimate of the standard deviation of the projector uuᴴ of a vector u, in the
    Frobenius norm: far below 1 for a vector that hardly moves, above 1 for one that is arbitrary.
    """

    left: Float[Array, "*batch r"]
    right: Float[Array, "*batch r"]


@pytree_dataclass
class LowRank:
    """A ≈ L diag(s) Rᴴ with orthonormal columns in L and R, from `factorize`.

    Args:
        left: L (m, r). The largest entry of each column is positive. Columns beyond the numerical
            rank are zero.
        singular_values: s (r,), falling, and 0 beyond the numerical rank.
        right: R (n, r). Columns beyond the numerical rank are zero.
        error_estimate: an estimate of ‖A − L diag(s) Rᴴ‖_F, in units of A. The rounding of products
            is not part of it; it is usually below (16 + √max(m, n)/4)·eps·‖A‖_F.
        norm_estimate: an estimate of ‖A‖_F, in units of A.
        numerical_rank: how many singular values are not rounding.
        passes: how many thin products with A or Aᴴ were made.
        status: a `Status`; an array of its integer after jit, vmap and other transformations
            of JAX.
        deviations: `Deviations` of the singular vectors, if they were asked for.

    Examples:
        >>> import nyscaled as nys
        >>> f = nys.factorize(jnp.diag(jnp.array([3.0, 2.0, 1.0])), rank=2)
        >>> bool(jnp.allclose(f.singular_values, jnp.array([3.0, 2.0])))
        True
        >>> f"{float(f.error_estimate):.2f}, {f.status.name}"
        '1.00, RANK_REACHED'
    """

    left: Inexact[Array, "*batch m r"]
    singular_values: Float[Array, "*batch r"]
    right: Inexact[Array, "*batch n r"]
    error_estimate: Float[Array, "*batch"]
    norm_estimate: Float[Array, "*batch"]
    numerical_rank: Int[Array, "*batch"]
    passes: Int[Array, "*batch"]
    status: Any
    deviations: Deviations | None = None

    @property
    def relative_error(self) -> Float[Array, "*batch"] | Float[np.ndarray, "*batch"]:
        """The estimated error over the estimated norm; 0 for the zero matrix."""
        norm = self.norm_estimate
        # NumPy's arrays stay NumPy's, and so keep their precision where JAX's x64 is off.
        where = np.where if isinstance(norm, np.ndarray | np.generic) else jnp.where
        return where(norm == 0, 0, self.error_estimate / where(norm == 0, 1, norm))

    @property
    def adjoint(self) -> LowRank:
        """The factorization R diag(s) Lᴴ of Aᴴ; the largest entry of columns of R is positive."""
        deviations = None
        if self.deviations is not None:
            deviations = Deviations(self.deviations.right, self.deviations.left)
        left, right = with_fixed_signs(self.right, self.left)
        return dataclasses.replace(self, left=left, right=right, deviations=deviations)


def with_fixed_signs(
    left: Inexact[Array, "*batch m r"], right: Inexact[Array, "*batch n r"]
) -> tuple[Inexact[Array, "*batch m r"], Inexact[Array, "*batch n r"]]:
    """Return L and R with columns times a sign, or a phase, that leaves L diag(s) Rᴴ as it is.

    Args:
        left: L; its largest entry in each column becomes positive.
        right: R.
    """
    rows = jnp.argmax(jnp.abs(left), axis=-2, keepdims=True)
    largest = jnp.take_along_axis(left, rows, -2)
    size = jnp.abs(largest)
    sign = jnp.where(size == 0, 1, largest.conj() / jnp.where(size == 0, 1, size))
    return left * sign, right * sign
