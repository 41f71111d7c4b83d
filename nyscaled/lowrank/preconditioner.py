"""The Nyström preconditioner of (A + μI)x = b, for conjugate gradients."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from nyscaled import validation
from nyscaled._pytree import pytree_dataclass
from nyscaled.lowrank.psd_result import PSDApproximation
from nyscaled.matrices import as_array
from nyscaled.numerics import full_precision
from nyscaled.typing import Number, Scalar


@pytree_dataclass
class NystromPreconditioner:
    """x ↦ P⁻¹x with P⁻¹ = (λ_r + μ) U(Λ + μI)⁻¹Uᴴ + I − UUᴴ, from `nystrom_preconditioner`.

    It is a function, as `M` of `jax.scipy.sparse.linalg.cg`, and a Hermitian matrix, by `@`.

    Args:
        vectors: U (m, r).
        weights: 1 − (λ_r + μ)/(λ_i + μ), (r,).
    """

    vectors: Inexact[Array, "m r"]
    weights: Float[Array, " r"]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, m)."""
        return len(self.vectors), len(self.vectors)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the vectors."""
        return self.vectors.dtype

    @property
    def T(self) -> NystromPreconditioner:
        """The transpose: the matrix itself, unless it is complex."""
        real = not jnp.iscomplexobj(self.vectors)
        return self if real else NystromPreconditioner(self.vectors.conj(), self.weights)

    @full_precision
    def __call__(self, x: Inexact[Array, "*n"]) -> Inexact[Array, "*n"]:
        """Return P⁻¹x of a vector (m,) or of columns (m, k)."""
        m, x = len(self.vectors), as_array("x", x)
        if jnp.ndim(x) not in (1, 2) or len(x) != m:
            raise ValueError(f"x has shape {jnp.shape(x)}; expected ({m},) or ({m}, k)")
        coordinates = self.vectors.conj().T @ x
        weights = self.weights if coordinates.ndim == 1 else self.weights[:, None]
        return x - self.vectors @ (weights * coordinates)

    def __matmul__(self, other: Inexact[Array, "*n"]) -> Inexact[Array, "*n"]:
        return self(other)


def nystrom_preconditioner(approximation: PSDApproximation, mu: Number) -> NystromPreconditioner:
    """Return the preconditioner of (A + μI)x = b that a Nyström approximation of A gives.

    With it the condition number is at most (λ_r + μ + ‖A − Â‖)/μ for the spectral norm. If the rank
    is at least twice the effective dimension tr(A(A + μI)⁻¹), that is on average a small constant,
    and conjugate gradients take a few dozen steps for any condition number of A.

    Args:
        approximation: Â = U diag(λ)Uᴴ, from `nystrom`.
        mu: μ > 0.

    Raises:
        ValueError: on another matrix than a result of `nystrom`, and if μ is not positive.

    References:
        Frangella, Tropp and Udell, Randomized Nyström preconditioning, SIAM J. Matrix Anal. Appl.
        44, 2023.

    Examples:
        >>> import nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(0), 100, 0.5 ** jnp.arange(40))
        >>> inverse = nystrom_preconditioner(nys.nystrom(a, rank=20), mu=1e-3)
        >>> b = jnp.ones(100)
        >>> def shifted(x):
        ...     return a @ x + 1e-3 * x
        >>> x, _ = jax.scipy.sparse.linalg.cg(shifted, b, maxiter=2, M=inverse)
        >>> bool(jnp.linalg.norm(shifted(x) - b) < 1e-3)
        True
    """
    if not isinstance(approximation, PSDApproximation) or approximation.vectors.ndim != 2:
        got = f"a {type(approximation).__name__}"
        if isinstance(approximation, PSDApproximation):
            got = f"a batch {approximation.vectors.shape}"
        raise ValueError(f"the approximation is {got}; expected one result of nys.nystrom")
    validation.require_positive("mu", mu)
    if jnp.ndim(mu) != 0:
        raise ValueError(f"mu has shape {jnp.shape(mu)}; expected a number (jax.vmap takes more)")
    values = approximation.eigenvalues
    mu = jnp.asarray(mu, values.dtype)
    return NystromPreconditioner(approximation.vectors, _weights(values, mu))


def _weights(values: Float[Array, " r"], mu: Scalar) -> Float[Array, " r"]:
    return (values - values[-1]) / (values + mu)
