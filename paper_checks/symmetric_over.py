"""Appendix B.4: the symmetric problem with r > r_A."""

from __future__ import annotations

import numpy as np

import nyscaled as nys
from paper_checks import common, montecarlo
from paper_checks.claim import Measured, claim, worst
from paper_checks.common import DTYPES, Start, family, over_time
from paper_checks.symmetric_exact import (
    PHASE_ONE,
    PHASE_TWO,
    alignment,
    core_error,
    phase_one,
    phase_two,
    phi_error,
    quadratic_step,
)

EVERYWHERE = "m = 60, r = 8, r_A = 5; κ = 2 … 1e6 (float32: 2 … 1e3), two kinds of spectrum, η = .1, .3, .5, .9, ξ = .1, 1, 10; 32 runs of 48 steps each in float64 and in float32"


@claim(
    "lem-11",
    "σ_{r_A}(X_0) ≥ ξτ(√r − √(r_A−1))σ_{r_A}(A) with probability ≥ 1 − (C₁τ)^{r−r_A+1} − e^{−C₂r}; rank(X_0) = r_A",
    hypotheses="r > r_A, Ω Gaussian; 4,000 starts each of (r_A, r) = (5, 8), (3, 8) for κ = 1, 100, "
    "m = 60; C₁ and C₂ fitted on Gaussian matrices, never on these starts",
    removes="Gaussian Ω",
    instead="Ω with nearly parallel columns (correlation 1 − 5e-7)",
    correlated=True,
)
def lemma_11(correlated: bool = False) -> Measured:
    """Lemma 11."""
    return montecarlo.start_tails(((5, 8), (3, 8)), correlated)


@claim(
    "lem-12",
    "X_t = QΦ_t for all t under (26)",
    hypotheses=f"over-parametrized, Nyström start. {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def lemma_12(start: Start = "nystrom") -> Measured:
    """Lemma 12, its first part."""
    return worst(
        "‖(I − QQᵀ)X_t‖_F in units of rounding, largest over runs and steps",
        **{dtype: (alignment(family("over", dtype, start), dtype), 30.0) for dtype in DTYPES},
    )


@claim(
    "eq-27",
    "Φ_{t+1} = (1−η)Φ_t + ηΣ(Φ_t†)ᵀ under (26)",
    hypotheses=f"over-parametrized, Nyström start. {EVERYWHERE}",
    removes="the pseudo-inverse",
    instead="damping λ = 1e-2",
    damping=1e-2,
)
def equation_27(damping: float = 0.0) -> Measured:
    """(27), the second part of Lemma 12."""
    parts = {}
    for dtype in DTYPES:
        f = family("over", dtype, damping=damping)
        parts[dtype] = (phi_error(f, nys.dynamics.phi_step_over, dtype), 100.0)
    return worst("‖Φ_{t+1} − right side‖_F in units of eps·(‖Φ_{t+1}‖ + ‖Φ_t†‖)", **parts)


@claim(
    "eq-28",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)Σ + η²ΣB_t^{−1}Σ, B = ΦΦᵀ: the recursion (12) again",
    hypotheses=f"over-parametrized, Nyström start, rank(B_0) = r_A. {EVERYWHERE}",
    removes="the pseudo-inverse",
    instead="damping λ = 1e-2",
    damping=1e-2,
)
def equation_28(damping: float = 0.0) -> Measured:
    """(28)."""
    parts = {}
    for dtype in DTYPES:
        parts[dtype] = (core_error(family("over", dtype, damping=damping), dtype), 20.0)
    return worst("‖B_{t+1} − right side‖_F in units of eps·cond(B_t)·(‖B_{t+1}‖ + 1)", **parts)


@claim(
    "thm-5-phase1",
    "(26), η = O(1/(κ³‖A‖_F)): ‖X_tX_tᵀ − A‖_F ≤ O(1/κ²) after O(κ³√r log κ) steps",
    hypotheses=f"over-parametrized (r = 8, r_A = 5), Nyström start. {PHASE_ONE}",
    removes="the step size",
    instead="η = 1, where d → 1/d turns in a circle of two",
    step_size=1.0,
)
def theorem_5_phase_1(step_size: float | None = None) -> Measured:
    """Theorem 5, first phase."""
    return phase_one("over", step_size)


@claim(
    "thm-5-phase2",
    "(26), η = 1/2 after phase 1: ‖X_tX_tᵀ − A‖_F ≤ (4/(3κ²)) 2^{−2^t}, with no damping",
    hypotheses=f"over-parametrized (r = 8, r_A = 5), Nyström start. {PHASE_TWO}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2 before it is scaled",
    start="perturbed",
)
def theorem_5_phase_2(start: Start = "nystrom") -> Measured:
    """Theorem 5, second phase."""
    return phase_two("over", start)


@claim(
    "thm-5-step",
    "‖B_{t+1} − Σ‖_F ≤ (3κ²/4)‖B_t − Σ‖_F² in phase 2, as in Lemma 8",
    hypotheses="over-parametrized (r = 8, r_A = 5), η = 1/2, Nyström start; κ = 2, 100",
    removes="η = 1/2",
    instead="η = 0.3",
    eta=0.3,
)
def theorem_5_step(eta: float = 0.5) -> Measured:
    """Lemma 8's step under (26)."""
    return quadratic_step("over", eta)


@claim(
    "thm-5-undamped",
    "(26) at η = 1/2 ends at the rounding level, which a damped preconditioner does not reach in 48 steps at a quadratic rate",
    hypotheses="over-parametrized (r = 8, r_A = 5), Nyström start; κ = 2 … 1e6, two kinds of spectrum",
    removes="zero damping",
    instead="λ = 1e-2",
    damping=1e-2,
)
def theorem_5_undamped(damping: float = 0.0) -> Measured:
    """Appendix B.4: no damping is needed, and damping costs the quadratic rate."""
    f = common.at_eta(family("over", damping=damping), 0.5)
    residual = over_time(nys.optimality.residual_in_basis, 0, None, None)
    errors = np.asarray(residual(f.x, f.basis, f.spectrum))
    return Measured(float(np.max(errors[:, -1])), 1e-13, detail="‖X_48X_48ᵀ − A‖_F, largest")
