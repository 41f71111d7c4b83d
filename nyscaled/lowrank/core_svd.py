"""The SVD of a small square matrix from products and one symmetric eigendecomposition.

C = U_p H with the polar factor U_p and H = U_pᴴC; with H = VΛVᴴ the SVD is (U_pV) Λ Vᴴ. On CPUs
LAPACK's SVD wakes the threads of its BLAS from about 45 columns on, and they go on spinning for
tens of milliseconds beside XLA's products; its symmetric eigendecomposition does so from about 70
columns on. On accelerators eigendecompositions are the faster of the two as well.

References:
    Nakatsukasa and Higham, Stable and efficient spectral divide and conquer algorithms for the
    symmetric eigenvalue decomposition and the SVD, SIAM J. Sci. Comput. 35, 2013.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from nyscaled.lapack import eigh
from nyscaled.lowrank.orthogonal import adjoint
from nyscaled.numerics import full_precision, norm, normalized, shift

# An odd polynomial with slope 3.4445 at 0, which maps [0, 1] into [0, 1.21].
_STEEP = (3.4445, -4.7750, 2.0315)
_CUBIC_STEPS = 6  # from [0.68, 1.21] to 1, to rounding


@jax.jit
@full_precision
def core_svd(
    core: Inexact[Array, "k j"],
) -> tuple[Inexact[Array, "k i"], Float[Array, " i"], Inexact[Array, "i j"]]:
    """Return U, the falling singular values and Vᴴ of the thin SVD, i = min(k, j).

    Singular values are right to rounding of the largest. Vectors of those below it are not
    orthonormal.

    Args:
        core: C (k, j).

    Examples:
        >>> core = jnp.array([[0.0, -3.0], [2.0, 0.0]])
        >>> u, s, vh = core_svd(core)
        >>> bool(jnp.allclose((u * s) @ vh, core, atol=1e-5))
        True
    """
    if core.shape[0] < core.shape[1]:
        v, s, uh = core_svd(adjoint(core))
        return adjoint(uh), s, adjoint(v)
    core, e = normalized(core)
    factor = _polar(core)
    hermitian = adjoint(factor) @ core
    values, vectors = eigh(hermitian)
    vectors = vectors[:, ::-1]
    return factor @ vectors, shift(jnp.maximum(values[::-1], 0), e), adjoint(vectors)


def _polar(x: Inexact[Array, "k j"]) -> Inexact[Array, "k j"]:
    """The polar factor, but for directions of singular values below rounding."""
    size = norm(x)
    x = x / jnp.where(size == 0, 1, size)
    a, b, c = _STEEP
    smallest = float(jnp.finfo(x.dtype).eps) / x.shape[1] ** 0.5
    steps = math.ceil(math.log(1 / smallest) / math.log(a)) + 1

    def steep(_: Array | int, x: Array) -> Array:
        gram = adjoint(x) @ x
        return a * x + x @ (b * gram + c * (gram @ gram))

    def cubic(_: Array | int, x: Array) -> Array:
        return 1.5 * x - 0.5 * (x @ (adjoint(x) @ x))

    return lax.fori_loop(0, _CUBIC_STEPS, cubic, lax.fori_loop(0, steps, steep, x))
