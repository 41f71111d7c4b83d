"""This project's statements on rounding: which form of ScaledGD keeps its accuracy."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework import Limit, Measured, claim, common
from paper_checks.framework.families import residual_curves, trajectories

LEFT = 1e-4
"""The least error after cutting X in every step; rounding decides its exact size."""
PROFILES = ("last", "repeated", "clustered")
SPECTRA = (
    "near-constant, repeated and clustered eigenvalues; σ_1(A) = 1, 1e6, 1e-6; three starts each"
)


def batch(
    m: int, rank: int, true_rank: int, kappas: tuple[float, ...], salt: int
) -> tuple[Any, Any, np.ndarray, Any]:
    """Return A, Q, diag(Σ) and X_0 = AΩ per κ, kind of spectrum and seed; σ_1(A) takes turns.

    Args:
        m: the side of A.
        rank: r.
        true_rank: r_A.
        kappas: condition numbers.
        salt: distinguishes the random numbers of claims.
    """
    cells = list(itertools.product(kappas, PROFILES, range(common.SEEDS)))
    spectra = np.array([common.spectrum(profile, true_rank, kappa) for kappa, profile, _ in cells])
    spectra *= np.array(common.UNITS)[np.arange(len(cells)) % 3][:, None]
    a, basis = common.psd_batch(common.keys(len(cells), salt, m, rank), m, spectra)
    keys = common.keys(len(cells), salt + 1, m, rank)
    x0 = common.start_batch(keys, a, rank, np.ones(len(cells)), 0.0)
    return a, basis, spectra, x0


DUAL_SIZES = ((200, 20), (60, 1), (12, 12))


@claim(
    "float32-dual",
    "float32: with the dual from an orthonormal factor ScaledGD ends at ‖XXᵀ − A‖_F ≤ 5e-6 "
    "σ_1(A) for κ = 1e2 … 1e5",
    source="ours",
    derivation="dual",
    hypotheses="m = 200, r = r_A = 20; m = 60, r = r_A = 1; m = r = r_A = 12; κ = 1e2 … 1e5; "
    f"{SPECTRA}; η = 1/2, Nyström start, X_60; the control with m = 200",
    removes="the orthonormal factor",
    instead="the textbook (XᵀX)^{−1} in float32",
    textbook=True,
)
def rounding(textbook: bool = False) -> Measured:
    """Measure the last error in float32."""
    finals = []
    for m, rank in DUAL_SIZES[:1] if textbook else DUAL_SIZES:
        exact = batch(m, rank, rank, (1e2, 1e3, 1e4, 1e5), 94)
        a, basis, spectra, x = (jnp.asarray(v, jnp.float32) for v in exact)
        if textbook:
            plain, matrix = np.asarray(x), np.asarray(a)
            for _ in range(60):
                gram = np.swapaxes(plain, 1, 2) @ plain
                step = (plain @ gram - matrix @ plain) @ np.linalg.inv(gram)
                plain = plain - np.float32(0.5) * step
            x = jnp.asarray(plain)
        else:
            half = jnp.full(len(a), 0.5, jnp.float32)
            x = trajectories(a, x, half, jnp.zeros((), jnp.float32), 60)[:, -1]
        wide = [jnp.asarray(v, jnp.float64) for v in (x[:, None], basis, spectra)]
        errors = common.over_time(nys.optimality.residual_in_basis, 0, None, None)(*wide)
        finals.append(common.largest(np.asarray(errors)[:, 0] / np.asarray(spectra)[:, 0]))
    return Measured(
        max(finals),
        5e-6,
        detail="‖X_60X_60ᵀ − A‖_F/σ_1(A), largest",
        rounding=True,
        at_least=2e-5,
    )


CUT_SIZES = ((100, 40, 10), (12, 12, 1), (12, 12, 9))


@jax.jit
@jax.vmap
def _cut_at_every_step(a: Any, basis: Any, spectrum: Any, x: Any) -> Any:
    def step(x: Any, _: None) -> tuple[Any, Any]:
        x = 0.5 * x + 0.5 * a @ nys.linalg.pinv(x).T
        return x, nys.optimality.residual_in_basis(x, basis, spectrum)

    return jax.lax.scan(step, x, length=200)[1]


@claim(
    "rank-cut-once",
    "(26) with the rank cut once, at X_0, stays at the rounding level; r > r_A",
    source="ours",
    derivation="rank",
    hypotheses="m = 100, r = 40, r_A = 10; m = r = 12, r_A = 1, 9; κ = 1e6; "
    f"{SPECTRA}; η = 1/2, Nyström start, 200 steps, the largest error over the last 150; the "
    "control with m = 100",
    removes="the single cut",
    instead="the pseudo-inverse of X at every step, cut at √m·eps (linalg.pinv)",
    every_step=True,
)
def rank_cut_once(every_step: bool = False) -> Measured:
    """Measure (26), and beside it the textbook pinv(XᵀX)."""
    detail = "‖X_tX_tᵀ − A‖_F/σ_1(A), 50 < t ≤ 200, largest"
    first = batch(*CUT_SIZES[0], (1e6,), 96)
    if every_step:
        curves = np.asarray(_cut_at_every_step(*first)) / first[2][:, :1]
        return Measured(common.largest(curves[:, 50:]), 1e-13, detail=detail, at_least=LEFT)
    errors = []
    for size in CUT_SIZES:
        a, basis, spectra, x0 = batch(*size, (1e6,), 96)
        half = np.full(len(spectra), 0.5)
        curves = np.asarray(residual_curves(a, basis, spectra, x0, half, 200))
        errors.append(common.largest(curves[:, 50:] / spectra[:, :1]))
    return Measured(max(errors), 1e-13, detail=detail, facts=_plain(*first), rounding=True)


def _plain(a: Any, basis: Any, spectra: np.ndarray, x0: Any) -> dict[str, Limit]:
    """Return the largest error after step 50 of (26) with pinv(XᵀX), for two cuts, of run 1."""
    facts = {}
    matrix, q, sigma = np.asarray(a)[0], np.asarray(basis)[0], spectra[0]
    for rcond in (1e-15, 1e-10):
        x, worst_error = np.asarray(x0)[0], 0.0
        for t in range(200):
            x = x / 2 + matrix @ x @ np.linalg.pinv(x.T @ x, rcond=rcond, hermitian=True) / 2
            if t > 50:
                error = np.linalg.norm(x @ x.T - (q * sigma) @ q.T)
                worst_error = max(worst_error, float(error / sigma[0]))
        facts[f"pinv(XᵀX), rcond = {rcond:.0e}"] = Limit(worst_error, 5e-7, "≥")
    return facts
