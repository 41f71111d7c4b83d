"""Robust PCA by ScaledGD with thresholding: a low-rank matrix from partly wrong entries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nyscaled as nys
from paper_checks.framework import Measured, claim, common

M, N, RANK, TRIALS, STEPS = 60, 50, 2, 3, 60
KAPPAS = (2.0, 10.0, 100.0)


@jax.jit
@jax.vmap
def _problems(kappa: Any, key: Any) -> tuple[Any, Any, Any]:
    """Return the observed matrix, M, and a start at a distance of about 0.1 σ_r(M)."""
    spectrum = jnp.stack([jnp.ones_like(kappa), 1 / kappa])
    problem, truth = nys.problems.robust.corrupted(key, M, N, spectrum, 0.05)
    away = nys.initializers.small_factors(jax.random.fold_in(key, 1), (M, N), RANK, 1.0)
    start = jax.tree.map(lambda f, e: f + 0.1 * e / (len(e) * kappa) ** 0.5, truth, away)
    return problem.observed, truth.left @ truth.right.T, start


def errors(preconditioned: bool, fraction: float) -> np.ndarray:
    """Return ‖X_tY_tᵀ − M‖_F/σ_r(M), (κ, trial, t).

    Args:
        preconditioned: whether to run ScaledGD; otherwise GD.
        fraction: α of the problem, the share of entries that may be wrong.
    """
    tx = nys.scaled_gd(0.5) if preconditioned else optax.sgd(0.5)

    def run(kappa: Any, observed: Any, target: Any, start: Any) -> Any:
        step = nys.solvers.gradient_step(nys.problems.RobustPCA(observed, fraction), tx)
        distance = nys.problems.Asymmetric(target).residual
        return nys.solvers.run(step, start, STEPS, lambda f: kappa * distance(f)).history

    kappas = jnp.repeat(jnp.array(KAPPAS), TRIALS)
    problems = _problems(kappas, jnp.tile(common.keys(TRIALS, 130), len(KAPPAS)))
    curves = jax.jit(jax.vmap(run))(kappas, *problems)
    return np.asarray(curves).reshape(len(KAPPAS), TRIALS, -1)


@claim(
    "robust-rate",
    "ScaledGD with thresholding is linear on robust PCA at a rate independent of κ (Tong, Ma, Chi, "
    "JMLR 2021): "
    "‖X_tY_tᵀ − M‖_F ≤ 2·0.8^t‖X_0Y_0ᵀ − M‖_F",
    source="literature",
    hypotheses=f"{M} × {N}, r = {RANK}, κ = 2 … 100, 5 % of the entries of each row and column "
    f"wrong by ten times their size, η = 1/2, starts about 0.1 σ_r(M) away, {TRIALS} problems, t "
    f"≤ {STEPS}",
    removes="the preconditioner",
    instead="GD with the same η",
    preconditioned=False,
)
def rate(preconditioned: bool = True) -> Measured:
    """Measure the rate down to 1e-8 σ_r(M)."""
    curves = errors(preconditioned, 0.05)
    envelope = 2 * 0.8 ** np.arange(STEPS + 1) * curves[..., :1] + 1e-8
    return Measured(common.largest(curves / envelope), 1.0, detail="error over envelope, largest")


@claim(
    "robust-exact",
    "wrong entries of any size do not move the limit: ‖X_tY_tᵀ − M‖_F ≤ 1e-5 σ_r(M) "
    "after 60 steps (Tong, Ma, Chi, JMLR 2021)",
    source="literature",
    hypotheses="as robust-rate; α of the problem equals the share of errors",
    removes="an α as large as the share of the errors",
    instead="α = 0.02, two fifths of that share",
    fraction=0.02,
)
def exact(fraction: float = 0.05) -> Measured:
    """Measure whether gross errors are removed, not averaged."""
    return Measured(
        common.largest(errors(True, fraction)[..., -1]), 1e-5, detail="last error over σ_r(M)"
    )
