"""The factorization as a tool: how good it is, and what its error estimates are worth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework import Limit, Measured, claim, common

M, N, RANK = 40, 30, 4
DRAWS = 2000
SPECTRA = {
    "1/i": 1 / np.arange(1.0, N + 1),
    "1/√i": np.arange(1.0, N + 1) ** -0.5,
    "2^−i": 0.5 ** np.arange(N),
    "almost flat": np.linspace(1, 0.8, N),
    "a gap after 10": np.where(np.arange(N) < 10, 1.0, 1e-3),
    "5 and noise": np.where(np.arange(N) < 5, 1.0, 0.05 * np.linspace(1, 0.5, N)),
}
SIX = "σ_i = " + ", ".join(SPECTRA)


def _matrices() -> Any:
    """Return one matrix (M, N) per spectrum, with random singular vectors, in float64."""
    key = jax.random.key(common.SEED)
    left, right = (
        jnp.linalg.qr(jax.random.normal(jax.random.fold_in(key, i), (side, N)))[0]
        for i, side in enumerate((M, N))
    )
    return jnp.stack([(left * s) @ right.T for s in SPECTRA.values()])


def _draws(passes: int, fitted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return estimates and errors ‖A − Â‖_F, (spectrum, key).

    Args:
        passes: products with A per factorization.
        fitted: whether the estimate is in place of that of `factorize` the residual on right
            singular vectors of Â, which depend on its basis.
    """

    @jax.jit
    def run(a: Any) -> Any:
        def one(key: Any) -> tuple[Any, Any]:
            f = nys.factorize(a, RANK, key=key, passes=passes, oversampling=3)
            residual = a - (f.left * f.singular_values) @ f.right.T
            probed = (N / RANK) ** 0.5 * jnp.linalg.norm(residual @ f.right)
            estimate = probed if fitted else f.error_estimate
            return estimate, jnp.linalg.norm(residual)

        return jax.lax.map(one, common.keys(DRAWS, 150))

    estimates, errors = jax.lax.map(run, _matrices())
    return np.asarray(estimates), np.asarray(errors)


def _seldom_low(passes: int, fitted: bool, widest: float) -> Measured:
    estimates, errors = _draws(passes, fitted)
    mean = np.sqrt(np.mean(estimates**2, axis=1) / np.mean(errors**2, axis=1))
    return Measured(
        float(np.max(np.mean(estimates < 0.5 * errors, axis=1))),
        0.02,
        detail=f"largest share of {DRAWS:,} estimates that are below half of the error",
        facts={} if fitted else {"root mean square ratio": Limit(float(np.max(mean)), widest, "≤")},
    )


@claim(
    "lowrank-leave-one-out",
    "The leave-one-out estimate of a randomized SVD (Epperly, Tropp, SIAM J. Sci. Comput. 2024) is "
    "below half of ‖A − Â‖_F with a probability of at most 2 %",
    source="literature",
    hypotheses=f"{M} × {N}, r = {RANK}, 7 columns, two products, six spectra: {SIX}; "
    f"{DRAWS:,} keys each",
    removes="that a column is left out of the basis that it measures",
    instead="the residual on right singular vectors of Â",
    fitted=True,
)
def leave_one_out(fitted: bool = False) -> Measured:
    """The estimate of a randomized SVD."""
    return _seldom_low(2, fitted, 1.3)


@claim(
    "lowrank-probes",
    "The estimate from 8 probes is below half of ‖A − Â‖_F with a probability of at most 2 %: that "
    "of χ²_8 < 2, for a remainder of rank one",
    source="literature",
    hypotheses=f"{M} × {N}, r = {RANK}, 7 columns, four products, six spectra: {SIX}; {DRAWS:,} "
    "keys each",
    removes="that the probes are independent of the basis",
    instead="the residual on right singular vectors of Â",
    fitted=True,
)
def probes(fitted: bool = False) -> Measured:
    """The estimate of a factorization from a block Krylov space."""
    return _seldom_low(4, fitted, 1.03)


@claim(
    "lowrank-krylov",
    "Six products of a block Krylov space with r + 3 columns give ‖A − Â‖_F ≤ 1.02 min_{rank r} "
    "‖A − B‖_F (Musco, Musco, NeurIPS 2015, for blocks enough)",
    source="literature",
    hypotheses=f"{M} × {N}, r = {RANK}, six spectra: {SIX}; the mean of 100 keys",
    removes="the Krylov space",
    instead="two products, the randomized SVD",
    passes=2,
)
def krylov(passes: int = 6) -> Measured:
    """How close the factorization comes to the best one."""

    @jax.jit
    def error(a: Any) -> Any:
        def one(key: Any) -> Any:
            f = nys.factorize(a, RANK, key=key, passes=passes, oversampling=3)
            return jnp.linalg.norm(a - (f.left * f.singular_values) @ f.right.T)

        return jnp.mean(jax.lax.map(one, common.keys(100, 151)))

    errors = np.asarray(jax.lax.map(error, _matrices()))
    best = [np.linalg.norm(s[RANK:]) for s in SPECTRA.values()]
    return Measured(
        float(np.max(errors / best)), 1.02, detail="largest mean of ‖A − Â‖_F over the best error"
    )


@claim(
    "nystrom-trace",
    "E tr(A − AΩ(ΩᵀAΩ)†ΩᵀA) ≤ (1 + k/(q − k − 1)) Σ_{i>k} λ_i for each k ≤ q − 2, Gaussian Ω with "
    "q columns (Frangella, Tropp, Udell, SIAM J. Matrix Anal. 2023)",
    source="literature",
    hypotheses=f"m = {N}, q = 10, six spectra: {SIX}; the mean of 200 keys",
    removes="the Gaussian Ω",
    instead="columns of A at random, for an A whose eigenvectors are columns of the identity",
    columns=True,
)
def nystrom_trace(columns: bool = False) -> Measured:
    """The expected error of a Nyström approximation from one product."""
    q = 10

    @jax.jit
    def mean_error(spectrum: Any) -> Any:
        right = jnp.linalg.qr(jax.random.normal(jax.random.key(common.SEED), (N, N)))[0]

        def one(key: Any) -> Any:
            if columns:  # of a diagonal A: what is not drawn is lost
                return jnp.sum(spectrum) - jnp.sum(jax.random.choice(key, spectrum, (q,), False))
            a = (right * spectrum) @ right.T
            f = nys.nystrom(a, q, key=key, passes=1, oversampling=0)
            return jnp.sum(spectrum) - jnp.sum(f.eigenvalues)

        return jnp.mean(jax.lax.map(one, common.keys(200, 152)))

    ratios: list[float] = []
    for spectrum in SPECTRA.values():
        error = float(mean_error(jnp.asarray(spectrum)))
        bounds = [(1 + k / (q - k - 1)) * np.sum(spectrum[k:]) for k in range(q - 1)]
        ratios.append(float(error / min(bounds)))
    return Measured(max(ratios), 1.0, detail="largest mean trace error over the least bound")


@claim(
    "pivoted-cholesky",
    "Randomly pivoted Cholesky: E tr(A − Â) ≤ (1 + ε) Σ_{i>r} λ_i after k ≥ r/ε + r log(1/(εη)) "
    "columns, η = Σ_{i>r} λ_i / tr A, for each r and ε (Chen, Epperly, Tropp, Webber, CPAM 2025)",
    source="literature",
    hypotheses="a Gaussian kernel on 300 points, of which 290 lie close together and 10 far from "
    "each other; k = 80, the least bound; the mean of 20 keys",
    removes="the pivots by the diagonal of what is left",
    instead="columns at random",
    uniform=True,
)
def pivoted_cholesky(uniform: bool = False) -> Measured:
    """The expected error of pivots on clustered points."""
    rng = np.random.default_rng(common.SEED)
    near, far = 0.1 * rng.standard_normal((290, 2)), 100.0 * np.arange(1, 11)[:, None] * np.ones(2)
    points = jnp.asarray(np.concatenate([near, far]))
    kernel = nys.linalg.KernelMatrix(nys.linalg.kernels.gaussian(1.0), points)
    dense = np.asarray(kernel @ jnp.eye(300))
    tails = np.cumsum(np.maximum(np.linalg.eigvalsh(dense), 1e-16))[:0:-1]  # Σ_{i>r} λ_i by r
    rank, epsilon = np.arange(299)[:, None], np.geomspace(1e-2, 1e6, 801)
    needed = rank / epsilon + rank * np.log(tails[0] / (epsilon * tails[:, None]))
    bound = np.min(np.where(needed <= 80, (1 + epsilon) * tails[:, None], np.inf))
    errors: list[float] = []
    for key in common.keys(20, 153):
        if uniform:
            chosen = np.asarray(jax.random.choice(key, 300, (80,), replace=False))
            columns = dense[:, chosen]
            explained = columns @ np.linalg.pinv(columns[chosen], 1e-10)
            left = np.trace(dense) - np.sum(columns * explained)
        else:
            left = float(nys.nystrom(kernel, 80, key=key).error_estimate)
        errors.append(left)
    measured = float(np.mean(errors) / bound)
    return Measured(measured, 1.0, detail="mean trace error over the bound", rounding=True)
