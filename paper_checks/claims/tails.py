"""Tails of the smallest singular value: fitted constants and exact intervals (Lemmas 1, 11, 19)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import nyscaled as nys
from paper_checks.framework import Measured, common

TAUS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
FITTED = (
    *((3, 1), (3, 2), (3, 3), (5, 1), (5, 3), (5, 5)),
    *((8, 1), (8, 2), (8, 4), (8, 6), (8, 7), (8, 8)),
)
"""Shapes (d, r) on which C₁ and C₂ are fitted."""
HELD_OUT = ((20, 1), (20, 10), (20, 18), (20, 20), (40, 10), (40, 38), (40, 40))
"""Shapes on which C₁ and C₂ are tested."""
DRAWS = 10_000
STARTS = 4_000
LEVEL = 1e-3  # of all intervals of a claim together

Samples = Mapping[tuple[int, int], np.ndarray]
"""(d, r) → σ_r(W)/(√d − √(r−1)) of independent d × r matrices W."""


def unit(d: int, r: int) -> float:
    """Return √d − √(r−1), the unit of σ_r in Lemma 19."""
    return d**0.5 - (r - 1) ** 0.5


@functools.cache
def gaussian(shapes: tuple[tuple[int, int], ...], correlated: bool = False) -> Samples:
    """Return draws of Gaussian W; if `correlated`, with the last column near the first."""
    samples = {}
    for d, r in shapes:
        rng = np.random.default_rng((common.SEED, d, r))
        w = rng.standard_normal((DRAWS if d <= 20 else DRAWS // 4, d, r))
        if correlated and r > 1:
            w[..., -1] = w[..., 0] + 1e-3 * w[..., -1]
        samples[d, r] = common.singular_values(w)[:, -1] / unit(d, r)
    return samples


def tail(c1: float, c2: float, d: int, r: int, tau: float) -> float:
    """Return (C₁τ)^{d−r+1} + e^{−C₂d}.

    Args:
        c1: C₁.
        c2: C₂.
        d: rows.
        r: columns.
        tau: τ.
    """
    return (c1 * tau) ** (d - r + 1) + float(np.exp(-c2 * d))


@functools.cache
def constants() -> tuple[float, float]:
    """Return C₁ and C₂ of the fitted shapes: the admissible pair of least mean log-bound."""
    points = [
        (d, r, tau, float(np.mean(values <= tau)))
        for (d, r), values in gaussian(FITTED).items()
        for tau in TAUS
    ]
    best = (np.inf, 0.0, 0.0)
    for c1 in np.arange(0.2, 4.0, 0.02):
        excess = [(d, p - (c1 * tau) ** (d - r + 1)) for d, r, tau, p in points]
        c2 = min([10.0, *(-np.log(gap) / d for d, gap in excess if gap > 0)])
        score = float(np.mean([np.log(min(1, tail(c1, c2, d, r, t))) for d, r, t, _ in points]))
        best = min(best, (score, float(c1), float(c2)))
    return best[1], best[2]


def lower_limit(count: int, total: int, level: float) -> float:
    """Return the one-sided Clopper–Pearson limit of a probability, at confidence 1 − level.

    Args:
        count: the number of events.
        total: the number of draws.
        level: 1 − the confidence.
    """
    return float(stats.beta.ppf(level, count, total - count + 1)) if count else 0.0


def test_tails(samples: Samples) -> Measured:
    """Measure whether counts agree with the fitted tails: largest lower limit over its bound."""
    c1, c2 = constants()
    points = [(d, r, tau) for d, r in samples for tau in TAUS if tail(c1, c2, d, r, tau) < 1]
    ratios, events = [], 0
    for d, r, tau in points:
        values = samples[d, r]
        count = int(np.sum(values <= tau))
        events += count
        limit = lower_limit(count, len(values), LEVEL / len(points))
        ratios.append(limit / tail(c1, c2, d, r, tau))
    total = sum(len(v) for v in samples.values())
    deficient = sum(int(np.sum(v < 1e-12)) for v in samples.values())
    return Measured(
        float(np.max(ratios)),
        1.0,
        detail="lower Clopper–Pearson limit of P(σ_r below τ units) over the fitted bound, largest "
        f"over (d, r) and τ where that is below 1; level {LEVEL:g} for all intervals together",
        facts={
            "C₁": c1,
            "C₂": c2,
            "points": len(points),
            "draws": total,
            "events": events,
            "rank-deficient draws": deficient,
        },
    )


@functools.partial(jax.jit, static_argnums=2)
def _starts(start_keys: Any, a: Any, rank: int) -> Any:
    return jax.lax.map(
        lambda k: nys.initializers.nystrom(k, a, rank, 1.0), start_keys, batch_size=500
    )


def start_tails(shapes: tuple[tuple[int, int], ...], correlated: bool = False) -> Measured:
    """Measure σ(X_0) of Nyström starts against the tails of Lemma 19, for Lemmas 1 and 11.

    For r > r_A the roles of r and r_A are exchanged: σ_{r_A}, and √r − √(r_A−1).

    Args:
        shapes: (r_A, r).
        correlated: whether the columns of Ω are nearly parallel.
    """
    outcomes = []
    for true_rank, rank in shapes:
        d, r = max(true_rank, rank), min(true_rank, rank)
        for i, kappa in enumerate((1.0, 100.0)):
            spectrum = common.spectrum("geometric", true_rank, kappa)
            (a,), (basis,) = common.psd_batch(common.keys(1, 30), common.M, spectrum[None])
            x0 = _starts(common.keys(STARTS, 31 + i), a, rank)
            if correlated:
                x0 = x0.at[..., 1:].set(x0[..., :1] + 1e-3 * x0[..., 1:])  # as the columns of Ω
            phi = jnp.einsum("mk,bmr->bkr", basis, x0)
            least = common.singular_values(phi)[:, r - 1]
            outcomes.append(test_tails({(d, r): least / spectrum[-1] / unit(d, r)}))
    worst = max(outcomes, key=lambda o: o.measured)
    facts = dict(worst.facts)
    for name in ("draws", "events", "points", "rank-deficient draws"):
        facts[name] = sum(o.facts[name] for o in outcomes)
    return Measured(worst.measured, worst.bound, detail=worst.detail, facts=facts)
