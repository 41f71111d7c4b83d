"""Section 2.3 and Appendix B.1, B.2: the symmetric problem with r = r_A."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.claims import tails
from paper_checks.framework import Measured, claim, worst
from paper_checks.framework.common import (
    Dtype,
    eps,
    frobenius,
    over_time,
    singular_values,
    transposed,
)
from paper_checks.framework.families import (
    EVERYWHERE,
    LEAVES_RANGE,
    SMALL_START,
    Family,
    Start,
    everywhere,
)

RUNS = EVERYWHERE["exact"]


def cores(f: Family) -> np.ndarray:
    """Return B_t = Φ_tΦ_tᵀ, (10)."""
    phi = np.asarray(f.phi)
    return phi @ transposed(phi)


def diagonal(spectrum: object) -> np.ndarray:
    """Return Σ of a batch of spectra."""
    s = np.asarray(spectrum)
    return s[:, :, None] * np.eye(s.shape[1])


def alignment(f: Family, dtype: Dtype) -> float:
    """Return ‖(I − QQᵀ)X_t‖_F in units of rounding, largest over the runs.

    A itself leaves its range by eps‖A‖, and the dual of X_{t-1} magnifies that, so the unit is
    eps·(‖X_t‖_F + ‖A‖‖dual(X_{t-1})‖_F + …), summed over the past with the weights (1−η)^s of (2).
    """
    outside = np.asarray(over_time(nys.optimality.residual_space, 0, None)(f.x, f.basis))
    values = singular_values(f.x)
    size = np.linalg.norm(values, axis=-1)
    positive = np.maximum(values[..., : f.spectrum.shape[1]], np.finfo(dtype).tiny)
    dual = np.asarray(f.spectrum)[:, :1] * np.linalg.norm(1 / positive, axis=-1)
    unit = size[:, 0]
    ratio = outside[:, 0] / unit
    for t in range(1, outside.shape[1]):
        unit = np.maximum(size[:, t], (1 - f.eta) * unit + f.eta * dual[:, t - 1])
        ratio = np.maximum(ratio, outside[:, t] / unit)
    return float(np.max(ratio)) / eps(dtype)


@claim(
    "lem-2i",
    "X_t = QΦ_t for all t: (I − QQᵀ)X_t = 0",
    hypotheses=f"exactly parametrized, Nyström start, ScaledGD (2). {RUNS}",
    **LEAVES_RANGE,
)
def lemma_2i(start: Start = "nystrom") -> Measured:
    """Lemma 2 (i)."""
    return worst(
        "‖(I − QQᵀ)X_t‖_F in units of rounding, largest over runs and steps",
        everywhere("exact", alignment, 100.0, start=start),
        rounding=True,
    )


def growth(f: Family, dtype: Dtype) -> float:
    """Return the bound of Lemma 2 (ii) over (1 + 10 eps cond)σ_r(X_{t+1})², largest over all."""
    rank = f.spectrum.shape[1]
    values = singular_values(np.asarray(f.x, np.float64))
    squares = values[..., rank - 1] ** 2
    noise = 1 + 10 * eps(dtype) * values[:, 1:, 0] / values[:, 1:, rank - 1]
    smallest = np.asarray(f.spectrum, np.float64)[:, -1:]
    eta = f.eta[:, None]
    t = np.arange(squares.shape[1] - 1)
    bound = (1 - eta) ** (2 * t + 2) * squares[:, :1]
    bound = bound + (1 - eta) * smallest * (1 - (1 - eta) ** (2 * t + 2))
    return float(np.max(bound / squares[:, 1:] / noise))


@claim(
    "lem-2ii",
    "σ_r(X_{t+1}X_{t+1}ᵀ) ≥ (1−η)^{2t+2} σ_r(X_0X_0ᵀ) + (1−η)σ_r(A) − (1−η)^{2t+3} σ_r(A)",
    hypotheses=f"exactly parametrized, Nyström start, 0 < η ≤ 1. {RUNS}",
    **SMALL_START,
)
def lemma_2ii(start: Start = "nystrom") -> Measured:
    """Lemma 2 (ii)."""
    return worst(
        (
            "bound over (1 + 10 eps cond(X_{t+1}))σ_r(X_{t+1})², largest over runs and steps; "
            "large starts attain it"
        ),
        everywhere("exact", growth, 1.0, start=start),
    )


def _residual(x: jnp.ndarray, a: jnp.ndarray) -> jnp.ndarray:
    """Return ‖XXᵀ − A‖_F by the library."""
    return nys.problems.Symmetric(a).residual(x)


def residual_gap(f: Family, dtype: Dtype) -> float:
    """Return |‖X_tX_tᵀ − A‖_F − ‖B_t − Σ‖_F| in units of eps·(‖B_t‖_F + ‖Σ‖_F)."""
    residual = np.asarray(over_time(_residual, 0, None)(f.x, f.a))
    core, sigma = cores(f), diagonal(f.spectrum)[:, None]
    unit = frobenius(core) + frobenius(sigma)
    return float(np.max(np.abs(residual - frobenius(core - sigma)) / unit)) / eps(dtype)


@claim(
    "eq-10",
    "‖X_tX_tᵀ − A‖_F = ‖B_t − Σ‖_F with B_t = Φ_tΦ_tᵀ",
    hypotheses=f"exactly parametrized, Nyström start, hence X_t = QΦ_t (Lemma 2). {RUNS}",
    **LEAVES_RANGE,
)
def equation_10(start: Start = "nystrom") -> Measured:
    """(10)."""
    return worst(
        "difference of the two sides in units of eps·(‖B‖_F + ‖Σ‖_F)",
        everywhere("exact", residual_gap, 100.0, start=start),
        rounding=True,
    )


def phi_error(f: Family, dtype: Dtype) -> float:
    """Return the distance of Φ_{t+1} from (11), (15) or (27) of Φ_t, in units of rounding."""
    phi = f.phi
    true_rank, rank = phi.shape[-2:]
    step = nys.dynamics.phi_step if rank <= true_rank else nys.dynamics.phi_step_over
    new = over_time(step, 0, None, None)(phi[:, :-1], f.spectrum, jnp.asarray(f.eta, phi.dtype))
    least = singular_values(phi[:, :-1])[..., min(rank, true_rank) - 1]
    # The dual magnifies rounding in Φ, relative to ‖Φ‖, by cond(Φ).
    dual = np.asarray(f.spectrum)[:, :1] * frobenius(phi[:, :-1]) / least**2
    unit = frobenius(phi[:, 1:]) + dual
    return float(np.max(frobenius(phi[:, 1:] - new) / unit)) / eps(dtype)


@claim(
    "eq-11",
    "Φ_{t+1} = (1−η)Φ_t + ηΣΦ_t^{−T}: the m × r iteration is one of r × r matrices",
    hypotheses=f"exactly parametrized, Nyström start. {RUNS}",
    **LEAVES_RANGE,
)
def equation_11(start: Start = "nystrom") -> Measured:
    """(11)."""
    return worst(
        "‖Φ_{t+1} − right side‖_F in units of eps·(‖Φ_{t+1}‖_F + σ_1(A)‖Φ_t‖_F‖Φ_t^{−1}‖²)",
        everywhere("exact", phi_error, 100.0, start=start),
        rounding=True,
    )


def core_error(f: Family, dtype: Dtype) -> float:
    """Return the distance of B_{t+1} from `core_step`, in eps·cond(B_t)·(‖B_{t+1}‖ + ‖Σ‖)."""
    phi = np.asarray(f.phi, np.float64)  # float32 cannot hold B_t, whose condition is squared
    core = phi @ transposed(phi)
    sigma = np.asarray(f.spectrum, np.float64)
    new = over_time(nys.dynamics.core_step, 0, None, None)(core[:, :-1], sigma, f.eta)
    values = singular_values(phi[:, :-1])[..., : phi.shape[2]]
    condition = (values[..., 0] / values[..., -1]) ** 2
    unit = condition * (frobenius(core[:, 1:]) + frobenius(diagonal(f.spectrum))[:, None])
    return float(np.max(frobenius(core[:, 1:] - new) / unit)) / eps(dtype)


@claim(
    "eq-12",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)Σ + η²ΣB_t^{−1}Σ",
    hypotheses=f"exactly parametrized, Nyström start. {RUNS}",
    **LEAVES_RANGE,
)
def equation_12(start: Start = "nystrom") -> Measured:
    """(12)."""
    return worst(
        "‖B_{t+1} − right side‖_F in units of eps·cond(B_t)·(‖B_{t+1}‖_F + ‖Σ‖_F)",
        everywhere("exact", core_error, 100.0, start=start),
        rounding=True,
    )


@claim(
    "lem-1",
    "σ_r(X_0) ≥ ξτ(√r_A − √(r−1))σ_{r_A}(A) with probability ≥ 1 − (C₁τ)^{r_A−r+1} − e^{−C₂r_A}",
    hypotheses="r ≤ r_A, Ω Gaussian; 4,000 starts each of (r_A, r) = (20, 20), (20, 5) for κ = "
    "1, 100, m = 60; C₁ and C₂ fitted on Gaussian matrices of at most 8 rows (lem-19)",
    removes="Gaussian Ω",
    instead="Ω whose columns are all nearly parallel to the first (correlation 1 − 5e-7)",
    correlated=True,
)
def lemma_1(correlated: bool = False) -> Measured:
    """Lemma 1."""
    return tails.start_tails(((20, 20), (20, 5)), correlated)
