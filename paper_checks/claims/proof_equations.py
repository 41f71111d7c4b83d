"""Equations inside the proofs that no other section measures: (9), (13), (17), (24), (25)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import nyscaled as nys
from paper_checks.claims.symmetric_under import weak_grams
from paper_checks.framework import Limit, Measured, claim, common, worst
from paper_checks.framework.common import Dtype, eps, frobenius, over_time, singular_values
from paper_checks.framework.families import (
    ETAS,
    EVERYWHERE,
    SMALL_START,
    Family,
    Start,
    everywhere,
    families,
)


@claim(
    "eq-9",
    "X_0 = (QΣ)(QᵀΩ), and the entries of QᵀΩ are independent N(0, ξ²)",
    hypotheses="Nyström start; m = 60, r = 5, r_A = 5, κ = 2, 1e2, 1e4, 1e6, 60 starts each, ξ = "
    ".1, 1, 10; Ω is the start of A = I. Kolmogorov and Smirnov's test on the 6,000 entries of "
    "QᵀΩ/ξ at level 1e-3",
    removes="the start (3)",
    instead="AΩ + N with ξ_n = 1e-2",
    noise=1e-2,
)
def equation_9(noise: float = 0.0) -> Measured:
    """(9)."""
    spectra = np.repeat(
        [common.spectrum("geometric", 5, k) for k in common.KAPPAS["float64"]], 60, axis=0
    )
    count = len(spectra)
    scale = np.array(common.SCALES)[np.arange(count) % 3]
    a, basis = common.psd_batch(common.keys(count, 51), common.M, spectra)
    keys = common.keys(count, 52)
    x0 = common.start_batch(keys, a, 5, scale, noise)
    identity = jnp.broadcast_to(jnp.eye(common.M), a.shape)
    sketch = common.start_batch(keys, identity, 5, scale, 0.0)
    core = np.swapaxes(basis, 1, 2) @ np.asarray(sketch)
    gap = frobenius(x0 - np.asarray(basis) @ (spectra[:, :, None] * core)) / frobenius(sketch)
    test = stats.kstest((core / scale[:, None, None]).ravel(), "norm")
    return Measured(
        float(np.max(gap)) / eps("float64"),
        100.0,
        detail="‖X_0 − (QΣ)(QᵀΩ)‖_F in units of eps·‖Ω‖_F, largest",
        facts={"p-value of the test": Limit(float(test.pvalue), 1e-3, "≥")},
        rounding=True,
    )


def step_growth(f: Family, dtype: Dtype) -> float:
    """Return the bound (13) over (1 + 10 eps cond(X))σ_r(B_{t+1}), largest over runs and steps."""
    rank = f.spectrum.shape[1]
    singular = singular_values(np.asarray(f.x, np.float64))
    values = singular[..., rank - 1] ** 2
    noise = 1 + 10 * eps(dtype) * np.max(singular[..., 0] / singular[..., rank - 1], axis=1)
    smallest = np.asarray(f.spectrum, np.float64)[:, -1:]
    eta = f.eta[:, None]
    bound = 2 * eta * (1 - eta) * smallest + (1 - eta) ** 2 * values[:, :-1]
    return float(np.max(bound / values[:, 1:] / noise[:, None]))


@claim(
    "eq-13",
    "σ_r(B_{t+1}) ≥ 2η(1−η)σ_r(Σ) + (1−η)²σ_r(B_t)",
    hypotheses=f"exactly parametrized, Nyström start, 0 < η ≤ 1. {EVERYWHERE['exact']}",
    **SMALL_START,
)
def equation_13(start: Start = "nystrom") -> Measured:
    """(13)."""
    return worst(
        (
            "bound over (1 + 10 eps cond(X))σ_r(B_{t+1}), largest over runs and steps; large "
            "starts attain it"
        ),
        everywhere("exact", step_growth, 1.0, start=start),
    )


@claim(
    "eq-17",
    "‖B_{t+1} − I‖_F ≤ (1−η)‖B_t − I‖_F + η²√r + η²‖ΘᵀΣΘ‖_F: the first lines of (17), before "
    "Lemma 10 is used (for its last line see thm-2i)",
    hypotheses=f"under-parametrized, Nyström start, 0 < η ≤ 1. {EVERYWHERE['under']}; float64",
    removes="η ≤ 1",
    instead="η = 1.5",
    etas=(1.5,),
)
def equation_17(etas: tuple[float, ...] = ETAS) -> Measured:
    """Measure the lines of (17) that need no Lemma 10."""
    excess = []
    for f in families("under", etas=etas):
        gram, rank = weak_grams(f), f.x.shape[-1]
        whole = over_time(nys.dynamics.weak_gram_step, 0, 0, None, None)
        # at η = 1 the right side of (16) is ΘᵀΣΘ
        theta = whole(gram[:, :-1], f.phi[:, :-1], f.spectrum, np.ones_like(f.eta))
        errors, eta = frobenius(gram - np.eye(rank)), f.eta[:, None]
        bound = (1 - eta) * errors[:, :-1] + eta**2 * (rank**0.5 + frobenius(theta))
        excess.append(np.max((errors[:, 1:] - bound) / (errors[:, 1:] + np.abs(bound))))
    return Measured(
        max(common.largest(excess), 0.0),
        1e-8,
        detail="left side minus right side, over their sum; largest over runs and steps",
        rounding=True,
    )


@functools.cache
def _terms(invariant: bool, definite: bool) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Return (r, ‖ΘᵀΣΘ‖_F, Tr ΘᵀΣΘ, σ_r(B)) of 300 random Φ each, r = 1, 2, 5 of r_A = 8."""
    rng = np.random.default_rng((common.SEED, 53, invariant))
    result = []
    for rank in (1, 2, 5):
        spectra = [
            common.spectrum(("geometric", "last")[i % 2], 8, (2.0, 1e2, 1e4)[i % 3])
            for i in range(300)
        ]
        phi = rng.standard_normal((300, 8, rank))
        if invariant:
            phi *= np.array([np.isin(np.arange(8), rng.permutation(8)[:rank]) for _ in phi])[
                ..., None
            ]
        spectra = np.array(spectra)
        signed = spectra * (1 if definite else np.where(np.arange(8) < 4, 1, -1))
        theta = np.asarray(_duals(phi))
        form = np.swapaxes(theta, 1, 2) @ (signed[:, :, None] * theta)
        least = singular_values(phi / np.sqrt(spectra)[:, :, None])[:, -1] ** 2
        result.append((rank, frobenius(form), np.trace(form, axis1=1, axis2=2), least))
    return result


_duals = jax.jit(jax.vmap(nys.linalg.dual))
_DRAWS = "r = 1, 2, 5 of r_A = 8, κ = 2, 1e2, 1e4, two kinds of spectrum, 900 random Φ"


@claim(
    "eq-24",
    "‖ΘᵀΣΘ‖_F ≤ ‖Σ^{1/2}Θ‖_F² = Tr(ΘᵀΣΘ)",
    hypotheses=f"A ⪰ 0; {_DRAWS}",
    removes="A ⪰ 0",
    instead="half of the eigenvalues negative",
    definite=False,
)
def equation_24(definite: bool = True) -> Measured:
    """(24)."""
    gaps = [np.max((norm - trace) / norm) for _, norm, trace, _ in _terms(False, definite)]
    return Measured(
        max(max(gaps), 0.0),
        1e-12,
        detail="(‖ΘᵀΣΘ‖_F − Tr ΘᵀΣΘ)/‖ΘᵀΣΘ‖_F, largest",
        rounding=True,
    )


@claim(
    "eq-25",
    "√r = ‖FᵀE‖_F ≥ √σ_r(B) ‖E‖_F, E = Σ^{1/2}Θ, F = Σ^{−1/2}Φ",
    hypotheses="range(Φ) invariant under Σ, so that E and F share their column space, as the "
    f"proof says they always do; {_DRAWS}",
    removes="an invariant range(Φ)",
    instead="Gaussian Φ",
    invariant=False,
)
def equation_25(invariant: bool = True) -> Measured:
    """Measure (25), the step of Lemma 10's proof that fails."""
    facts, ratios = {}, []
    for rank, _, trace, least in _terms(invariant, True):
        ratio = np.sqrt(least * trace / rank)
        ratios.append(np.max(ratio))
        facts[f"violations at r = {rank}, of 300"] = int(np.sum(ratio > 1 + 1e-6))
    return Measured(float(max(ratios)), 1 + 1e-6, detail="√(σ_r(B)/r)‖E‖_F, largest", facts=facts)
