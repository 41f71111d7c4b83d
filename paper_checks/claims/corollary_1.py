"""Corollary 1: the two phases of Theorem 1, for the asymmetric problem."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework import Measured, claim, common
from paper_checks.framework import pair_families as pairs
from paper_checks.framework.common import frobenius

SHAPES = (pairs.Shape(60, 40, 5, 5), pairs.Shape(60, 6, 6, 6))
KAPPAS = (2.0, 3.0, 4.0)
TAIL = 9  # iterates of phase 2
PROFILES = ("geometric", "last", "repeated")
CELLS = [(kappa, profile, seed) for kappa in KAPPAS for profile in PROFILES for seed in range(3)]
RUNS = (
    "60 × 40 with r = r_A = 5 and 60 × 6 with r = r_A = 6; σ_1(A) = 1; κ = 2, 3, 4; geometric, "
    "near-constant and "
    "repeated singular values; three seeds"
)


@functools.cache
def problems(shape: pairs.Shape, random: bool) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Return A, X_0, ‖A‖_F and κ of each cell; X_0 = AΩ, or random of the same norm.

    Args:
        shape: m, n, r and r_A.
        random: whether X_0 is random.
    """
    spectra = np.array([pairs.spectrum(profile, shape.rank, kappa) for kappa, profile, _ in CELLS])
    rng = np.random.default_rng((common.SEED, 52, shape.n))
    left, right = (
        np.linalg.qr(rng.standard_normal((len(CELLS), k, shape.rank)))[0]
        for k in (shape.m, shape.n)
    )
    a = (left * spectra[:, None]) @ np.swapaxes(right, 1, 2)
    x = a @ rng.standard_normal((len(CELLS), shape.n, shape.rank))
    if random:
        other = rng.standard_normal(x.shape)
        x = other * (frobenius(x) / frobenius(other))[:, None, None]
    norms = np.linalg.norm(spectra, axis=1)
    return jnp.asarray(a), jnp.asarray(x), norms, np.array([kappa for kappa, *_ in CELLS])


@functools.partial(jax.jit, static_argnums=5)
def _curves(a: Any, x: Any, first: Any, switch: Any, second: Any, steps: int) -> Any:
    """Return ‖X_tY_tᵀ − A‖_F with η = first for t < switch and η = second after, over a batch."""

    def one(a: Any, x: Any, first: Any, switch: Any, second: Any) -> Any:
        problem = nys.problems.Asymmetric(a)
        step = nys.solvers.scaled_step(problem, lambda t: jnp.where(t < switch, first, second))
        start = nys.Factors(x, jnp.zeros((a.shape[1], x.shape[1])))
        return nys.solvers.run(step, start, steps, problem.residual).history

    return jax.vmap(one)(a, x, first, switch, second)


def phase_one(
    shape: pairs.Shape, random: bool = False, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return curves of η = factor/(κ³‖A‖_F), and κ, η, T₁ = ⌈log(9κ²‖A‖_F)κ³‖A‖_F⌉ of each cell.

    Args:
        shape: m, n, r and r_A.
        random: whether X_0 is random.
        factor: of the step size.
    """
    a, x, norms, kappa = problems(shape, random)
    eta = 1 / (kappa**3 * norms)
    duration = np.ceil(np.log(9 * kappa**2 * norms) / eta).astype(int)
    steps = int(np.max(duration)) + TAIL
    never = np.full(len(kappa), steps)
    curves = np.asarray(_curves(a, x, factor * eta, never, eta, steps))
    return curves, kappa, eta, duration


def last(random: bool, factor: float) -> tuple[float, int]:
    """Return the largest κ²‖X_tY_tᵀ − A‖_F at t = T₁, and the largest T₁.

    Args:
        random: whether X_0 is random.
        factor: of the step size.
    """
    errors, durations = [], []
    for shape in SHAPES:
        curves, kappa, _, duration = phase_one(shape, random, factor)
        errors.append(np.max(kappa**2 * curves[np.arange(len(kappa)), duration]))
        durations.append(np.max(duration[kappa == 4]))
    return float(max(errors)), int(max(durations))


@claim(
    "cor-1-phase1",
    "η = O(1/(κ³‖A‖_F)): ‖X_tY_tᵀ − A‖_F ≤ O(1/κ²) after O(κ³√r log κ) steps",
    hypotheses=f"{RUNS}; Nyström start, any ξ; η = 1/(κ³‖A‖_F), T₁ = ⌈log(9κ²‖A‖_F)/η⌉ steps: the "
    "log 9 is for σ_r(B_1) = ησ_r(Σ), which no ξ can raise",
    removes="a number of steps of the order of 1/η",
    instead="a tenth of that step size, with the same number of steps",
    factor=0.1,
)
def phase_1(factor: float = 1.0) -> Measured:
    """Corollary 1, first phase."""
    error, duration = last(False, factor)
    return Measured(
        error,
        1.0,
        detail="κ²‖X_tY_tᵀ − A‖_F at t = T₁, largest",
        facts={
            "T₁ at κ = 4, largest": duration,
            "the same from a random X_0 with Y_0 = 0": last(True, factor)[0],
        },
    )


# Phase 2 begins where the bound of both claims is tight.
PHASE_2: dict[str, Any] = {
    "statement": (
        "η = 1/2 from where e ≤ 2/(3κ²) is first reached: ‖X_tY_tᵀ − A‖_F ≤ (4/(3κ²))2^{−2^t}, t "
        "steps later"
    ),
    "hypotheses": (
        f"{RUNS}; η = 1/(κ³‖A‖_F) before; 8 steps of phase 2; 1e-13 is added to the bound"
    ),
}


@claim(
    "cor-1-phase2-start",
    **PHASE_2,
    removes="the Nyström start",
    instead="a random X_0 of the same norm, also with Y_0 = 0",
    random=True,
)
@claim(
    "cor-1-phase2",
    **PHASE_2,
    removes="η = 1/2 in phase 2",
    instead="η = 0.3 from the same step on",
    eta=0.3,
)
def phase_2(eta: float = 0.5, random: bool = False) -> Measured:
    """Corollary 1, second phase."""
    ratios = []
    for shape in SHAPES:
        curves, kappa, first, _ = phase_one(shape, random)
        switch = np.argmax(curves <= (2 / (3 * kappa**2))[:, None], axis=1)
        a, x, *_ = problems(shape, random)
        second = np.full(len(kappa), eta)
        curves = np.asarray(_curves(a, x, first, switch, second, curves.shape[1] - 1))
        t = np.arange(TAIL)
        bound = (4 / (3 * kappa**2))[:, None] * 2.0 ** -(2.0**t) + 1e-13
        ratios.append(curves[np.arange(len(kappa))[:, None], switch[:, None] + t] / bound)
    worst = np.max(np.concatenate(ratios), axis=0)
    facts = {"where phase 2 begins": float(worst[0]), "one step later": float(worst[1])}
    detail = "error over (bound + 1e-13), largest over runs and steps"
    return Measured(float(np.max(worst)), 1.0, detail=detail, facts=facts)
