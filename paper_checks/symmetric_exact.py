"""Section 2.3 and Appendix B.1, B.2: the symmetric problem with r = r_A."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks import common, montecarlo
from paper_checks.claim import Measured, claim, worst
from paper_checks.common import (
    DTYPES,
    Dtype,
    Regime,
    Start,
    eps,
    family,
    frobenius,
    over_time,
    singular_values,
)

EVERYWHERE = "m = 60, r = r_A = 5; κ = 2 … 1e6 (float32: 2 … 1e3), two kinds of spectrum, η = .1, .3, .5, .9, ξ = .1, 1, 10; 32 runs of 48 steps each in float64 and in float32"

PHASE_KAPPAS = (2.0, 3.0, 5.0)
PHASE_STEPS = 3_000  # of phase 1, whose count grows like κ³


def cores(f: common.Family) -> np.ndarray:
    """B_t = Φ_tΦ_tᵀ, (10)."""
    phi = np.asarray(f.phi)
    return phi @ np.swapaxes(phi, -1, -2)


def diagonal(spectrum: object) -> np.ndarray:
    """Σ of a batch of spectra."""
    s = np.asarray(spectrum)
    return s[:, :, None] * np.eye(s.shape[1])


def alignment(f: common.Family, dtype: Dtype) -> float:
    """‖(I − QQᵀ)X_t‖_F in units of rounding, largest over the runs.

    A itself leaves its range by eps, and the dual of X_{t-1} magnifies that, so the unit is
    eps·(‖X_t‖_F + ‖dual(X_{t-1})‖_F + …), summed over the past with the weights (1−η)^s of (2).
    """
    rest = np.asarray(over_time(nys.optimality.residual_space, 0, None)(f.x, f.basis))
    values = singular_values(f.x)
    size = np.linalg.norm(values, axis=-1)
    positive = np.maximum(values[..., : f.spectrum.shape[1]], np.finfo(dtype).tiny)
    dual = np.linalg.norm(1 / positive, axis=-1)
    unit = size[:, 0]
    ratio = rest[:, 0] / unit
    for t in range(1, rest.shape[1]):
        unit = np.maximum(size[:, t], (1 - f.eta) * unit + f.eta * dual[:, t - 1])
        ratio = np.maximum(ratio, rest[:, t] / unit)
    return float(np.max(ratio)) / eps(dtype)


@claim(
    "lem-2i",
    "X_t = QΦ_t for all t: (I − QQᵀ)X_t = 0",
    hypotheses=f"exactly parametrized, Nyström start, ScaledGD (2). {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def lemma_2i(start: Start = "nystrom") -> Measured:
    """Lemma 2 (i)."""
    return worst(
        "‖(I − QQᵀ)X_t‖_F in units of rounding, largest over runs and steps",
        float64=(alignment(family("exact", "float64", start), "float64"), 30.0),
        float32=(alignment(family("exact", "float32", start), "float32"), 30.0),
    )


@claim(
    "lem-2ii",
    "σ_r(X_{t+1}X_{t+1}ᵀ) ≥ (1−η)^{2t+2} σ_r(X_0X_0ᵀ) + (1−η)σ_r(A) − (1−η)^{2t+3} σ_r(A)",
    hypotheses=f"exactly parametrized, Nyström start, 0 < η ≤ 1. {EVERYWHERE}",
    removes="the Nyström start",
    instead="a small start (ζ = 1e-3), which is not in range(A)",
    start="small",
)
def lemma_2ii(start: Start = "nystrom") -> Measured:
    """Lemma 2 (ii)."""
    ratios = {}
    for dtype in DTYPES:
        f = family("exact", dtype, start)
        squares = singular_values(f.x)[..., -1] ** 2
        smallest = np.asarray(f.spectrum)[:, -1:]
        eta = f.eta[:, None]
        t = np.arange(squares.shape[1] - 1)
        bound = (1 - eta) ** (2 * t + 2) * squares[:, :1]
        bound = bound + (1 - eta) * smallest * (1 - (1 - eta) ** (2 * t + 2))
        ratios[dtype] = (np.max(bound / squares[:, 1:]), 1.0)
    return worst("bound over σ_r(X_{t+1})², largest over runs and steps", **ratios)


@claim(
    "eq-10",
    "‖X_tX_tᵀ − A‖_F = ‖B_t − Σ‖_F with B_t = Φ_tΦ_tᵀ",
    hypotheses=f"X_t = QΦ_t (Lemma 2). {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def equation_10(start: Start = "nystrom") -> Measured:
    """(10)."""
    parts = {}
    for dtype in DTYPES:
        f = family("exact", dtype, start)
        residual = over_time(lambda x, a: nys.problems.Symmetric(a).residual(x), 0, None)
        left = np.asarray(residual(f.x, f.a))
        core = cores(f)
        right = frobenius(core - diagonal(f.spectrum)[:, None])
        unit = frobenius(core) + frobenius(diagonal(f.spectrum))[:, None]
        parts[dtype] = (np.max(np.abs(left - right) / unit) / eps(dtype), 100.0)
    return worst("difference of the two sides in units of eps·(‖B‖_F + ‖Σ‖_F)", **parts)


@claim(
    "eq-11",
    "Φ_{t+1} = (1−η)Φ_t + ηΣΦ_t^{−T}: the m × r iteration is one of r × r matrices",
    hypotheses=f"exactly parametrized, Nyström start. {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def equation_11(start: Start = "nystrom") -> Measured:
    """(11)."""
    parts = {}
    for dtype in DTYPES:
        f = family("exact", dtype, start)
        parts[dtype] = (phi_error(f, nys.dynamics.phi_step, dtype), 100.0)
    return worst("‖Φ_{t+1} − right side‖_F in units of eps·(‖Φ_{t+1}‖ + ‖Φ_t^{−1}‖)", **parts)


def phi_error(f: common.Family, step: object, dtype: str) -> float:
    """How far Φ_{t+1} is from `step` of Φ_t, in units of rounding."""
    phi = f.phi
    eta = jnp.asarray(f.eta, phi.dtype)
    new = over_time(step, 0, None, None)(phi[:, :-1], f.spectrum, eta)
    rank = min(phi.shape[-2:])
    magnified = 1 / singular_values(phi[:, :-1])[..., rank - 1]
    unit = frobenius(phi[:, 1:]) + magnified
    return float(np.max(frobenius(phi[:, 1:] - new) / unit)) / eps(dtype)


def core_error(f: common.Family, dtype: str) -> float:
    """How far B_{t+1} is from `core_step` of B_t, in units of eps·cond(B_t)·(‖B‖ + ‖Σ‖)."""
    core = jnp.einsum("btkr,btlr->btkl", f.phi, f.phi)
    eta = jnp.asarray(f.eta, core.dtype)
    new = over_time(nys.dynamics.core_step, 0, None, None)(core[:, :-1], f.spectrum, eta)
    values = singular_values(core[:, :-1])
    condition = values[..., 0] / np.maximum(values[..., -1], np.finfo(dtype).tiny)
    unit = condition * (frobenius(core[:, 1:]) + 1)
    return float(np.max(frobenius(core[:, 1:] - new) / unit)) / eps(dtype)


@claim(
    "eq-12",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)Σ + η²ΣB_t^{−1}Σ",
    hypotheses=f"exactly parametrized, Nyström start. {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def equation_12(start: Start = "nystrom") -> Measured:
    """(12)."""
    parts = {}
    for dtype in DTYPES:
        f = family("exact", dtype, start)
        parts[dtype] = (core_error(f, dtype), 20.0)
    return worst("‖B_{t+1} − right side‖_F in units of eps·cond(B_t)·(‖B_{t+1}‖ + 1)", **parts)


@claim(
    "lem-1",
    "σ_r(X_0) ≥ ξτ(√r_A − √(r−1))σ_{r_A}(A) with probability ≥ 1 − (C₁τ)^{r_A−r+1} − e^{−C₂r_A}",
    hypotheses="r ≤ r_A, Ω Gaussian; 4,000 starts each of (r_A, r) = (5, 5), (8, 5) for κ = 1, 100, "
    "m = 60; C₁ and C₂ fitted on Gaussian matrices, never on these starts",
    removes="Gaussian Ω",
    instead="Ω with nearly parallel columns (correlation 1 − 5e-7)",
    correlated=True,
)
def lemma_1(correlated: bool = False) -> Measured:
    """Lemma 1."""
    return montecarlo.start_tails(((5, 5), (8, 5)), correlated)


def large_starts(regime: Regime, start: Start, kappas: tuple[float, ...]) -> tuple:
    """Problems whose start is so large that σ_{r_A}(B_0) = σ_{r_A}(Σ)/3, as Lemma 7 assumes."""
    rank, true_rank = common.RANKS[regime]
    cells = [(k, kind) for k in kappas for kind in ("geometric", "last")]
    spectra = np.array([common.spectrum(kind, true_rank, kappa) for kappa, kind in cells])
    a, basis = common.psd_batch(common.keys(len(cells), 20), common.M, spectra)
    noise = 1e-2 if start == "perturbed" else 0.0
    x0 = common.start_batch(common.keys(len(cells), 21), a, rank, np.ones(len(cells)), noise)
    phi = jnp.einsum("bmk,bmr->bkr", basis, x0)
    least = singular_values(phi)[:, true_rank - 1]
    x0 = x0 * (np.sqrt(spectra[:, -1] / 3) / least)[:, None, None]
    return a, basis, spectra, x0, np.array([k for k, _ in cells])


def phase_one(regime: Regime, step_size: float | None = None, small: float = 1.0) -> Measured:
    """Lemma 7 and the first phase of Theorems 1 and 5: η = 1/(κ³‖A‖_F), or `step_size`."""
    a, basis, spectra, x0, kappa = large_starts(regime, "nystrom", PHASE_KAPPAS)
    x0 = x0 * small
    norm = np.linalg.norm(spectra, axis=1)
    paper_eta = 1 / (kappa**3 * norm)
    eta = paper_eta if step_size is None else np.full_like(kappa, step_size)
    phi = jnp.einsum("bmk,bmr->bkr", basis, x0)
    core = np.asarray(phi @ jnp.swapaxes(phi, 1, 2))
    first = frobenius(core - diagonal(spectra))
    counts = np.ceil(np.log(kappa**2 * first) / paper_eta).astype(int)
    curves, _ = common.residual_curves(a, basis, spectra, x0, eta, 0.0, PHASE_STEPS)
    curves = np.asarray(curves)
    if np.max(counts) > PHASE_STEPS:
        raise ValueError(f"phase 1 wants {np.max(counts)} steps; {PHASE_STEPS} were made")
    final = curves[np.arange(len(counts)), counts]
    t = np.arange(curves.shape[1])
    decay = (1 - paper_eta)[:, None] ** t * first[:, None]
    envelope = (paper_eta * norm * (1 + 3 * kappa))[:, None] + decay
    rate = kappa**3 * np.sqrt(spectra.shape[1]) * np.log(kappa)
    part = worst(
        "κ² × error after T₁ = ⌈log(κ²‖B_0 − Σ‖_F)/η⌉ steps, and the whole curve over its envelope",
        scaled_error=(np.max(final * kappa**2), 5.0),
        error_over_its_envelope=(np.max(curves / envelope), 1.0 + 1e-9),
    )
    facts = {"T₁ at κ = 5": float(np.max(counts)), "T₁/(κ³√r log κ)": float(np.max(counts / rate))}
    return dataclasses.replace(part, facts=facts)


PHASE_ONE = "κ = 2, 3, 5, two kinds of spectrum, η = 1/(κ³‖A‖_F), m = 60"


@claim(
    "lem-7",
    "‖B_t − Σ‖_F ≤ η‖A‖_F(1 + 3κ) + (1−η)^t‖B_0 − Σ‖_F, hence O(1/κ²) for η = O(1/(κ³‖A‖_F))",
    hypotheses=f"σ_r(B_0) ≥ σ_r(Σ)/3, η ≤ 2/3. {PHASE_ONE}",
    removes="σ_r(B_0) ≥ σ_r(Σ)/3",
    instead="the same start scaled by 1e-4",
    small=1e-4,
)
def lemma_7(small: float = 1.0) -> Measured:
    """Lemma 7."""
    return phase_one("exact", small=small)


@claim(
    "thm-1-phase1",
    "η = O(1/(κ³‖A‖_F)): ‖X_tX_tᵀ − A‖_F ≤ O(1/κ²) after O(κ³√r log κ) steps",
    hypotheses=f"exactly parametrized, Nyström start with σ_r(B_0) ≥ σ_r(Σ)/3. {PHASE_ONE}",
    removes="the step size",
    instead="η = 1, where d → 1/d turns in a circle of two",
    step_size=1.0,
)
def theorem_1_phase_1(step_size: float | None = None) -> Measured:
    """Theorem 1, first phase."""
    return phase_one("exact", step_size)


def phase_two(regime: Regime, start: Start) -> Measured:
    """The second phase of Theorems 1 and 5, from where the first ends."""
    a, basis, spectra, x0, kappa = large_starts(regime, start, PHASE_KAPPAS)
    eta = 1 / (kappa**3 * np.linalg.norm(spectra, axis=1))
    _, x = common.residual_curves(a, basis, spectra, x0, eta, 0.0, PHASE_STEPS)
    curves, _ = common.residual_curves(a, basis, spectra, x, np.full_like(kappa, 0.5), 0.0, 12)
    curves = np.asarray(curves)
    alpha = 0.75 * kappa**2
    t = np.arange(curves.shape[1])
    bound = (1 / alpha)[:, None] * 2.0 ** -(2.0**t) + 1e-13
    steps = np.argmax(curves <= 1e-12, axis=1) if np.all(curves[:, -1] <= 1e-12) else len(t)
    allowed = np.ceil(np.log2(np.log2(4 / (3 * kappa**2 * 1e-12))))
    part = worst(
        "η = 1/2 from the end of phase 1",
        error_over_the_bound=(np.max(curves / bound), 1.0),
        steps_to_1e_12_over_the_count=(np.max(steps / allowed), 1.0),
    )
    return dataclasses.replace(part, facts={"steps to 1e-12": float(np.max(steps))})


PHASE_TWO = "phase 1 (3,000 steps) then η = 1/2, κ = 2, 3, 5, two kinds of spectrum, m = 60, ε = 1e-12; beyond double precision see lem-8-extended"


@claim(
    "thm-1-phase2",
    "η = 1/2 after phase 1: ‖X_tX_tᵀ − A‖_F ≤ (4/(3κ²)) 2^{−2^t}, so ε after O(log log 1/(κε)) steps",
    hypotheses=f"exactly parametrized, Nyström start. {PHASE_TWO}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2 before it is scaled",
    start="perturbed",
)
def theorem_1_phase_2(start: Start = "nystrom") -> Measured:
    """Theorem 1, second phase."""
    return phase_two("exact", start)


def quadratic_step(regime: Regime, eta: float) -> Measured:
    """The largest ‖B⁺ − Σ‖_F over (3κ²/4)‖B − Σ‖_F² where Lemma 8 applies."""
    f = common.at_eta(family(regime), eta)
    residual = over_time(nys.optimality.residual_in_basis, 0, None, None)
    errors = np.asarray(residual(f.x, f.basis, f.spectrum))
    least = singular_values(f.x)[..., f.spectrum.shape[1] - 1] ** 2
    smallest = np.asarray(f.spectrum)[:, -1:]
    alpha = 0.75 * f.kappa[:, None] ** 2
    applies = (least >= smallest / 3) & (errors <= 1 / (2 * alpha)) & (f.kappa[:, None] <= 100)
    applies = applies[:, :-1]
    bound = alpha * errors[:, :-1] ** 2 + 1e-14
    ratio = np.where(applies, errors[:, 1:] / bound, 0)
    visible = applies & (errors[:, :-1] > 1e-12)
    return Measured(
        float(np.max(ratio)),
        1.0,
        detail="largest ‖B⁺ − Σ‖_F / ((3κ²/4)‖B − Σ‖_F² + 1e-14)",
        facts={"steps above rounding": float(np.sum(visible))},
    )


@claim(
    "lem-8",
    "‖B_{t+1} − Σ‖_F ≤ (3κ²/4)‖B_t − Σ‖_F² once σ_r(B_t) ≥ σ_r(Σ)/3 and ‖B_t − Σ‖_F ≤ 2/(3κ²)",
    hypotheses="η = 1/2, exactly parametrized, Nyström start. m = 60, r = 5, κ = 2, 100, two kinds of "
    "spectrum (float64 cannot see this phase at larger κ: it begins at 2/(3κ²); see lem-8-extended)",
    removes="η = 1/2",
    instead="η = 0.3",
    eta=0.3,
)
def lemma_8(eta: float = 0.5) -> Measured:
    """Lemma 8."""
    return quadratic_step("exact", eta)
