"""Derivatives of leading singular triples by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, Inexact

from nyscaled.lowrank.orthogonal import adjoint
from nyscaled.lowrank.products import products_of
from nyscaled.numerics import full_precision, normalized, shift
from nyscaled.typing import LinearMap

_Triples = tuple[Array, Array, Array]
_ITERATIONS = 200  # of conjugate gradients


@jax.custom_jvp
def triples(
    a: LinearMap, u: Inexact[Array, "m r"], s: Float[Array, " r"], v: Inexact[Array, "n r"]
) -> tuple[Inexact[Array, "m r"], Float[Array, " r"], Inexact[Array, "n r"]]:
    """Return the given leading singular triples of A, with their derivatives in A.

    With K = Uᴴ dA V, the parts X and Y of dU and dV outside of the ranges of U and V solve

        X Σ − A Y = (I − UUᴴ) dA V,    Y Σ − Aᴴ X = (I − VVᴴ) dAᴴ U,

    by conjugate gradients for X, whose speed depends on the gap σ_{r+1}/σ_r. Singular values that
    are equal leave U and V free to rotate together. There dU and dV take the part of K that moves
    UΣVᴴ, so that its derivative is right, and those of single vectors, which do not exist, finite.
    Derivatives of higher order differentiate these formulas, and so require values that differ.

    Args:
        a: A (m, n), in a form whose products JAX can trace.
        u: U.
        s: the diagonal of Σ, falling.
        v: V.
    """
    return u, s, v


@triples.defjvp
@full_precision
def _triples_jvp(
    primals: tuple[LinearMap, Array, Array, Array], tangents: tuple[LinearMap, Array, Array, Array]
) -> tuple[_Triples, _Triples]:
    a = primals[0]
    u, s, v = triples(*primals)  # not constants: second derivatives are through them too
    sigma, e = normalized(s)

    def change(product: Callable[[LinearMap], Array]) -> Array:
        return shift(jax.jvp(product, (a,), (tangents[0],))[1], -e)

    image = change(lambda a: products_of(a).times(v))
    back = change(lambda a: products_of(a).adjoint_times(u))
    core = adjoint(u) @ image
    live = sigma > sigma.size * jnp.finfo(sigma.dtype).eps * sigma[0]
    inverse = jnp.where(live, 1 / jnp.where(live, sigma, 1), 0)

    products = products_of(a)

    def outside(basis: Array, x: Array) -> Array:
        return x - basis @ (adjoint(basis) @ x)

    def times(y: Array) -> Array:
        return outside(u, shift(products.times(outside(v, y)), -e))

    def adjoint_times(x: Array) -> Array:
        return outside(v, shift(products.adjoint_times(outside(u, x)), -e))

    right_side = outside(u, image) * inverse + times(outside(v, back)) * inverse**2
    tol = 4 * float(jnp.finfo(sigma.dtype).eps)
    dx = lax.custom_linear_solve(
        lambda x: x - times(adjoint_times(x)) * inverse**2,
        right_side,
        lambda matvec, b: cg(matvec, b, tol=tol, maxiter=_ITERATIONS)[0],
        symmetric=True,
    )
    dy = (outside(v, back) + adjoint_times(dx)) * inverse

    rest = core - jnp.diag(jnp.diagonal(core).real).astype(core.dtype)
    difference = sigma - sigma[:, None]
    near = jnp.abs(difference) <= float(jnp.finfo(sigma.dtype).eps) ** (2 / 3) * sigma[0]
    gaps = jnp.where(near, 0, 1 / jnp.where(near, 1, difference * (sigma + sigma[:, None])))
    one, two = rest * sigma, adjoint(rest) * sigma
    half = inverse / 2
    turn_u = jnp.where(near, rest * half, gaps * (one + adjoint(one)))
    turn_v = jnp.where(near, adjoint(rest) * half, gaps * (two + adjoint(two)))
    ds = shift(jnp.diagonal(core).real, e)
    return (u, s, v), (dx + u @ turn_u, ds, dy + v @ turn_v)
