"""Algebra of thin factors X (m, r), m ≥ r, by matrix products and r×r factorizations only.

The one primitive of this package is the dual X(XᵀX)†: every iteration of the paper is a line
in it. It is taken from X = Z T₃⁻¹T₂⁻¹T₁⁻¹ with Z orthonormal but for rounding and each T_i r×r
upper triangular, never from the inverse of the Gram matrix, whose error grows with κ(X)².
A pass of Cholesky QR, shifted by s, divides the condition number by about s^(-1/2). The shifts
are chosen so that no single T_i is badly conditioned, and the T_i are applied one after another,
which keeps the backward error at Σκ(T_i) where their product would have κ(X). That is as
accurate as Householder QR, without a tall LAPACK call: on CPUs those run in another thread pool
than XLA's products and slow them down, and across devices a Gram matrix needs one all-reduce of
r² numbers where Householder QR gathers X.

A column of X that is exactly zero has no direction: its dual is zero, as for the pseudo-inverse.
Inside the loops this is the only rank handling; `compress` makes such columns.

References:
    Fukaya et al., Shifted Cholesky QR for computing the QR factorization of ill-conditioned
    matrices, SIAM J. Sci. Comput. 42, 2020.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from nyscaled.lapack import inverse_cholesky, svd
from nyscaled.matrices import as_dense, reads
from nyscaled.numerics import full_precision, normalized, shift
from nyscaled.typing import Scalar


class ThinFactorization(NamedTuple):
    """X = Z T₃⁻¹T₂⁻¹T₁⁻¹, from `factor`; with damping λ, of [X; √λ I], of which `z` keeps m rows.

    `core` is a root of (ZᵀZ)⁻¹ = core coreᵀ, so `z @ core` is orthonormal on live columns.
    """

    z: Float[Array, "m r"]
    transforms: tuple[Float[Array, "r r"], ...]
    core: Float[Array, "r r"]
    live: Bool[Array, " r"]

    def dual_of(self, image: Float[Array, "k r"]) -> Float[Array, "k r"]:
        """Return A X(XᵀX + λI)⁻¹ from `image` = A z, which keeps the digits of small directions."""
        *rest, last = self.transforms
        image = image @ ((self.core @ self.core.T) @ last.T)
        for t in reversed(rest):
            image = image @ t.T
        return image

    def solve(self, g: Float[Array, "k r"]) -> Float[Array, "k r"]:
        """Return G(XᵀX + λI)⁻¹."""
        *rest, last = self.transforms
        for t in rest:
            g = g @ t
        return self.dual_of(g @ last)

    def kept(self, damping: float | Scalar) -> Float[Array, "r r"]:
        """Return XᵀX(XᵀX + λI)⁻¹ with the factorization's λ: the identity on live columns at λ = 0.

        It is I − WWᵀ with W = √λ T₁T₂T₃ core, which is bounded where (XᵀX + λI)⁻¹ overflows.
        """
        dtype = self.core.dtype
        live = jnp.diag(self.live.astype(dtype))
        if _is_zero(damping):
            return live
        damping = jnp.asarray(damping, dtype)
        w = jnp.sqrt(lax.stop_gradient(damping)) * self.transforms[0]
        for t in (*self.transforms[1:], self.core):
            w = w @ t
        *_, root = itertools.accumulate((*self.transforms, self.core), jnp.matmul)
        return live - w @ w.T - _slope(damping, root.T)


@reads(x=as_dense)
@full_precision
def factor(x: Float[Array, "m r"], damping: float | Scalar = 0.0) -> ThinFactorization:
    """Factorize X, or [X; √λ I], to thin-QR accuracy for κ up to 1/eps.

    Args:
        x: thin matrix (m, r); columns that are exactly zero are allowed.
        damping: λ ≥ 0, in units of XᵀX.

    Returns:
        The factorization; see `ThinFactorization`.

    Examples:
        >>> x = jnp.array([[3.0], [4.0]])
        >>> f = factor(x)
        >>> bool(jnp.allclose(f.z.T @ f.z, jnp.eye(1), atol=1e-6))
        True
    """
    m, r = x.shape
    if not _is_zero(damping):
        damping = jnp.asarray(damping, x.dtype)
        weight = jnp.sqrt(lax.stop_gradient(damping))  # whose derivative is infinite at 0
        x = jnp.concatenate([x, weight * jnp.eye(r, dtype=x.dtype)])
    eye = jnp.eye(r, dtype=x.dtype)
    x, e = normalized(x, axis=0)  # squares of columns of any size
    squares = jnp.sum(x**2, axis=0)
    live = squares != 0  # NaN counts as live, so that it shows in the result
    dead = jnp.diag(jnp.where(live, 0, 1).astype(x.dtype))
    norms = jnp.sqrt(jnp.where(live, squares, 1))
    # With unit columns ‖Z‖² ≤ r, and the Gram matrix carries a rounding error of about r·eps.
    eps = float(jnp.finfo(x.dtype).eps)
    floor = 2 * r * eps
    z, transforms = x / norms, []
    for ridge in (max(eps**0.5, floor), max(eps**0.5, floor), floor):
        t = inverse_cholesky(z.T @ z + dead + ridge * eye)
        z = z @ t
        transforms.append(t)
    scale = jnp.where(live, shift(1 / norms, -e[0]), 0)
    transforms[0] = scale[:, None] * transforms[0]
    gram = z.T @ z + dead
    if not _is_zero(damping):
        *_, product = itertools.accumulate(transforms, jnp.matmul)
        gram = gram + _slope(jnp.asarray(damping), product)
    core = inverse_cholesky(gram)
    return ThinFactorization(z[:m], tuple(transforms), core, live)


def _slope(damping: Scalar, t: Float[Array, "k r"]) -> Float[Array, "r r"]:
    """Zero, with the derivative of λ TᵀT in λ."""
    scaled, e = normalized(t)
    return shift(damping - lax.stop_gradient(damping), 2 * e) * (scaled.T @ scaled)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


@reads(x=as_dense)
@full_precision
def orthonormalize(x: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Return an orthonormal basis of range(X), column j in the span of the first j columns of X.

    Zero columns stay zero. As accurate as Householder QR for κ(X) up to 1/eps.

    Examples:
        >>> x = jnp.array([[3.0, 1.0], [4.0, 1.0], [0.0, 1e-3]])
        >>> z = orthonormalize(x)
        >>> bool(jnp.allclose(z.T @ z, jnp.eye(2), atol=1e-6))
        True
    """
    f = factor(x)
    return f.z @ f.core


@reads(x=as_dense)
@full_precision
def dual(x: Float[Array, "m r"], damping: float | Scalar = 0.0) -> Float[Array, "m r"]:
    """Return the dual X(XᵀX + λI)⁻¹ of a thin factor; at λ = 0 it is (X†)ᵀ.

    Args:
        x: (m, r), of full column rank but for columns that are exactly zero, whose dual is
            zero. For numerically deficient X see `compress` and `pinv`.
        damping: λ ≥ 0, in units of XᵀX.

    Returns:
        (m, r), the dtype of `x`.

    Examples:
        >>> x = jnp.array([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> dual(x)
        Array([[0.5 , 0.  ],
               [0.  , 0.25],
               [0.  , 0.  ]], dtype=float32)
    """
    f = factor(x, damping)
    return f.dual_of(f.z)


@reads(x=as_dense, g=as_dense)
@full_precision
def gram_solve(
    x: Float[Array, "m r"], g: Float[Array, "k r"], damping: float | Scalar = 0.0
) -> Float[Array, "k r"]:
    """Return G(XᵀX + λI)⁻¹, the preconditioned gradient of (2) and (6), as G R⁻¹R⁻ᵀ.

    Args:
        x: (m, r), as in `dual`; directions of zero columns are dropped from the result.
        g: (k, r), a gradient with the same r.
        damping: λ ≥ 0, in units of XᵀX.

    Examples:
        >>> x = jnp.array([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> gram_solve(x, jnp.ones((1, 2)))
        Array([[0.25  , 0.0625]], dtype=float32)
    """
    return factor(x, damping).solve(g)


def default_rcond(m: int, dtype: Any) -> float:
    """Return √m · eps, below which singular values of a rounded m-row product are noise.

    Args:
        m: the number of rows.
        dtype: the dtype of the matrix.

    Examples:
        >>> f"{default_rcond(100, jnp.float32):.1e}"
        '1.2e-06'
    """
    return float(m**0.5 * jnp.finfo(dtype).eps)


class Compressed(NamedTuple):
    """X = factor · rotationᵀ; columns of `factor` below the cut are exactly zero."""

    factor: Float[Array, "m r"]
    rotation: Float[Array, "r r"]
    rank: Array


@jax.custom_jvp
def moving_frame(
    x: Float[Array, "m r"],
    rotation: Float[Array, "r r"],
    live: Bool[Array, " r"],
) -> Float[Array, "r r"]:
    """Return `rotation`, with the derivative that keeps X · rotation zero on the dead columns.

    A factor of deficient rank that depends on a parameter, and keeps its rank, turns its row space.
    The frame turns with it, V_dead' = −V_live X̃⁺X'V_dead, and no more than that: within the live
    columns any frame will do. The derivative of an SVD would divide by differences of noise.

    Args:
        x: X, of which X · rotation is zero on dead columns but for rounding.
        rotation: V, orthogonal, a constant.
        live: which columns of XV are not taken as zero.
    """
    return rotation


@moving_frame.defjvp
@full_precision
def _moving_frame_jvp(primals: Any, tangents: Any) -> Any:
    x, _, live = primals
    rotation = moving_frame(*primals)  # not the constant, for second derivatives
    inverse = dual(jnp.where(live, x @ rotation, 0)).T
    turn = jnp.where(live[:, None] & ~live, inverse @ (tangents[0] @ rotation), 0)
    return rotation, rotation @ (turn.T - turn)


@reads(x=as_dense)
@full_precision
def compress(x: Float[Array, "m r"], rcond: float | None = None) -> Compressed:
    """Cut the numerical rank of X: singular values up to `rcond` times the largest become zero.

    The cut is made on X, not on XᵀX, whose eigenvalues are squared and drown at √eps. Derivatives
    are those of an X that keeps its rank.

    Args:
        x: (m, r).
        rcond: relative cut; √m · eps by default.

    Examples:
        >>> x = jnp.ones((4, 3))
        >>> int(compress(x).rank)
        1
    """
    _, s, vt = svd(lax.stop_gradient(x))
    cut = default_rcond(x.shape[0], x.dtype) if rcond is None else rcond
    live = s > cut * s[0]
    rotation = moving_frame(x, vt.T, live)
    return Compressed(jnp.where(live, x @ rotation, 0), rotation, jnp.sum(live))


@reads(x=as_dense)
@full_precision
def pinv(x: Float[Array, "m r"], rcond: float | None = None) -> Float[Array, "r m"]:
    """Return X† of a thin factor, with a rank-revealing cut on X; X(XᵀX)† = (X†)ᵀ.

    Args:
        x: X (m, r), m ≥ r.
        rcond: the cut, relative to the largest singular value. `default_rcond` by default.

    Examples:
        >>> bool(jnp.allclose(pinv(jnp.ones((2, 2))), 0.25))
        True
    """
    factored, rotation, _ = compress(x, rcond)
    return rotation @ dual(factored).T
