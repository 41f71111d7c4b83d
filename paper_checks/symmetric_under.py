"""Section 2.4 and Appendix B.3: the symmetric problem with r < r_A."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks import common
from paper_checks.claim import Measured, claim, worst
from paper_checks.common import DTYPES, Start, eps, family, frobenius, over_time, singular_values
from paper_checks.symmetric_exact import alignment, phi_error

EVERYWHERE = "m = 60, r = 5, r_A = 8; κ = 2 … 1e6 (float32: 2 … 1e3), two kinds of spectrum, η = .1, .3, .5, .9, ξ = .1, 1, 10; 32 runs of 48 steps each in float64 and in float32"


def weak_errors(f: common.Family) -> np.ndarray:
    """‖X_tᵀA†X_t − I‖_F."""
    measure = over_time(nys.optimality.weak_optimality, 0, None, None)
    return np.asarray(measure(f.x, f.basis, f.spectrum))


def weak_grams(f: common.Family) -> np.ndarray:
    """B_t = Φ_tᵀΣ⁻¹Φ_t."""
    return np.asarray(over_time(nys.dynamics.weak_gram, 0, None)(f.phi, f.spectrum))


def random_weak_optima(count: int, rank: int, spectrum: np.ndarray) -> np.ndarray:
    """Φ = Σ^{1/2}V with VᵀV = I: all solutions of ΦᵀΣ⁻¹Φ = I have this form."""
    rng = np.random.default_rng((common.SEED, 40, rank))
    frames = np.linalg.qr(rng.standard_normal((count, len(spectrum), rank)))[0]
    return np.sqrt(spectrum)[:, None] * frames


@claim(
    "def-1",
    "weak optimality XᵀA†X = I_r: the measure is the ‖XᵀA†X − I‖_F of its definition, zero exactly "
    "on {Q Σ^{1/2} V : VᵀV = I}",
    hypotheses="A† by NumPy; m = 60, r_A = 8, r = 1, 3, 5, 8, κ = 2, 100, 1e4; 20 points each",
    removes="weak optima",
    instead="the same points scaled by 1.01",
    stretch=1.01,
)
def definition_1(stretch: float = 1.0) -> Measured:
    """Definition 1."""
    zero, agree = [], []
    for kappa in (2.0, 1e2, 1e4):
        spectrum = common.spectrum("geometric", 8, kappa)
        (a,), (basis,) = common.psd_batch(common.keys(1, 41), common.M, spectrum[None])
        inverse = np.linalg.pinv(np.asarray(a), rcond=1e-10, hermitian=True)
        for rank in (1, 3, 5, 8):
            x = stretch * np.asarray(basis) @ random_weak_optima(20, rank, spectrum)
            measure = jax.vmap(nys.optimality.weak_optimality, in_axes=(0, None, None))
            library = np.asarray(measure(x, basis, spectrum))
            plain = frobenius(np.swapaxes(x, 1, 2) @ inverse @ x - np.eye(rank))
            zero.append(np.max(library))
            agree.append(np.max(np.abs(library - plain)) / kappa)
    return worst(at_weak_optima=(max(zero), 1e-13), library_minus_NumPy_over_κ=(max(agree), 1e-12))


@claim(
    "lem-3",
    "every global optimum X* = Q₁Σ₁^{1/2}Uᵀ is weakly optimal",
    hypotheses="r ≤ r_A; m = 60, r_A = 8, r = 1, 3, 5, 8, κ = 2, 100, 1e4; X* by problems.Symmetric.optimum, U random orthogonal; allowed 1e-13·κ",
    removes="r ≤ r_A",
    instead="r = 10 > r_A = 8, where X*ᵀA†X* is a projector and not I",
    ranks=(10,),
)
def lemma_3(ranks: tuple[int, ...] = (1, 3, 5, 8)) -> Measured:
    """Lemma 3."""
    errors = []
    rng = np.random.default_rng((common.SEED, 42))
    for kappa in (2.0, 1e2, 1e4):
        spectrum = common.spectrum("geometric", 8, kappa)
        (a,), (basis,) = common.psd_batch(common.keys(1, 41), common.M, spectrum[None])
        for rank in ranks:
            x = np.asarray(nys.problems.Symmetric(a).optimum(rank))
            x = x @ np.linalg.qr(rng.standard_normal((rank, rank)))[0].T
            errors.append(float(nys.optimality.weak_optimality(x, basis, spectrum)) / kappa)
    return Measured(max(errors), 1e-13, detail="‖X*ᵀA†X* − I‖_F/κ, largest")


@claim(
    "lem-4",
    "X_t = QΦ_t for all t, Φ_t of size r_A × r",
    hypotheses=f"under-parametrized, Nyström start, ScaledGD (2). {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def lemma_4(start: Start = "nystrom") -> Measured:
    """Lemma 4."""
    return worst(
        "‖(I − QQᵀ)X_t‖_F in units of rounding, largest over runs and steps",
        **{dtype: (alignment(family("under", dtype, start), dtype), 30.0) for dtype in DTYPES},
    )


@claim(
    "eq-15",
    "Φ_{t+1} = (1−η)Φ_t + ηΣΦ_t(Φ_tᵀΦ_t)^{−1}",
    hypotheses=f"under-parametrized, Nyström start. {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def equation_15(start: Start = "nystrom") -> Measured:
    """(15)."""
    return worst(
        "‖Φ_{t+1} − right side‖_F in units of eps·(‖Φ_{t+1}‖ + ‖Φ_t†‖)",
        **{
            dtype: (phi_error(family("under", dtype, start), nys.dynamics.phi_step, dtype), 100.0)
            for dtype in DTYPES
        },
    )


@claim(
    "eq-16",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)I + η²Θ_tᵀΣΘ_t with B = ΦᵀΣ⁻¹Φ, Θ = Φ(ΦᵀΦ)^{−1}",
    hypotheses=f"under-parametrized, Nyström start. {EVERYWHERE}",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    start="perturbed",
)
def equation_16(start: Start = "nystrom") -> Measured:
    """(16)."""
    parts = {}
    for dtype in DTYPES:
        f = family("under", dtype, start)
        gram, eta = jnp.asarray(weak_grams(f)), jnp.asarray(f.eta, f.x.dtype)
        step = over_time(nys.dynamics.weak_gram_step, 0, 0, None, None)
        new = step(gram[:, :-1], f.phi[:, :-1], f.spectrum, eta)
        # A† magnifies what rounding leaves in Φ by κ
        unit = f.kappa[:, None] * (frobenius(gram[:, 1:]) + frobenius(gram[:, :-1]) + 1)
        parts[dtype] = (np.max(frobenius(gram[:, 1:] - new) / unit) / eps(dtype), 100.0)
    return worst("‖B_{t+1} − right side‖_F in units of eps·κ·(‖B_{t+1}‖ + ‖B_t‖ + 1)", **parts)


@claim(
    "lem-9",
    "σ_r(B_{t+1}) ≥ (1−η)^{2t+2}σ_r(B_0) + (1−η) − (1−η)^{2t+3}, B = ΦᵀΣ⁻¹Φ",
    hypotheses=f"under-parametrized, Nyström start, 0 < η ≤ 1. {EVERYWHERE}",
    removes="the Nyström start",
    instead="a small start (ζ = 1e-3), which is not in range(A)",
    start="small",
)
def lemma_9(start: Start = "nystrom") -> Measured:
    """Lemma 9."""
    ratios = {}
    for dtype in DTYPES:
        f = family("under", dtype, start)
        least = singular_values(weak_grams(f))[..., -1]
        eta = f.eta[:, None]
        t = np.arange(least.shape[1] - 1)
        decay = (1 - eta) ** (2 * t + 2)
        bound = decay * least[:, :1] + (1 - eta) * (1 - decay)
        ratios[dtype] = (np.max(bound / least[:, 1:]), 1.0 + 10 * eps(dtype))
    return worst("bound over σ_r(B_{t+1}), largest over runs and steps", **ratios)


@functools.cache
def _theta_terms(rank: int, invariant: bool) -> tuple[np.ndarray, ...]:
    """‖ΘᵀΣΘ‖_F, σ_r(B) and κ of 400 random Φ; the range of Φ is invariant under Σ, or is not."""
    rng = np.random.default_rng((common.SEED, 43, rank, invariant))
    norms, least, kappas = [], [], []
    for i in range(400):
        kappa = (2.0, 1e2, 1e4, 1e6)[i % 4]
        spectrum = common.spectrum(("geometric", "last")[i // 4 % 2], 8, kappa)
        phi = rng.standard_normal((8, rank)) * 10.0 ** rng.uniform(-1, 1)
        if invariant:
            phi *= np.isin(np.arange(8), rng.permutation(8)[:rank])[:, None]
        theta = np.asarray(_dual(jnp.asarray(phi)))
        norms.append(np.linalg.norm(theta.T @ (spectrum[:, None] * theta)))
        least.append(singular_values(_gram(phi, spectrum))[-1])
        kappas.append(kappa)
    return np.array(norms), np.array(least), np.array(kappas)


_dual = jax.jit(nys.linalg.dual)
_gram = jax.jit(nys.dynamics.weak_gram)


@claim(
    "lem-10",
    "‖ΘᵀΣΘ‖_F ≤ r/σ_r(B), B = ΦᵀΣ⁻¹Φ, Θ = Φ(ΦᵀΦ)^{−1}",
    hypotheses="range(Φ) invariant under Σ, which the paper's proof uses (Σ^{1/2}Θ and Σ^{−1/2}Φ "
    "share their column space) and its statement leaves out; r = 1, 2, 5 of r_A = 8, κ = 2 … 1e6, 1200 draws",
    removes="an invariant range(Φ)",
    instead="Gaussian Φ, as the paper's statement allows",
    invariant=False,
)
def lemma_10(invariant: bool = True) -> Measured:
    """Lemma 10, with the hypothesis that makes it true."""
    ratios = {}
    for rank in (1, 2, 5):
        norms, least, _ = _theta_terms(rank, invariant)
        ratios[f"r={rank}"] = norms * least / rank
    measured = max(float(np.max(r)) for r in ratios.values())
    facts = {f"violations at {k}, of 400": float(np.sum(r > 1.000001)) for k, r in ratios.items()}
    facts["largest ratio"] = measured
    return Measured(measured, 1.0 + 1e-6, detail="‖ΘᵀΣΘ‖_F σ_r(B)/r, largest", facts=facts)


@claim(
    "lem-10-repaired",
    "√r/‖B‖ ≤ ‖ΘᵀΣΘ‖_F ≤ ((κ+1)²/(4κ)) √r/σ_r(B) for every Φ of full column rank",
    source="ours",
    hypotheses="none but the rank (matrix Kantorovich inequality); Φ Gaussian, r = 1, 2, 5 of r_A = 8, κ = 2 … 1e6, 1200 draws",
    removes="the factor (κ+1)²/(4κ)",
    instead="the bound of Lemma 10 as stated",
    factor=False,
)
def lemma_10_repaired(factor: bool = True) -> Measured:
    """Lemma 10 with the constant that it needs without invariance."""
    ratios = []
    for rank in (1, 2, 5):
        norms, least, kappa = _theta_terms(rank, False)
        constant = (kappa + 1) ** 2 / (4 * kappa) if factor else 1.0
        ratios.append(np.max(norms * least / (constant * rank**0.5)))
    return Measured(float(max(ratios)), 1.0 + 1e-6, detail="‖ΘᵀΣΘ‖_F σ_r(B)/(√r·factor), largest")


@functools.cache
def large_family(eta: float, steps: int, stretch: float = 1.0) -> tuple[np.ndarray, ...]:
    """‖B_t − I‖_F and κ from starts scaled to σ_r(B_0) ≥ 1/3, as Theorem 2 assumes."""
    rank, true_rank = common.RANKS["under"]
    spectra, _, kappa, _ = common.grid("float64", (eta,), true_rank)
    batch = len(kappa)
    a, basis = common.psd_batch(common.keys(batch, 44), common.M, spectra)
    x0 = common.start_batch(common.keys(batch, 45), a, rank, np.ones(batch), 0.0)
    gram = np.asarray(jax.vmap(nys.optimality.weak_gram)(x0, basis, spectra))
    least = singular_values(gram)[:, -1]
    x0 = stretch * x0 * np.maximum(1, np.sqrt(1 / (3 * least)))[:, None, None]
    x = common.trajectories(a, x0, np.full(batch, eta), 0.0, steps)
    f = common.Family(a, basis, jnp.asarray(spectra), np.full(batch, eta), kappa, x)
    return weak_errors(f), kappa


@claim(
    "thm-2i",
    "‖X_tᵀA†X_t − I‖_F ≤ η√r + 3ηr + (1−η)^t‖B_0 − I‖_F, hence O(ηr) + ε in O(log 1/ε), whatever κ",
    hypotheses="under-parametrized, Nyström start with σ_r(B_0) ≥ 1/3, η ≤ 2/3; m = 60, r = 5, r_A = 8, κ = 2 … 1e6, two kinds of spectrum, η = .1, .3, .5; 200 steps, every one",
    removes="σ_r(B_0) ≥ 1/3",
    instead="the same start scaled by 1e-4",
    stretch=1e-4,
)
def theorem_2_i(stretch: float = 1.0) -> Measured:
    """Theorem 2 (i), as (17) has it, at every step."""
    rank = common.RANKS["under"][0]
    ratios, finals = [], []
    for eta in (0.1, 0.3, 0.5):
        errors, _ = large_family(eta, 200, stretch)
        t = np.arange(errors.shape[1])
        bound = eta * rank**0.5 + 3 * eta * rank + (1 - eta) ** t * errors[:, :1]
        ratios.append(np.max(errors / bound))
        finals.append(np.max(errors[:, -1]) / (eta * rank))
    return Measured(
        float(max(ratios)),
        1.0,
        detail="‖B_t − I‖_F over the bound, largest over runs and steps",
        facts={"error after 200 steps over ηr": float(max(finals))},
    )


@claim(
    "thm-2ii",
    "η = ε/(√r + 3r + 1): ‖X_tᵀA†X_t − I‖_F ≤ ε after O((r/ε) log 1/ε) steps, whatever κ",
    hypotheses="under-parametrized, Nyström start with σ_r(B_0) ≥ 1/3; ε = .5, .2; m = 60, r = 5, r_A = 8, κ = 2 … 1e6; T = ⌈log(‖B_0 − I‖_F (√r+3r+1)/ε)/η⌉ steps",
    removes="a step size tied to ε",
    instead="η = 1",
    tied=False,
)
def theorem_2_ii(tied: bool = True) -> Measured:
    """Theorem 2 (ii)."""
    rank = common.RANKS["under"][0]
    constant = rank**0.5 + 3 * rank + 1
    ratios, counts = [], []
    for epsilon in (0.5, 0.2):
        eta = epsilon / constant
        first = large_family(eta, 1)[0][:, 0]
        steps = np.ceil(np.log(first * constant / epsilon) / eta).astype(int)
        errors, _ = large_family(eta if tied else 1.0, 1500)
        ratios.append(np.max(errors[np.arange(len(steps)), steps]) / epsilon)
        counts.append(np.max(steps) * epsilon / (rank * np.log(1 / epsilon)))
    return Measured(
        float(max(ratios)),
        1.0,
        detail="‖B_T − I‖_F/ε, largest",
        facts={"T ε/(r log 1/ε), largest": float(max(counts))},
    )


@claim(
    "lem-5",
    "lim ‖X_t − X*‖_F ≤ √(3r + 2r^{3/2}) = O(r^{3/4}), X* turned to fit best",
    hypotheses="under-parametrized, Nyström start, ScaledGD η = 1/2, X_48; m = 60, r = 5, r_A = 8, κ = 2 … 1e6, σ_1(A) = 1",
    removes="the limit",
    instead="X_0 with ξ = 10",
    limit=False,
)
def lemma_5(limit: bool = True) -> Measured:
    """Lemma 5 with the constant that (21) to (23) give."""
    f = common.at_eta(family("under", scale=10.0), 0.5)
    r = f.x.shape[-1]
    x = f.x[:, -1] if limit else f.x[:, 0]
    best = jax.vmap(lambda a: nys.problems.Symmetric(a).optimum(r))(f.a)
    distance = float(np.max(jax.vmap(nys.optimality.distance)(x, best)))
    return Measured(
        distance,
        (3 * r + 2 * r**1.5) ** 0.5,
        detail="distance to the solution set, largest over runs",
        facts={"2√r": 2 * r**0.5},
    )
