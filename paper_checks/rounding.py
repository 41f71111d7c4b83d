"""This project's own statements on rounding: which form of ScaledGD keeps its digits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks import common
from paper_checks.claim import Limit, Measured, claim

LEFT = 1e-4
"""What cutting X anew at every step leaves at least; rounding decides the rest."""


@claim(
    "E4",
    "float32: with the dual from an orthonormal factor ScaledGD ends at ‖XXᵀ − A‖_F ≤ 5e-6 for κ = 1e2 … 1e5",
    source="ours",
    hypotheses="m = 200, r = r_A = 20, spectrum near 1 but for σ_20 = 1/κ, κ = 1e2 … 1e5, η = 1/2, Nyström start, X_60; the control at κ = 1e2 … 1e5 too",
    removes="the orthonormal factor",
    instead="the textbook (XᵀX)^{−1} in float32",
    textbook=True,
)
def rounding(textbook: bool = False) -> Measured:
    """E4."""
    finals = []
    for kappa in (1e2, 1e3, 1e4, 1e5):
        spectrum = jnp.asarray(common.spectrum("last", 20, kappa), jnp.float32)
        a, basis = nys.spectra.psd(common.key(94), 200, spectrum, jnp.float32)
        x = nys.initializers.nystrom(common.key(95), a, 20, 1.0)
        if textbook:
            plain, matrix = np.asarray(x), np.asarray(a)
            for _ in range(60):
                inverse = np.linalg.inv(plain.T @ plain)
                plain = (
                    plain - np.float32(0.5) * (plain @ (plain.T @ plain) - matrix @ plain) @ inverse
                )
            x = jnp.asarray(plain)
        else:
            step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
            x = nys.solvers.run(step, x, 60).params
        error = nys.optimality.residual_in_basis(
            jnp.asarray(x, jnp.float64), jnp.asarray(basis, jnp.float64), jnp.asarray(spectrum)
        )
        finals.append(float(error))
    return Measured(
        max(finals), 5e-6, detail="‖X_60X_60ᵀ − A‖_F, largest", rounding=True, at_least=2e-5
    )


@claim(
    "E7",
    "(26) with the rank cut once, at X_0, stays at the rounding level; r > r_A",
    source="ours",
    hypotheses="m = 100, r = 40, r_A = 10, κ = 1e6, η = 1/2, Nyström start, 200 steps, the largest error over the last 150",
    removes="the single cut",
    instead="the pseudo-inverse of X at every step, cut at √m·eps (linalg.pinv)",
    every_step=True,
)
def rank_cut_once(every_step: bool = False) -> Measured:
    """E7, and the textbook pinv(XᵀX) of (26) beside it."""
    spectrum = jnp.asarray(common.spectrum("last", 10, 1e6))
    a, basis = nys.spectra.psd(common.key(96), 100, spectrum)
    x0 = nys.initializers.nystrom(common.key(97), a, 40, 1.0)

    @jax.jit
    def record(x: jax.Array) -> jax.Array:
        return nys.optimality.residual_in_basis(x, basis, spectrum)

    @jax.jit
    def cut_again(x: jax.Array) -> jax.Array:
        return 0.5 * x + 0.5 * a @ nys.linalg.pinv(x).T

    if every_step:
        curve, x = [], x0
        for _ in range(200):
            x = cut_again(x)
            curve.append(float(record(x)))
        return Measured(
            max(curve[50:]),
            1e-13,
            detail="‖X_tX_tᵀ − A‖_F, 50 < t ≤ 200, largest",
            at_least=LEFT,
        )
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    curve = np.asarray(nys.solvers.run(step, x0, 200, record).history)
    facts = {}
    for rcond in (1e-15, 1e-10):
        x, worst_error = np.asarray(x0), 0.0
        matrix = np.asarray(a)
        for t in range(200):
            x = x / 2 + matrix @ x @ np.linalg.pinv(x.T @ x, rcond=rcond, hermitian=True) / 2
            worst_error = max(worst_error, float(record(jnp.asarray(x)))) if t > 50 else 0.0
        facts[f"pinv(XᵀX), rcond = {rcond:.0e}"] = Limit(worst_error, 5e-7, "≥")
    return Measured(
        float(np.max(curve[50:])),
        1e-13,
        detail="‖X_tX_tᵀ − A‖_F, 50 < t ≤ 200, largest",
        facts=facts,
        rounding=True,
    )
