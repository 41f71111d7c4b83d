"""The SVD of a small square matrix from products and one symmetric eigendecomposition.

C = U_p H with the polar factor U_p and H = U_pᴴC; with H = VΛVᴴ the SVD is (U_pV) Λ Vᴴ. On CPUs
LAPACK's SVD wakes the threads of its BLAS from about 45 columns on, and they go on spinning for
tens of milliseconds beside XLA's products. The eigendecomposition of `lowrank.jacobi` does not, up
to 192 columns. On accelerators eigendecompositions are the faster of the two as well.

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

from nyscaled.lowrank.jacobi import eigh_of_positive
from nyscaled.lowrank.orthogonal import adjoint
from nyscaled.numerics import full_precision, norm, normalized, shift

# An odd polynomial with a slope of 23/8 at 0, and of 0 at its fixed point 1, to which it takes all
# of (0, 1.16].
_STEEP = (23 / 8, -13 / 4, 11 / 8)
_LAST_STEPS = 7  # from slightly above 1/3 to 1, to rounding


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
    values, vectors = eigh_of_positive(hermitian)
    vectors = vectors[:, ::-1]
    return factor @ vectors, shift(jnp.maximum(values[::-1], 0), e), adjoint(vectors)


def _polar(x: Inexact[Array, "k j"]) -> Inexact[Array, "k j"]:
    """The polar factor, but for directions of singular values below rounding."""
    size = norm(x)
    x = x / jnp.where(size == 0, 1, size)
    a, b, c = _STEEP
    eps = float(jnp.finfo(x.dtype).eps)
    width = x.shape[1]
    most_steps = math.ceil(math.log(width**0.5 / eps) / math.log(a)) + _LAST_STEPS

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, gram, i = state
        distance = norm(gram - jnp.eye(width, dtype=gram.dtype))
        return (distance > eps**0.5) & (i < most_steps)

    def step(x: Array, gram: Array) -> Array:
        return a * x + x @ (b * gram + c * (gram @ gram))

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x = step(*state[:2])
        return x, adjoint(x) @ x, state[2] + 1

    start = (x, adjoint(x) @ x, jnp.asarray(0))
    x, gram, _ = lax.while_loop(unfinished, again, start)
    return step(x, gram)
