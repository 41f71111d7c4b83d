"""`nystrom`: the leading eigenpairs of a positive semidefinite matrix, with an error estimate."""

from __future__ import annotations

import dataclasses
import functools
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Int, Key

from nyscaled import validation
from nyscaled.lapack import inverse_cholesky, inverse_upper
from nyscaled.linalg import KernelMatrix
from nyscaled.lowrank import leave_one_out
from nyscaled.lowrank.arguments import (
    known_tolerance,
    largest_rank,
    require_unset,
)
from nyscaled.lowrank.explicit import with_auto_axes
from nyscaled.lowrank.host import HostMatrix, as_input
from nyscaled.lowrank.jacobi import eigh_of_positive
from nyscaled.lowrank.orthogonal import extend, inner
from nyscaled.lowrank.pivoted import PivotedCholesky, pivoted_cholesky
from nyscaled.lowrank.products import (
    Product,
    compiled,
    entry_rounding,
    products_of,
    working_dtype,
)
from nyscaled.lowrank.psd_adaptive import of_tolerance
from nyscaled.lowrank.psd_compression import compress, truncate
from nyscaled.lowrank.psd_result import PSDApproximation
from nyscaled.lowrank.result import Status, with_fixed_signs
from nyscaled.numerics import full_precision, normalized, shift
from nyscaled.operators import Operator, as_shape
from nyscaled.typing import LinearMap, MatrixLike, Number


@with_auto_axes
def nystrom(
    a: MatrixLike,
    rank: SupportsIndex | None = None,
    *,
    tol: Number | None = None,
    key: Key[Array, ""] | None = None,
    oversampling: int | None = None,
    passes: int | None = None,
    max_rank: SupportsIndex | None = None,
    jackknife: bool = False,
) -> PSDApproximation:
    """Return the leading eigenvectors and eigenvalues of a positive semidefinite A.

    The approximation is AQ(QᴴAQ)⁻¹QᴴA, cut to the rank, for an orthonormal basis Q of the block
    Krylov space [Ω, AΩ, …, A^(passes−1)Ω] of a Gaussian Ω with `rank + oversampling` columns. Three
    passes are within 1 % of the best error of that rank for most spectra; one pass reads A once.
    The compression is shifted by its rounding error, which keeps its Cholesky factor real, and the
    shift is taken off the eigenvalues. Everything but one r × r eigendecomposition is products.

    The error estimate comes from leaving out one column of Ω at a time, and needs no product with
    A. Its mean square is that of the error with one column less, or more: it tends to be too
    large. Of 2,000 draws with each of six spectra (a test counts them), three passes gave no
    estimate below 0.9 times the error. With one pass up to 15 % were below 0.9 times the error, and
    up to 1.3 % below half of it. An estimate below about 50·√m·eps·‖A‖_F is rounding. If Ω has m
    columns, only rounding and what is cut are left out.

    With `tol` the Krylov space grows by 16 columns with each product, until the estimated error is
    at most tol·‖A‖_F. Then the smallest rank that meets it is kept. The estimate comes from 16
    more columns of the first product, and the mean of its square is that of the error of the
    space. It is below half the error with a probability of at most 0.2 %. Tolerances down to about
    (64 + √m)·eps can be met; below that the status is `EXACT`, or all of A is decomposed.

    Of a `linalg.KernelMatrix` the approximation is FFᵀ for the F of `lowrank.pivoted_cholesky`,
    which reads (rank + 1)·m entries. No products with A are made, and there are no other options.
    The error estimate is then the trace of A − FFᵀ, which is known to rounding.

    Args:
        a: A (m, m), symmetric or Hermitian, positive semidefinite: a dense array of NumPy or JAX, a
            sparse matrix of JAX or SciPy, an operator (of which only A x is used), a file that is
            read by rows, or a `lowrank.HostMatrix`; as for `factorize`. Entries in half
            precision are rounded numbers, so eigenvalues below eps·‖A‖_F then count as zero.
        rank: how many eigenpairs, 1 ≤ r ≤ m; or give `tol`.
        tol: a bound of ‖A − U diag(λ) Uᴴ‖_F / ‖A‖_F, in Frobenius norms, in (0, 1].
        key: PRNG key of Ω; `jax.random.key(0)` by default.
        oversampling: how many more columns than `rank` Ω has, for a given rank; 10 by default. If
            the Krylov space would have m or more dimensions, Ω has m columns, and one pass is made.
        passes: how many products with A are made for a given rank, each with `rank + oversampling`
            columns; 3 by default.
        max_rank: with `tol`, the largest rank that is allowed; m by default.
        jackknife: whether to estimate how far the eigenvectors would move under another key, which
            takes an eigendecomposition per column of Ω (with `rank` only).

    Raises:
        ValueError: if not exactly one of `rank` and `tol` is given; if an option is out of range,
            or belongs to the other one; if A is not square, Hermitian, finite and non-zero; or if
            its compression to the Krylov space has an eigenvalue that is negative beyond rounding
            (values are checked outside of jit). Under jit and vmap, also on a matrix of the host,
            which a memory map is too.

    References:
        Tropp, Yurtsever, Udell and Cevher, Fixed-rank approximation of a positive-semidefinite
        matrix from streaming data, NeurIPS 2017.

        Epperly and Tropp, Efficient error and variance estimation for randomized matrix
        computations, SIAM J. Sci. Comput. 46, 2024.

    Examples:
        >>> import nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(1), 100, 0.5 ** jnp.arange(10))
        >>> psd = nys.nystrom(a, rank=3)
        >>> bool(jnp.allclose(psd.eigenvalues, jnp.array([1.0, 0.5, 0.25]), atol=1e-4))
        True
        >>> error = jnp.linalg.norm(a - psd.factor @ psd.factor.T)
        >>> bool(0.9 < psd.error_estimate / error < 1.5)
        True
        >>> nys.nystrom(a, tol=1e-3).eigenvalues.shape
        (10,)
    """
    key = jax.random.key(0) if key is None else validation.require_key("key", key)
    if (rank is None) == (tol is None):
        raise ValueError(f"rank is {rank} and tol is {tol}; expected exactly one of them")
    options = {"oversampling": oversampling, "passes": passes, "jackknife": jackknife}
    if isinstance(a, KernelMatrix):
        if rank is None:
            raise ValueError(
                f"tol is {tol} for a KernelMatrix; expected a rank (lowrank.pivoted_cholesky "
                "takes both)"
            )
        require_unset("A is a KernelMatrix; expected a rank only", max_rank=max_rank, **options)
        result = _of_kernel(pivoted_cholesky(a, rank, key=key))
        result = _named(result)
        if result.status is Status.NON_FINITE:
            raise ValueError(f"A has eigenvalues beyond {a.dtype}; expected a smaller kernel")
        return result
    a = as_input("A", a, key)
    m, n = as_shape("A", a.shape)
    if m != n:
        raise ValueError(
            f"A has shape {(m, n)}; expected a square matrix (nys.factorize takes any)"
        )
    if rank is not None:
        require_unset(f"rank is {rank}; expected max_rank=None", max_rank=max_rank)
        rank = validation.require_rank(rank, a.shape)
        oversampling = 10 if oversampling is None else oversampling
        columns = rank + validation.require_count("oversampling", oversampling)
        passes = 3 if passes is None else validation.require_count("passes", passes, low=1)
        if columns * passes >= m:
            columns, passes = m, 1
        if isinstance(a, HostMatrix):
            result = _approximation(a, _checked(a), key, rank, columns, passes, jackknife)
        else:
            _require_sound(a, key)
            result = _compiled(a, key, rank, columns, passes, jackknife)
    else:
        require_unset("tol is given; expected a rank", **options)
        tolerance, limit = known_tolerance(a, tol, key), largest_rank(max_rank, a.shape)
        if isinstance(a, HostMatrix):
            times = _checked(a)
        else:
            _require_sound(a, key)
            times = compiled(a).times
        result = of_tolerance(a, times, key, tolerance, limit)
    result = _named(result)
    if result.status is Status.NON_FINITE:
        raise ValueError("A has NaN or Inf entries, or its products overflow; expected finite ones")
    if result.status is Status.INDEFINITE:
        raise ValueError(
            "A is not positive semidefinite: its compression to a subspace has an eigenvalue that "
            "is negative beyond rounding; expected a PSD matrix (nys.factorize takes any)"
        )
    return result


def _named(result: PSDApproximation) -> PSDApproximation:
    """The result with a `Status`, if its numbers are known."""
    if not validation.is_concrete(result):
        return result
    return dataclasses.replace(result, status=Status(int(result.status)))


def _require_sound(a: LinearMap, key: Key[Array, ""]) -> None:
    """Raise ValueError unless the products of a known matrix are those of a Hermitian one."""
    # An operator may have no arrays; whether this is under jit, any array shows.
    if validation.is_concrete((a, np.empty(1), key)):
        probe = validation.probe_of(a.shape[0], working_dtype(a))
        image = compiled(a).times(probe)
        rounding = entry_rounding(a) if isinstance(a, Operator) else 0.0
        validation.require_sound_image("A", probe, image, symmetric=True, rounding=rounding)


def _checked(a: HostMatrix) -> Product:
    """Return x ↦ A x, of which the first product has more columns, to check A without a pass."""
    times, probe = products_of(a).times, validation.probe_of(a.shape[0], working_dtype(a))
    is_first = True

    def product(x: Inexact[Array, "m k"]) -> Inexact[Array, "m k"]:
        nonlocal is_first
        if not is_first:
            return times(x)
        is_first = False
        image, of_probe = jnp.split(times(jnp.concatenate([x, probe], axis=1)), [x.shape[1]], 1)
        validation.require_sound_image("A", probe, of_probe, symmetric=True)
        return image

    return product


@functools.partial(jax.jit, static_argnames=("rank", "columns", "passes", "jackknife"))
@full_precision
def _compiled(
    a: LinearMap, key: Key[Array, ""], rank: int, columns: int, passes: int, jackknife: bool
) -> PSDApproximation:
    return _approximation(a, products_of(a).times, key, rank, columns, passes, jackknife)


@full_precision
def _approximation(
    a: LinearMap | HostMatrix,
    times: Product,
    key: Key[Array, ""],
    rank: int,
    columns: int,
    passes: int,
    jackknife: bool,
) -> PSDApproximation:
    omega = jax.random.normal(key, (a.shape[0], columns), working_dtype(a))
    basis = extend(None, omega)
    image, e = normalized(times(basis))
    start = inner(basis, omega)
    for _ in range(1, passes):
        block = extend(basis, image[:, -columns:])
        basis = jnp.concatenate([basis, block], axis=1)
        image = jnp.concatenate([image, shift(times(block), -e)], axis=1)
    return _cut(basis, image, start, e, rank, passes, jackknife, entry_rounding(a))


@functools.partial(jax.jit, static_argnames=("rank", "passes", "jackknife", "rounding"))
@full_precision
def _cut(
    basis: Inexact[Array, "m k"],
    image: Inexact[Array, "m k"],
    start: Inexact[Array, "s s"],
    e: Int[Array, ""],
    rank: int,
    passes: int,
    jackknife: bool,
    rounding: float,
) -> PSDApproximation:
    """The approximation from a basis, its image by A·2^(−e), and the first block in the basis."""
    compression = compress(basis, image, rounding)
    gram, nu = compression.gram, compression.ridge
    image = image + nu * basis
    parts = leave_one_out.replicates(gram, start, nu)
    # Leaving one column out of a complete space says nothing of the space, which is all.
    complete = len(gram) == len(basis)
    error = nu if complete else leave_one_out.error(parts, image)
    square = inner(image, image)
    deviations = leave_one_out.deviations(parts, square, rank) if jackknife else None
    return truncate(compression, error, rank, passes, Status.RANK_REACHED, e, deviations)


@jax.jit
@full_precision
def _of_kernel(cholesky: PivotedCholesky) -> PSDApproximation:
    """The eigenvectors of FFᵀ, by two passes of Cholesky QR.

    The columns of F are well conditioned once they have unit length, because each is what the
    others have left.
    """
    factor, e = normalized(cholesky.factor)
    rank, dtype = factor.shape[1], factor.dtype
    live = jnp.arange(rank) < cholesky.numerical_rank
    dead = jnp.diag(jnp.where(live, 0, 1).astype(dtype))
    gram = factor.T @ factor
    scale = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, jnp.diagonal(gram), 1)), 1)
    ridge = 2 * rank * float(jnp.finfo(dtype).eps) * jnp.eye(rank, dtype=dtype)
    first = inverse_cholesky(scale[:, None] * gram * scale + dead + ridge)
    first = scale[:, None] * first
    basis = factor @ first
    second = inverse_cholesky(basis.T @ basis + dead)
    triangle = inverse_upper(second) @ inverse_upper(first)  # F = basis · second · triangle
    triangle = jnp.where(live & live[:, None], triangle, 0)
    rising, turn = eigh_of_positive(triangle @ triangle.T)
    order = jnp.arange(rank)[::-1]
    eigenvalues = shift(jnp.where(live, jnp.maximum(rising[order], 0), 0), 2 * e)
    finite = jnp.all(jnp.isfinite(eigenvalues))
    vectors = jnp.where(live, basis @ (second @ turn[:, order]), 0)
    return PSDApproximation(
        vectors=with_fixed_signs(vectors, vectors)[0],
        eigenvalues=eigenvalues,
        error_estimate=jnp.sum(cholesky.residual),
        numerical_rank=cholesky.numerical_rank,
        passes=jnp.asarray(0),
        status=jnp.where(finite, int(Status.RANK_REACHED), int(Status.NON_FINITE)),
        pivots=cholesky.pivots,
    )
