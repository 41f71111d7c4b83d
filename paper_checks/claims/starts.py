"""Small and perturbed starts converge linearly: Figures 1 (a), (b) and 4 (b)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework import Measured, claim, common
from paper_checks.framework.families import residual_curves, trajectories

ETAS = (0.1, 0.3, 0.5)
NOISES = (1e-2, 1e-4, 1e-6)
TINY = (1e-2, 1e-12, 1e-50, 1e-100)
M = 24


@functools.cache
def problems(rank: int) -> tuple[Any, ...]:
    """Return A, Q, diag(Σ), η and keys: r_A = 5, κ = 2, 100, two spectra × `ETAS`, twice each."""
    cells = [
        (common.spectrum(profile, 5, kappa), eta)
        for kappa in (2.0, 100.0)
        for profile in ("geometric", "last")
        for eta in ETAS
        for _ in range(2)
    ]
    spectra, etas = (np.array(part) for part in zip(*cells, strict=True))
    a, basis = common.psd_batch(common.keys(len(cells), 54), M, spectra)
    return a, basis, spectra, etas, common.keys(len(cells), 55, rank)


def inside(basis: Any, x: Any) -> Any:
    """Return QQᵀX."""
    return basis @ (jnp.swapaxes(basis, 1, 2) @ x)


def rate_gap(curves: np.ndarray, eta: np.ndarray, high: float, low: float) -> float:
    """Return the largest |q/(1−η) − 1|; q is the factor per step between two levels of the error.

    Args:
        curves: errors, (b, t).
        eta: step sizes, (b,).
        high: the upper level.
        low: the lower level, which every curve must reach.
    """
    first, last = (np.argmax(curves < level, axis=1) for level in (high, low))
    rows = np.arange(len(curves))
    if np.any(curves[:, -1] >= low):
        raise ValueError(f"an error ends at {curves[:, -1].max():.1e}; expected less than {low}")
    factor = (curves[rows, last] / curves[rows, first]) ** (1 / np.maximum(last - first, 1))
    return float(np.max(np.abs(factor / (1 - eta) - 1)))


@claim(
    "fig-1a-small",
    "ScaledGD from a small start is linear: ‖X_tX_tᵀ − A‖_F falls by 1 − η per step in the end",
    hypotheses="exactly parametrized, ζ = 1e-3; m = 24, r = r_A = 5, κ = 2, 100, two kinds of "
    "spectrum, η = .1, .3, .5, two starts each; the error between 1e-9 and 1e-12; allowed 1 %",
    removes="a start that leaves range(A)",
    instead="QQᵀX_0 of the same start",
    projected=True,
)
def small_start(projected: bool = False) -> Measured:
    """Measure Figure 1 (a), and the paper's footnote 1 on small starts."""
    a, basis, spectra, eta, keys = problems(5)
    x0 = jax.vmap(lambda k: nys.initializers.small(k, M, 5, 1e-3))(keys)
    x0 = inside(basis, x0) if projected else x0
    curves = np.asarray(residual_curves(a, basis, spectra, x0, eta, 400))
    return Measured(
        rate_gap(curves, eta, 1e-9, 1e-12),
        0.01,
        detail="|q/(1−η) − 1| of the factor q, largest",
        rounding=True,
    )


@claim(
    "fig-1b-perturbed",
    "X_0 = AΩ + N: ‖X_tX_tᵀ − A‖_F falls by 1 − η per step in the end, for every ξ_n > 0",
    hypotheses="exactly parametrized, ξ_n = 1e-2, 1e-4, 1e-6, ξ = 1; problems of fig-1a-small; "
    "the error between 1e-10 and 1e-13; allowed 5 %",
    removes="N",
    instead="N replaced by its part QQᵀN inside range(A)",
    projected=True,
)
def perturbed_start(projected: bool = False) -> Measured:
    """Measure the dotted lines of Figure 1 (b)."""
    a, basis, spectra, eta, keys = problems(5)
    gaps = []
    for noise in NOISES:
        x0 = common.start_batch(keys, a, 5, np.ones(len(eta)), noise)
        x0 = inside(basis, x0) if projected else x0
        curves = np.asarray(residual_curves(a, basis, spectra, x0, eta, 400))
        gaps.append(rate_gap(curves, eta, 1e-10, 1e-13))
    return Measured(max(gaps), 0.05, detail="|q/(1−η) − 1| of the factor q, largest")


@claim(
    "fig-1b-residual",
    "(I − QQᵀ)X_t = (1−η)^t (I − QQᵀ)X_0 from every start of full column rank, so that "
    "‖X_tX_tᵀ − A‖_F ≥ √2(1−η)^t‖(I − QQᵀ)X_0Φ_tᵀ‖_F: linear at best, for every ξ_n > 0",
    source="ours",
    derivation="perturbed-starts",
    hypotheses="exactly parametrized, A = diag(Σ, 0), so that rounding does not enter; ξ_n = "
    "1e-2, 1e-12, 1e-50, 1e-100; m = 24, r = r_A = 5, κ = 2, 100, two kinds of spectrum, η = .1, "
    ".3, .5, two starts each; 100 steps",
    removes="zero damping",
    instead="λ = 1e-2, with which the factor is no longer (1−η)^t",
    damping=1e-2,
)
def residual_decay(damping: float = 0.0) -> Measured:
    """Measure why the dotted lines of Figure 1 (b) are straight."""
    _, _, spectra, eta, keys = problems(5)
    a = np.zeros((len(eta), M, M))
    a[:, np.arange(5), np.arange(5)] = spectra
    gaps = []
    for noise in TINY:
        x0 = common.start_batch(keys, a, 5, np.ones(len(eta)), noise)
        x = np.asarray(trajectories(a, x0, eta, damping, 100))
        outside = np.max(np.abs(x[:, :, 5:]), axis=(2, 3))
        expected = (1 - eta)[:, None] ** np.arange(101) * outside[:, :1]
        gaps.append(np.max(np.abs(outside / expected - 1)))
    return Measured(
        float(max(gaps)),
        1e-12,
        detail="relative difference of the largest entries, largest over runs and steps",
        rounding=True,
    )


@claim(
    "fig-4b-perturbed",
    "over-parametrized, X_0 = AΩ + N: ‖X_tX_tᵀ − A‖_F ≥ c(1−η)^t, so the quadratic rate is "
    "lost; c = ξ_n/100",
    hypotheses="r = 8, r_A = 5, m = 24, ξ_n = 1e-2, 1e-4, ξ = 1, κ = 2, 100, two kinds of "
    "spectrum, η = 1/2, two starts each; t ≤ 25",
    removes="N",
    instead="the Nyström start AΩ",
    noises=(0.0,),
)
def perturbed_over(noises: tuple[float, ...] = NOISES[:2]) -> Measured:
    """Measure the dotted lines of Figure 4 (b)."""
    a, basis, spectra, eta, keys = problems(8)
    rows = np.flatnonzero(eta == 0.5)
    a, basis, spectra, eta, keys = (v[rows] for v in (a, basis, spectra, eta, keys))
    ratios = []
    for noise in noises:
        x0 = common.start_batch(keys, a, 8, np.ones(len(eta)), noise)
        curves = np.asarray(residual_curves(a, basis, spectra, x0, eta, 25))
        least = 0.5 ** np.arange(26) * (noise or NOISES[0]) / 100
        ratios.append(np.max(least / curves))
    return Measured(
        float(max(ratios)), 1.0, detail="c(1−η)^t over the error, largest", at_least=1e3
    )
