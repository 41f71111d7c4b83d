"""Leading singular triples and eigenpairs of a matrix that is known by its products alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from nyscaled.lapack import eigh, qr, svd
from nyscaled.linalg import full_precision
from nyscaled.matrices import as_matrix, reads, transpose_times
from nyscaled.typing import Factors

_EXTRA = 8  # columns over 2r, where the spectrum decays slowly after σ_r
_ROUNDS = 10


@reads(a=as_matrix)
@functools.partial(jax.jit, static_argnames=("rank", "symmetric"))
@full_precision
def leading_factors(key: Key[Array, ""], a: Any, rank: int, symmetric: bool = False) -> Factors:
    """(U₁Σ₁^{1/2}, V₁Σ₁^{1/2}) of A; of a symmetric A Q₁Λ₁^{1/2} of its largest eigenvalues, twice.

    Subspace iteration with k = 2r + 8 columns (at most min(m, n)): a product with A, ten rounds of
    one with Aᵀ and one with A, and a last one with Aᵀ, orthonormalized in between. The leading
    directions come with an error of about (σ_{k+1}/σ_r)^20, and to rounding if rank(A) ≤ k.

    Args:
        key: PRNG key of the sketch.
        a: A (m, n): dense, sparse or an operator.
        rank: 1 ≤ r ≤ min(m, n).
        symmetric: A = Aᵀ; negative eigenvalues count as 0. The iteration follows both ends of the
            spectrum: an eigenvalue far smaller than −λ_min comes late.

    Returns:
        Factors (m, r) and (n, r), columns by falling values.

    References:
        Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53, 2011,
        Algorithms 4.4 and 5.1.

    Example:
        >>> x, y = leading_factors(jax.random.key(0), jnp.diag(jnp.array([4.0, 1.0, 9.0])), rank=1)
        >>> bool(jnp.allclose(x @ y.T, jnp.diag(jnp.array([0.0, 0.0, 9.0])), atol=1e-5))
        True
    """
    m, n = a.shape
    omega = jax.random.normal(key, (n, min(2 * rank + _EXTRA, m, n)), a.dtype)

    def basis(x: Array) -> Array:
        return qr(x)[0]  # of any rank, which Cholesky's is not

    def refine(_: Any, q: Array) -> Array:
        return basis(a @ basis(transpose_times(a, q)))

    q = lax.fori_loop(0, _ROUNDS, refine, basis(a @ omega))
    image: Float[Array, "n k"] = transpose_times(a, q)
    if symmetric:
        values, vectors = eigh(q.T @ image)
        x = q @ (vectors * jnp.sqrt(jnp.maximum(values, 0)))[:, ::-1][:, :rank]
        return Factors(x, x)
    u, s, vt = svd(image)
    root = jnp.sqrt(s[:rank])
    return Factors((q @ vt[:rank].T) * root, u[:, :rank] * root)
