"""The helper lemmas 14 to 19 of Appendix D, on random inputs."""

from __future__ import annotations

import numpy as np

from paper_checks.claims import tails
from paper_checks.framework import Measured, claim, common, worst
from paper_checks.framework.common import singular_values


@claim(
    "lem-14",
    "A_{t+1} = (1−θ)A_t + β gives A_t = (1−θ)^tA_0 + β(1−(1−θ)^t)/θ ≤ (1−θ)^tA_0 + β/θ",
    hypotheses="θ ∈ (0, 1), β > 0; 200 random (θ, β, A_0), 100 steps each",
    removes="θ > 0",
    instead="θ ∈ (−0.2, 0)",
    sign=-0.2,
)
def lemma_14(sign: float = 1.0) -> Measured:
    """Lemma 14."""
    rng = np.random.default_rng((common.SEED, 60))
    theta, beta = sign * rng.uniform(0.01, 0.99, 200), rng.uniform(0.01, 10, 200)
    first = value = rng.uniform(-5, 5, 200)
    equal, bound = [], []
    for t in range(1, 101):
        value = (1 - theta) * value + beta
        power = (1 - theta) ** t
        closed = power * first + beta * (1 - power) / theta
        scale = np.abs(power * first) + beta / np.abs(theta)
        equal.append(np.max(np.abs(value - closed) / (scale + np.abs(closed))))
        bound.append(np.max((value - power * first - beta / theta) / scale))
    return worst(
        "relative to the terms of the closed form",
        {"closed form": (max(equal), 1e-13), "excess over the bound": (max(bound), 1e-13)},
        rounding=True,
    )


@claim(
    "lem-15",
    "λ_min(A + B) ≥ λ_min(A) + λ_min(B)",
    hypotheses="A, B positive semidefinite; n = 1 … 12, ranks 0 … n, 2000 pairs",
    removes="symmetry",
    instead="the upper triangle of A and the lower one of B, whose eigenvalues are their diagonals",
    symmetric=False,
)
def lemma_15(symmetric: bool = True) -> Measured:
    """Lemma 15."""
    rng = np.random.default_rng((common.SEED, 61))
    gaps = []
    for _ in range(2000):
        n = int(rng.integers(1, 13))
        pair = []
        for _ in range(2):
            root = rng.standard_normal((n, int(rng.integers(0, n + 1))))
            pair.append(root @ root.T)
        a, b = pair
        if not symmetric:
            a, b = np.triu(a), np.tril(b)
        low = [np.min(np.linalg.eigvals(x).real) for x in (a + b, a, b)]
        if symmetric:
            low = [np.linalg.eigvalsh(x)[0] for x in (a + b, a, b)]
        scale = np.linalg.norm(a) + np.linalg.norm(b) + 1e-300
        gaps.append((low[1] + low[2] - low[0]) / scale)
    return Measured(
        float(np.max(gaps)),
        1e-13,
        detail="(λ_min(A) + λ_min(B) − λ_min(A+B))/(‖A‖ + ‖B‖), largest",
        rounding=True,
    )


@claim(
    "lem-16",
    "A_{t+1} ≤ αA_t² and A_0 ≤ 1/(2α) give A_{t+1} ≤ (1/α)2^{−2^{t+1}}",
    hypotheses="A_t ≥ 0; 500 random α from 1e-6 to 1e6, A_0 and slacks, A_0 = 1/(2α) without "
    "slack among them; 9 steps, in logarithms",
    removes="A_0 ≤ 1/(2α)",
    instead="A_0 up to 0.9/α, that value among them",
    limit=0.9,
)
def lemma_16(limit: float = 0.5) -> Measured:
    """Measure Lemma 16 in log2, because the numbers reach 2^{-512}."""
    rng = np.random.default_rng((common.SEED, 62))
    alpha = 10.0 ** rng.uniform(-6, 6, 500)
    # the extreme start is among them
    value = np.log2(limit * np.append(rng.uniform(0.01, 1, 499), 1) / alpha)
    excess = []
    for t in range(9):
        slack = np.where(np.arange(500) % 2 == 0, 0, np.log2(rng.uniform(0.1, 1, 500)))
        slack[-1] = 0
        value = np.log2(alpha) + 2 * value + slack
        excess.append(np.max(value + np.log2(alpha) + 2.0 ** (t + 1)))
    return Measured(
        max(excess), 1e-9, detail="log2 of A_{t+1} over the bound, largest", rounding=True
    )


@claim(
    "lem-17",
    "σ_min(AB) ≥ σ_min(A)σ_min(B), σ_min the least non-zero singular value",
    hypotheses="A of full column rank, B ≠ 0 of any rank; 2000 random pairs up to 12 × 12",
    removes="full column rank of A",
    instead="A with two more columns than rows",
    wide=True,
)
def lemma_17(wide: bool = False) -> Measured:
    """Lemma 17."""
    rng = np.random.default_rng((common.SEED, 63))

    def least(x: np.ndarray, rank: int) -> float:
        return float(singular_values(x)[rank - 1])

    ratios = []
    for _ in range(2000):
        m, p = rng.integers(1, 13, 2)
        n = m + 2 if wide else int(rng.integers(1, m + 1))
        rank = int(rng.integers(1, min(n, p) + 1))
        a = rng.standard_normal((m, n))
        b = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, p))
        product = least(a @ b, min(rank, m))
        ratios.append(least(a, min(m, n)) * least(b, rank) / product)
    return Measured(float(np.max(ratios)), 1 + 1e-6, detail="right side over left side, largest")


@claim(
    "lem-18",
    "A + B = I_r with A, B positive semidefinite gives Tr A ≤ r and Tr B ≤ r",
    hypotheses="r = 1 … 12, A = U diag(λ)Uᵀ with λ ∈ [0, 1], B = I − A; 1000 pairs",
    removes="semidefiniteness of both",
    instead="A with eigenvalues in [−2, 3], and so B",
    low=-2.0,
    high=3.0,
)
def lemma_18(low: float = 0.0, high: float = 1.0) -> Measured:
    """Lemma 18."""
    rng = np.random.default_rng((common.SEED, 64))
    ratios = []
    for i in range(1000):
        r = 1 + i % 12
        basis = np.linalg.qr(rng.standard_normal((r, r)))[0]
        values = rng.uniform(low, high, r)
        if i % 5 == 0:
            values = np.full(r, high)
        a = (basis * values) @ basis.T
        ratios.append(max(np.trace(a), np.trace(np.eye(r) - a)) / r)
    return Measured(max(ratios), 1 + 1e-12, detail="max(Tr A, Tr B)/r, largest")


@claim(
    "lem-19",
    "P(σ_r(W) ≤ τ(√d − √(r−1))) ≤ (C₁τ)^{d−r+1} + e^{−C₂d}, W Gaussian d × r (Rudelson, Vershynin)",
    hypotheses="d ≥ r; C₁, C₂ fitted on 10,000 draws each of twelve shapes with d = 3, 5, 8; "
    "tested at τ = .05 … .8 on 10,000 draws each of (d, r) = (20, 1), (20, 10), (20, 18), (20, "
    "20) and 2,500 of (40, 10), (40, 38), (40, 40)",
    removes="independent columns",
    instead="the last column is the first plus 1e-3 of itself",
    correlated=True,
)
def lemma_19(correlated: bool = False) -> Measured:
    """Lemma 19."""
    return tails.test_tails(tails.gaussian(tails.HELD_OUT, correlated))
