"""Section 2.4 and Appendix B.3: the symmetric problem with r < r_A."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.claims.symmetric_exact import alignment, phi_error
from paper_checks.framework import Measured, claim, common, worst
from paper_checks.framework.common import Dtype, eps, frobenius, over_time, singular_values
from paper_checks.framework.families import (
    EVERYWHERE,
    LEAVES_RANGE,
    SMALL_START,
    Family,
    Start,
    everywhere,
)

RUNS = EVERYWHERE["under"]


def weak_grams(f: Family) -> np.ndarray:
    """Return B_t = Φ_tᵀΣ⁻¹Φ_t."""
    return np.asarray(over_time(nys.dynamics.weak_gram, 0, None)(f.phi, f.spectrum))


def random_weak_optima(count: int, rank: int, spectrum: np.ndarray) -> np.ndarray:
    """Return random Φ = Σ^{1/2}V with VᵀV = I, the form of all solutions of ΦᵀΣ⁻¹Φ = I.

    Args:
        count: how many.
        rank: the columns of Φ.
        spectrum: diag(Σ).
    """
    rng = np.random.default_rng((common.SEED, 40, rank))
    frames = np.linalg.qr(rng.standard_normal((count, len(spectrum), rank)))[0]
    return np.sqrt(spectrum)[:, None] * frames


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _weak_optimality(x: Any, basis: Any, spectrum: Any) -> Any:
    return nys.optimality.weak_optimality(x, basis, spectrum)


@functools.partial(jax.jit, static_argnums=1)
def _optimum(a: Any, rank: int) -> Any:
    return nys.problems.Symmetric(a).optimum(rank)


@claim(
    "def-1",
    "weak optimality XᵀA†X = I_r: the measure is the ‖XᵀA†X − I‖_F of its definition, in "
    "range(A) zero exactly on {Q Σ^{1/2} V : VᵀV = I}",
    hypotheses="A† by NumPy; m = 60, r_A = 8, r = 1, 3, 5, 8, κ = 2, 100, 1e4; 20 points each",
    removes="weak optimality",
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
            library = np.asarray(_weak_optimality(x, basis, spectrum))
            plain = frobenius(np.swapaxes(x, 1, 2) @ inverse @ x - np.eye(rank))
            zero.append(np.max(library))
            agree.append(np.max(np.abs(library - plain)) / kappa)
    return worst(
        "largest over the points",
        {"at weak optima": (max(zero), 1e-13), "library minus NumPy over κ": (max(agree), 1e-12)},
        rounding=True,
    )


@claim(
    "lem-3",
    "every global optimum X* = Q₁Σ₁^{1/2}Uᵀ is weakly optimal",
    hypotheses="r ≤ r_A; m = 60, r_A = 8, r = 1, 3, 5, 8, κ = 2, 100, 1e4; X* by "
    "problems.Symmetric.optimum, U random orthogonal; allowed 1e-13·κ",
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
            x = np.asarray(_optimum(a, rank))
            x = x @ np.linalg.qr(rng.standard_normal((rank, rank)))[0].T
            errors.append(float(_weak_optimality(x[None], basis, spectrum)[0]) / kappa)
    return Measured(max(errors), 1e-13, detail="‖X*ᵀA†X* − I‖_F/κ, largest", rounding=True)


@claim(
    "lem-4",
    "X_t = QΦ_t for all t, Φ_t of size r_A × r",
    hypotheses=f"under-parametrized, Nyström start, ScaledGD (2). {RUNS}",
    **LEAVES_RANGE,
)
def lemma_4(start: Start = "nystrom") -> Measured:
    """Lemma 4."""
    return worst(
        "‖(I − QQᵀ)X_t‖_F in units of rounding, largest over runs and steps",
        everywhere("under", alignment, 100.0, start=start),
        rounding=True,
    )


@claim(
    "eq-15",
    "Φ_{t+1} = (1−η)Φ_t + ηΣΦ_t(Φ_tᵀΦ_t)^{−1}",
    hypotheses=f"under-parametrized, Nyström start. {RUNS}",
    **LEAVES_RANGE,
)
def equation_15(start: Start = "nystrom") -> Measured:
    """(15)."""
    return worst(
        "‖Φ_{t+1} − right side‖_F in units of eps·(‖Φ_{t+1}‖_F + σ_1(A)‖Φ_t‖_F‖Φ_t†‖²)",
        everywhere("under", phi_error, 100.0, start=start),
        rounding=True,
    )


def weak_gram_error(f: Family, dtype: Dtype) -> float:
    """Return the distance of B_{t+1} from (16), in units of eps·κ·(‖B_{t+1}‖ + ‖B_t‖ + 1)."""
    gram, eta = jnp.asarray(weak_grams(f)), jnp.asarray(f.eta, f.x.dtype)
    step = over_time(nys.dynamics.weak_gram_step, 0, 0, None, None)
    new = step(gram[:, :-1], f.phi[:, :-1], f.spectrum, eta)
    # A† magnifies rounding in Φ by κ.
    unit = f.kappa[:, None] * (frobenius(gram[:, 1:]) + frobenius(gram[:, :-1]) + 1)
    return float(np.max(frobenius(gram[:, 1:] - new) / unit)) / eps(dtype)


@claim(
    "eq-16",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)I + η²Θ_tᵀΣΘ_t with B = ΦᵀΣ⁻¹Φ, Θ = Φ(ΦᵀΦ)^{−1}",
    hypotheses=f"under-parametrized, Nyström start. {RUNS}",
    **LEAVES_RANGE,
)
def equation_16(start: Start = "nystrom") -> Measured:
    """(16)."""
    return worst(
        "‖B_{t+1} − right side‖_F in units of eps·κ·(‖B_{t+1}‖_F + ‖B_t‖_F + 1)",
        everywhere("under", weak_gram_error, 100.0, start=start),
        rounding=True,
    )


def weak_growth(f: Family, dtype: Dtype) -> float:
    """Return the bound of Lemma 9 over σ_r(B_{t+1}), largest over runs and steps."""
    root = np.sqrt(np.asarray(f.spectrum, np.float64))[:, None, :, None]
    least = singular_values(np.asarray(f.phi, np.float64) / root)[..., -1] ** 2
    eta = f.eta[:, None]
    t = np.arange(least.shape[1] - 1)
    decay = (1 - eta) ** (2 * t + 2)
    bound = decay * least[:, :1] + (1 - eta) * (1 - decay)
    noise = 1 + 100 * eps(dtype) * f.kappa[:, None]  # A† magnifies rounding by κ
    return float(np.max(bound / least[:, 1:] / noise))


@claim(
    "lem-9",
    "σ_r(B_{t+1}) ≥ (1−η)^{2t+2}σ_r(B_0) + (1−η) − (1−η)^{2t+3}, B = ΦᵀΣ⁻¹Φ",
    hypotheses=f"under-parametrized, Nyström start, 0 < η ≤ 1. {RUNS}",
    **SMALL_START,
)
def lemma_9(start: Start = "nystrom") -> Measured:
    """Lemma 9."""
    return worst(
        (
            "bound over (1 + 100 eps κ)σ_r(B_{t+1}), largest over runs and steps; large starts "
            "attain it"
        ),
        everywhere("under", weak_growth, 1.0, start=start),
    )
