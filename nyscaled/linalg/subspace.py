"""Leading singular triples and eigenpairs of a matrix that is known only by its products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from nyscaled.lapack import eigh, qr, reciprocal, svd
from nyscaled.matrices import as_matrix, reads, transpose_times
from nyscaled.numerics import full_precision, normalized, shift
from nyscaled.typing import Factors, MatrixLike

OVERSAMPLING = 8  # columns of a sketch beyond those that are needed
_ROUNDS = 10


def range_basis(
    image: Callable[[Array], Array],
    coimage: Callable[[Array], Array],
    sketch: Float[Array, "n k"],
    rounds: int,
    orthonormalize: Callable[[Array], Array],
    *,
    unroll: bool = False,
) -> Float[Array, "m k"]:
    """Return an orthonormal basis of the leading left singular vectors of A, by subspace iteration.

    Args:
        image: x ↦ Ax.
        coimage: x ↦ Aᵀx.
        sketch: random matrix with one column per vector of the basis.
        rounds: how many times the image of the sketch is multiplied by AAᵀ.
        orthonormalize: x ↦ an orthonormal basis of its range.
        unroll: whether each round is compiled by itself, which suits few rounds.
    """

    def refine(_: Any, basis: Array) -> Array:
        return orthonormalize(image(orthonormalize(coimage(basis))))

    return lax.fori_loop(0, rounds, refine, orthonormalize(image(sketch)), unroll=unroll)


@reads(a=as_matrix)
@functools.partial(jax.jit, static_argnames=("rank", "symmetric"))
@full_precision
def leading_factors(
    key: Key[Array, ""], a: MatrixLike, rank: int, symmetric: bool = False
) -> Factors:
    """Return (U₁Σ₁^{1/2}, V₁Σ₁^{1/2}) of A; for a symmetric A, Q₁Λ₁^{1/2} twice.

    Subspace iteration with k = 2r + 8 columns (at most min(m, n)): a product with A, ten rounds of
    one with Aᵀ and one with A, and a last one with Aᵀ, orthonormalized in between. The leading
    directions come with an error of about (σ_{k+1}/σ_r)^20, and to rounding if rank(A) ≤ k.

    Derivatives are those of an A whose singular values, or eigenvalues, beyond these k are zero.

    Args:
        key: PRNG key of the sketch.
        a: A (m, n): dense, sparse or an operator.
        rank: 1 ≤ r ≤ min(m, n).
        symmetric: whether A = Aᵀ and the largest eigenvalues are sought; negative ones count as 0.
            The iteration converges to the eigenvalues that are largest in magnitude, so a positive
            eigenvalue much smaller than |λ_min| is found late.

    Returns:
        Factors (m, r) and (n, r), columns by falling values.

    Raises:
        ValueError: if the rank is out of range.

    References:
        Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53, 2011,
        Algorithms 4.4 and 5.1.

    Examples:
        >>> x, y = leading_factors(jax.random.key(0), jnp.diag(jnp.array([4.0, 1.0, 9.0])), rank=1)
        >>> bool(jnp.allclose(x @ y.T, jnp.diag(jnp.array([0.0, 0.0, 9.0])), atol=1e-5))
        True
    """
    m, n = a.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank is {rank}; expected 1 ≤ rank ≤ {min(m, n)} for a matrix {m, n}")
    constant = lax.stop_gradient(a)
    omega = jax.random.normal(key, (n, min(2 * rank + OVERSAMPLING, m, n)), a.dtype)
    q = range_basis(
        lambda x: constant @ x,
        lambda x: transpose_times(constant, x),
        omega,
        _ROUNDS,
        lambda x: qr(x)[0],  # of any rank, which Cholesky's is not
    )
    image: Float[Array, "n k"] = transpose_times(constant, q)
    if symmetric:
        rising, turn = eigh(q.T @ image)
        vectors, values = _eigenpairs(a, (q @ turn)[:, ::-1], rising[::-1])
        x = _halved(vectors, values)[:, :rank]
        return Factors(x, x)
    right, singular, turned = svd(image)
    left, singular, right = _triples(a, q @ turned.T, singular, right)
    return Factors(_halved(left, singular)[:, :rank], _halved(right, singular)[:, :rank])


def _live(values: Float[Array, " k"]) -> Bool[Array, " k"]:
    """Which values are neither rounding nor negative."""
    return values > values.size * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))


def _halved(vectors: Float[Array, "m k"], values: Float[Array, " k"]) -> Float[Array, "m k"]:
    """Vectors times √value, a constant where the value is rounding."""
    live = _live(values)
    scaled = vectors * jnp.sqrt(jnp.maximum(lax.stop_gradient(values), 0))
    return jnp.where(
        live, vectors * jnp.sqrt(jnp.where(live, values, 1)), lax.stop_gradient(scaled)
    )


def _product(fn: Callable[[Any], Array], a: MatrixLike, change: Any, e: Array) -> Array:
    """The derivative of a product with A along a change of A, times 2^(−e)."""
    return shift(jax.jvp(fn, (a,), (change,))[1], -e)


@jax.custom_jvp
def _triples(
    a: MatrixLike, u: Float[Array, "m k"], s: Float[Array, " k"], v: Float[Array, "n k"]
) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "n k"]]:
    """The given singular triples of A, with the derivatives of an A that has no others."""
    return u, s, v


@_triples.defjvp
@full_precision
def _triples_jvp(primals: Any, tangents: Any) -> Any:
    a, u, s, v = primals
    scaled, e = normalized(s)
    image = _product(lambda a: a @ v, a, tangents[0], e)
    back = _product(lambda a: transpose_times(a, u), a, tangents[0], e)
    core = u.T @ image
    gaps = reciprocal((scaled - scaled[:, None]) * (scaled + scaled[:, None]))
    inverse = jnp.where(_live(s), reciprocal(scaled), 0)
    one, two = core * scaled, core.T * scaled
    du = u @ (gaps * (one + one.T)) + (image - u @ core) * inverse
    dv = v @ (gaps * (two + two.T)) + (back - v @ core.T) * inverse
    return primals[1:], (du, shift(jnp.diagonal(core), e), dv)


@jax.custom_jvp
def _eigenpairs(
    a: MatrixLike, vectors: Float[Array, "m k"], values: Float[Array, " k"]
) -> tuple[Float[Array, "m k"], Float[Array, " k"]]:
    """The given eigenpairs of A = Aᵀ, with the derivatives of an A that has no others."""
    return vectors, values


@_eigenpairs.defjvp
@full_precision
def _eigenpairs_jvp(primals: Any, tangents: Any) -> Any:
    a, vectors, values = primals
    scaled, e = normalized(values)
    image = _product(lambda a: a @ vectors, a, tangents[0], e)
    core = vectors.T @ image
    inverse = jnp.where(_live(values), reciprocal(scaled), 0)
    turn = reciprocal(scaled - scaled[:, None]) * core
    change = vectors @ turn + (image - vectors @ core) * inverse
    return primals[1:], (change, shift(jnp.diagonal(core), e))
