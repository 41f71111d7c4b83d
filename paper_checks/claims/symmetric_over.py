"""Appendix B.4: the symmetric problem with r > r_A."""

from __future__ import annotations

import numpy as np

import nyscaled as nys
from paper_checks.claims import tails
from paper_checks.claims.lemma_8 import STEP, quadratic_step
from paper_checks.claims.symmetric_exact import alignment, core_error, phi_error
from paper_checks.claims.two_phases import PHASE_ONE, PHASE_TWO, phase_one, phase_two
from paper_checks.framework import Measured, claim, common, worst
from paper_checks.framework.common import frobenius, over_time
from paper_checks.framework.families import (
    DAMPED,
    EVERYWHERE,
    LEAVES_RANGE,
    Start,
    at_eta,
    everywhere,
    families,
)

RUNS = EVERYWHERE["over"]


@claim(
    "lem-11",
    "σ_{r_A}(X_0) ≥ ξτ(√r − √(r_A−1))σ_{r_A}(A) with probability ≥ 1 − (C₁τ)^{r−r_A+1} − "
    "e^{−C₂r}; rank(X_0) = r_A",
    hypotheses="r > r_A, Ω Gaussian; 4,000 starts each of (r_A, r) = (18, 20), (5, 20) for κ = "
    "1, 100, m = 60; C₁ and C₂ fitted on Gaussian matrices of at most 8 rows (lem-19)",
    removes="Gaussian Ω",
    instead="Ω whose columns are all nearly parallel to the first (correlation 1 − 5e-7)",
    correlated=True,
)
def lemma_11(correlated: bool = False) -> Measured:
    """Lemma 11."""
    return tails.start_tails(((18, 20), (5, 20)), correlated)


@claim(
    "lem-12",
    "X_t = QΦ_t for all t under (26)",
    hypotheses=f"over-parametrized, Nyström start. {RUNS}",
    **LEAVES_RANGE,
)
def lemma_12(start: Start = "nystrom") -> Measured:
    """Measure the first part of Lemma 12."""
    return worst(
        "‖(I − QQᵀ)X_t‖_F in units of rounding, largest over runs and steps",
        everywhere("over", alignment, 100.0, start=start),
        rounding=True,
    )


@claim(
    "eq-27",
    "Φ_{t+1} = (1−η)Φ_t + ηΣ(Φ_t†)ᵀ under (26)",
    hypotheses=f"over-parametrized, Nyström start. {RUNS}",
    **DAMPED,
)
def equation_27(damping: float = 0.0) -> Measured:
    """Measure (27), the second part of Lemma 12."""
    return worst(
        "‖Φ_{t+1} − right side‖_F in units of eps·(‖Φ_{t+1}‖_F + σ_1(A)‖Φ_t‖_F‖Φ_t†‖²)",
        everywhere("over", phi_error, 100.0, damping=damping),
        rounding=True,
    )


@claim(
    "eq-28",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)Σ + η²ΣB_t^{−1}Σ, B = ΦΦᵀ: the recursion (12) again",
    hypotheses=f"over-parametrized, Nyström start, rank(B_0) = r_A. {RUNS}",
    **DAMPED,
)
def equation_28(damping: float = 0.0) -> Measured:
    """(28)."""
    return worst(
        "‖B_{t+1} − right side‖_F in units of eps·cond(B_t)·(‖B_{t+1}‖_F + ‖Σ‖_F)",
        everywhere("over", core_error, 100.0, damping=damping),
        rounding=True,
    )


@claim(
    "thm-5-phase1",
    "(26), η = O(1/(κ³‖A‖_F)): ‖X_tX_tᵀ − A‖_F ≤ O(1/κ²) after O(κ³√r log κ) steps",
    hypotheses=f"over-parametrized, Nyström start with σ_r(B_0) ≥ σ_r(Σ)/3. {PHASE_ONE['over']}",
    removes="a step size below 1",
    instead="η = 1, at which every d moves to 1/d and back",
    step_size=1.0,
)
def theorem_5_phase_1(step_size: float | None = None) -> Measured:
    """Theorem 5, first phase."""
    return phase_one("over", step_size)


@claim(
    "thm-5-phase2",
    "(26), η = 1/2 once ‖X_tX_tᵀ − A‖_F ≤ 2/(3κ²): s steps later it is ≤ (4/(3κ²)) 2^{−2^s}",
    hypotheses=f"over-parametrized, Nyström start, no damping. {PHASE_TWO['over']}",
    removes="η = 1/2",
    instead="η = 0.3 in phase 2",
    eta=0.3,
)
def theorem_5_phase_2(eta: float = 0.5) -> Measured:
    """Theorem 5, second phase."""
    return phase_two("over", eta)


@claim(
    "thm-5-step",
    "‖B_{t+1} − Σ‖_F ≤ (3κ²/(4σ_1))‖B_t − Σ‖_F² in phase 2, as in Lemma 8",
    hypotheses=f"over-parametrized, η = 1/2, Nyström start. {STEP}",
    removes="η = 1/2",
    instead="η = 0.3",
    eta=0.3,
)
def theorem_5_step(eta: float = 0.5) -> Measured:
    """Measure Lemma 8's step under (26)."""
    return quadratic_step("over", eta)


@claim(
    "thm-5-undamped",
    "(26) at η = 1/2 is at the rounding level after 48 steps: it needs no damping",
    hypotheses=f"over-parametrized, Nyström start, the runs with η = 1/2. {RUNS}",
    **DAMPED,
)
def theorem_5_undamped(damping: float = 0.0) -> Measured:
    """Measure Appendix B.4: damping is not needed, and it moves the limit."""
    residual = over_time(nys.optimality.residual_in_basis, 0, None, None)
    errors = []
    for whole in families("over", damping=damping):
        f = at_eta(whole, 0.5)
        last = np.asarray(residual(f.x[:, -1:], f.basis, f.spectrum))[:, 0]
        errors.append(np.max(last / frobenius(f.a)))
    return Measured(
        common.largest(errors), 1e-13, detail="‖X_48X_48ᵀ − A‖_F/‖A‖_F, largest", rounding=True
    )
