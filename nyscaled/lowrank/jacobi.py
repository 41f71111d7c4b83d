"""The block Jacobi eigenvalue method, whose eigendecompositions are small.

LAPACK's eigendecomposition of 64 columns or more wakes the threads of its BLAS on CPUs (on some, of
65 or more). They go on spinning for tens of milliseconds beside XLA's products. Here LAPACK sees
two blocks of columns at a time, and the rest is products. A sweep diagonalizes all pairs of blocks.
In the end what is off the diagonal falls quadratically: three to seven sweeps are enough.

References:
    Golub and Van Loan, Matrix Computations, section 8.5.
    Drmač, A global convergence proof for cyclic Jacobi methods with block rotations, SIAM J. Matrix
    Anal. Appl. 31, 2009.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from nyscaled.lapack import eigh, reciprocal
from nyscaled.numerics import full_precision, norm

QUIET = 62  # columns of a real matrix that wake no threads; even, as a pair of blocks is
_QUIET_COMPLEX = 48  # the same of a complex one
_MOST = 192  # columns up to which sweeps cost less than what the threads would take from products
_MOST_SWEEPS = 12


def eigh_of_positive(a: Inexact[Array, "n n"]) -> tuple[Float[Array, " n"], Inexact[Array, "n n"]]:
    """Return the rising eigenvalues and the eigenvectors of a positive semidefinite matrix.

    They are those of `lapack.eigh`, and on CPUs of Jacobi's method where that is the better one.
    Their derivatives are the same, those of real matrices.

    Args:
        a: A (n, n), Hermitian, with no eigenvalue below rounding.

    Examples:
        >>> values, _ = eigh_of_positive(jnp.diag(jnp.array([3.0, 0.0, 2.0])))
        >>> values
        Array([0., 2., 3.], dtype=float32)
    """
    if not _quiet(a) < len(a) <= _MOST:
        return eigh(a)
    return lax.platform_dependent(a, cpu=jacobi, default=eigh)


def _quiet(a: Inexact[Array, "n n"]) -> int:
    return _QUIET_COMPLEX if jnp.iscomplexobj(a) else QUIET


@jax.custom_jvp
@jax.jit
@full_precision
def jacobi(a: Inexact[Array, "n n"]) -> tuple[Float[Array, " n"], Inexact[Array, "n n"]]:
    """Return the rising eigenvalues and the eigenvectors of a positive semidefinite matrix.

    Args:
        a: A (n, n), Hermitian, with no eigenvalue below rounding.

    Examples:
        >>> values, vectors = jacobi(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> bool(jnp.allclose(values, jnp.array([1.0, 3.0]), atol=1e-6))
        True
    """
    n = len(a)
    blocks = 2 * -(-n // _quiet(a))
    side = -(-n // blocks)
    padded = blocks * side
    a = (a + a.conj().T) / 2
    # Padding stays apart from all eigenvectors, because its eigenvalue is below theirs.
    low = -jnp.max(jnp.diagonal(a).real)
    low = jnp.where(low == 0, -1, low)
    padding = jnp.where(jnp.arange(padded) < n, 0, low).astype(a.dtype)
    a = jnp.pad(a, ((0, padded - n), (0, padded - n))) + jnp.diag(padding)
    enough = padded**0.5 * float(jnp.finfo(a.dtype).eps) * norm(a)
    pairs = side * jnp.asarray(np.stack(np.triu_indices(blocks, 1), axis=1))

    def both(x: Array, pair: Array, axis: int) -> Array:
        return jnp.concatenate(
            [lax.dynamic_slice_in_dim(x, start, side, axis) for start in pair], axis
        )

    def put(x: Array, parts: Array, pair: Array, axis: int) -> Array:
        for start, part in zip(pair, jnp.split(parts, 2, axis), strict=True):
            x = lax.dynamic_update_slice_in_dim(x, part, start, axis)
        return x

    def rotate(i: Array | int, stacked: Array) -> Array:
        """[A; V] ↦ [TᴴAT; VT], where T diagonalizes one pair of blocks."""
        pair = pairs[i]
        columns = both(stacked, pair, 1)
        turn = eigh(both(columns, pair, 0))[1][:, ::-1]
        stacked = put(stacked, columns @ turn, pair, 1)
        return put(stacked, turn.conj().T @ both(stacked, pair, 0), pair, 0)

    def off_diagonal(stacked: Array) -> Array:
        a = stacked[:padded]
        return norm(a - jnp.diag(jnp.diagonal(a)))

    def unfinished(state: tuple[Array, Array]) -> Array:
        return ~(off_diagonal(state[0]) <= enough) & (state[1] < _MOST_SWEEPS)  # NaN spreads

    def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return lax.fori_loop(0, len(pairs), rotate, state[0]), state[1] + 1

    start = jnp.concatenate([a, jnp.eye(padded, dtype=a.dtype)])
    stacked, _ = lax.while_loop(unfinished, sweep, (start, jnp.asarray(0)))
    values = jnp.diagonal(stacked[:padded]).real
    order = jnp.argsort(values)[padded - n :]
    return values[order], stacked[padded : padded + n][:, order]


@jacobi.defjvp
@full_precision
def _jacobi_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, vectors = jacobi(*primals)
    (change,) = tangents
    core = vectors.conj().T @ ((change + change.conj().T) / 2) @ vectors
    gaps = reciprocal(values - values[:, None])
    return (values, vectors), (jnp.diagonal(core).real, vectors @ (gaps * core))
