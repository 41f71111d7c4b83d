"""How far a factor is from the optimum, measured without cancellation.

`problems.Symmetric.residual` computes ‖XXᵀ − A‖_F directly in O(m² r). Where an eigenbasis Q of A
is known, `residual_in_basis` is O(m r r_A) and exact down to the rounding of X. The expansion ‖A‖²
− 2 tr(XᵀAX) + ‖XᵀX‖² is used nowhere, because it loses everything below √eps.

A spectrum is a vector (k,) that goes with the k columns of a basis; other shapes are a ValueError.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from nyscaled import validation
from nyscaled.lapack import svd
from nyscaled.linalg import orthonormalize
from nyscaled.matrices import as_array, as_dense, as_factors, reads
from nyscaled.numerics import clipped, exponent, full_precision, norm, shift
from nyscaled.typing import Factors, Scalar

__all__ = [
    "distance",
    "generalized_weak_optimality",
    "principal_angles",
    "residual_in_basis",
    "residual_space",
    "weak_gram",
    "weak_optimality",
]


@reads(x=as_dense, basis=as_dense, spectrum=as_array)
@full_precision
def residual_in_basis(
    x: Float[Array, "m r"], basis: Float[Array, "m k"], spectrum: Float[Array, " k"]
) -> Scalar:
    """Return ‖XXᵀ − A‖_F for A = Q diag(spectrum) Qᵀ, the error in Figures 1 (a), (b) and 4.

    With Φ = QᵀX and X⊥ = X − QΦ it is the root of ‖ΦΦᵀ − Σ‖_F² + 2‖X⊥Φᵀ‖_F² + ‖X⊥ᵀX⊥‖_F², a sum of
    squares.

    Args:
        x: the factor X (m, r).
        basis: Q (m, k), with orthonormal columns.
        spectrum: the eigenvalue of A for each column of Q (k,).

    Examples:
        >>> basis, spectrum = jnp.eye(4)[:, :2], jnp.array([4.0, 1.0])
        >>> residual_in_basis(basis * jnp.sqrt(spectrum), basis, spectrum)
        Array(0., dtype=float32)
    """
    validation.require_spectrum(spectrum, basis.shape[1])
    # In units of 2^e for X and 4^e for A, so that no square leaves the range.
    e = jnp.maximum(exponent(x), (exponent(spectrum) + 1) // 2)
    x, spectrum = shift(x, -e), shift(spectrum, -2 * e)
    phi = basis.T @ x
    outside = x - basis @ phi
    inner = norm(phi @ phi.T - jnp.diag(spectrum))
    cross = norm(outside @ phi.T)
    outer = norm(outside.T @ outside)
    return shift(norm(jnp.stack([inner, 2**0.5 * cross, outer])), 2 * e)


@reads(x=as_dense, basis=as_dense, spectrum=as_array)
@full_precision
def weak_gram(
    x: Float[Array, "m r"], basis: Float[Array, "m k"], spectrum: Float[Array, " k"]
) -> Float[Array, "r r"]:
    """Return XᵀA†X = ΦᵀΣ⁻¹Φ, the B_t of the under-parametrized analysis (16).

    Args:
        x: the factor X (m, r).
        basis: Q (m, k), with orthonormal columns.
        spectrum: the eigenvalue of A for each column of Q (k,), all positive.

    Examples:
        >>> basis, spectrum = jnp.eye(4)[:, :2], jnp.array([4.0, 1.0])
        >>> weak_gram(basis[:, :1] * 2.0, basis, spectrum)
        Array([[1.]], dtype=float32)
    """
    validation.require_spectrum(spectrum, basis.shape[1])
    scaled = (basis.T @ x) / jnp.sqrt(spectrum)[:, None]
    return scaled.T @ scaled


@reads(x=as_dense, basis=as_dense, spectrum=as_array)
@full_precision
def weak_optimality(
    x: Float[Array, "m r"], basis: Float[Array, "m k"], spectrum: Float[Array, " k"]
) -> Scalar:
    """Return ‖XᵀA†X − I_r‖_F, which is zero at weak optima (Definition 1, Figure 1 (c)).

    A is Q diag(spectrum) Qᵀ. Every global optimum is weakly optimal (Lemma 3). A weak optimum need
    not be a global one.

    Args:
        x: the factor X (m, r).
        basis: Q (m, k), with orthonormal columns.
        spectrum: the eigenvalue of A for each column of Q (k,), all positive.

    Examples:
        >>> basis, spectrum = jnp.eye(4)[:, :2], jnp.array([4.0, 1.0])
        >>> weak_optimality(basis[:, :1] * 2.0, basis, spectrum)
        Array(0., dtype=float32)
    """
    gram = weak_gram(x, basis, spectrum)
    return norm(gram - jnp.eye(x.shape[1], dtype=gram.dtype))


@reads(left=as_dense, right=as_dense, spectrum=as_array)
@full_precision
def generalized_weak_optimality(
    factors: Factors,
    left: Float[Array, "m k"],
    right: Float[Array, "n k"],
    spectrum: Float[Array, " k"],
) -> Scalar:
    """Return ‖YᵀA†X − I_r‖_F for A = U diag(spectrum) Vᵀ (Definition 2).

    Args:
        factors: `Factors(X, Y)`, (m, r) and (n, r).
        left: U (m, k), the left singular vectors of A.
        right: V (n, k), the right singular vectors of A.
        spectrum: the singular value of A for each of these vectors (k,), all positive.

    Examples:
        >>> x, y = jnp.array([[4.0], [0.0]]), jnp.array([[1.0], [0.0]])
        >>> u = v = jnp.eye(2)[:, :1]
        >>> generalized_weak_optimality(Factors(x, y), u, v, jnp.array([4.0]))
        Array(0., dtype=float32)
    """
    validation.require_spectrum(spectrum, left.shape[1])
    x, y = as_factors(factors)
    gram = (right.T @ y).T @ ((left.T @ x) / spectrum[:, None])
    return norm(gram - jnp.eye(x.shape[1], dtype=gram.dtype))


@reads(x=as_dense, basis=as_dense)
@full_precision
def residual_space(x: Float[Array, "m r"], basis: Float[Array, "m k"]) -> Scalar:
    """Return ‖(I − QQᵀ)X‖_F, the part of X outside range(A).

    It is zero from a Nyström start (Lemmas 2, 4).

    Args:
        x: the factor X (m, r).
        basis: Q (m, k), with orthonormal columns that span range(A).

    Examples:
        >>> residual_space(jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [0.0]]))
        Array(2., dtype=float32)
    """
    outside = x - basis @ (basis.T @ x)
    return norm(outside - basis @ (basis.T @ outside))


@reads(x=as_dense, y=as_dense)
@full_precision
def principal_angles(x: Float[Array, "m r"], y: Float[Array, "m k"]) -> Float[Array, " q"]:
    """Return the min(r, k) principal angles between range(X) and range(Y), in radians, ascending.

    Small angles come from sines and large ones from cosines (Björck and Golub 1973), so that all
    are accurate to about eps.

    Args:
        x: X (m, r).
        y: Y (m, k), of full column rank, as X is.

    Examples:
        >>> angles = principal_angles(jnp.eye(3)[:, :1], jnp.array([[1.0], [1e-4], [0.0]]))
        >>> f"{float(angles[0]):.3g}"
        '0.0001'
    """
    for name, z in (("X", x), ("Y", y)):
        validation.require_rank(z.shape[1], z.shape, f"the number of columns of {name}")
    if x.shape[1] > y.shape[1]:
        x, y = y, x
    qx, qy = orthonormalize(x), orthonormalize(y)
    inner = qy.T @ qx
    outside = qx - qy @ inner
    outside = outside - qy @ (qy.T @ outside)
    cosines = clipped(svd(inner)[1], 0, 1)
    sines = clipped(svd(outside)[1][::-1], 0, 1)
    small = sines**2 < 0.5
    # The branch that is not selected gets 0 as well, because its derivative may be infinite.
    angles = jnp.arcsin(jnp.where(small, sines, 0)), jnp.arccos(jnp.where(small, 0, cosines))
    return jnp.where(small, *angles)


@reads(x=as_dense, optimum=as_dense)
@full_precision
def distance(x: Float[Array, "m r"], optimum: Float[Array, "m r"]) -> Scalar:
    """Return min over orthogonal U of ‖X − X*U‖_F, the distance to the solutions of (1).

    Args:
        x: X (m, r).
        optimum: X* (m, r), one global optimum.

    Examples:
        >>> distance(-jnp.eye(3)[:, :2], jnp.eye(3)[:, :2])
        Array(0., dtype=float32)
    """
    u, _, vt = svd(optimum.T @ x)
    return norm(x - optimum @ (u @ vt))
