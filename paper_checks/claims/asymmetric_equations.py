"""Appendix C: the reduced iterations of the asymmetric problem, (29) to (35)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.claims.asymmetric import in_eps
from paper_checks.framework import Measured, claim, worst
from paper_checks.framework import pair_families as pairs
from paper_checks.framework.common import (
    Dtype,
    frobenius,
    over_time,
    per_dtype,
    singular_values,
    transposed,
)
from paper_checks.framework.families import Regime
from paper_checks.framework.pair_families import RANDOM_START, PairFamily, where


def conditions(f: PairFamily) -> np.ndarray:
    """Return condition numbers of Σ⁻¹UᵀX_0, (b,); it is VᵀΩ for Nyström starts."""
    live = min(f.spectrum.shape[-1], f.x.shape[-1])
    whitened = transposed(f.left) @ np.asarray(f.x[:, 0]) / np.asarray(f.spectrum)[:, :, None]
    values = singular_values(whitened.astype(np.float64))
    return values[:, 0] / values[:, live - 1]


def first_factors(regime: Regime, start: pairs.Start) -> Measured:
    """Measure Φ_1 = Φ_0 and Ψ_1 = ηΣΦ_0(Φ_0ᵀΦ_0)^{−1}, for any η; NumPy's dual in float64.

    Args:
        regime: "exact" or "under".
        start: the kind of start.
    """

    def left(f: PairFamily) -> np.ndarray:
        phi = np.asarray(f.phi)
        return frobenius(phi[:, 1] - phi[:, 0]) / frobenius(phi[:, 0])

    def right(f: PairFamily) -> np.ndarray:
        phi = np.asarray(f.phi[:, 0], np.float64)
        dual = transposed(np.linalg.pinv(phi, rcond=1e-14))
        sigma = np.asarray(f.spectrum, np.float64)[:, :, None]
        expected = f.eta[:, None, None] * sigma * dual
        unit = frobenius(expected) + f.eta * f.norm * np.linalg.norm(dual, axis=(1, 2))
        return frobenius(np.asarray(f.psi[:, 1]) - expected) / (unit * conditions(f))

    return worst(
        (
            "‖Φ_1 − Φ_0‖/‖Φ_0‖ in units of eps, and Ψ_1 in units of eps·(‖Ψ_1‖ + η‖A‖‖Φ_0†‖) "
            "times the condition number of Σ^{−1}Φ_0"
        ),
        {**in_eps(regime, start, left, 30.0, "Φ"), **in_eps(regime, start, right, 100.0, "Ψ")},
        rounding=True,
    )


@claim("eq-29", "Φ_1 = Φ_0 and Ψ_1 = ηΣΦ_0^{−ᵀ}", hypotheses=where("exact"), **RANDOM_START)
def equation_29(start: pairs.Start = "nystrom") -> Measured:
    """(29a), (29b)."""
    return first_factors("exact", start)


@claim(
    "eq-34",
    "Φ_1 = Φ_0 and Ψ_1 = ηΣΘ_0, Θ_0 = Φ_0(Φ_0ᵀΦ_0)^{−1}",
    hypotheses=where("under"),
    **RANDOM_START,
)
def equation_34(start: pairs.Start = "nystrom") -> Measured:
    """(34a), (34b)."""
    return first_factors("under", start)


@claim(
    "eq-30",
    "Φ_{t+1} = (1−η)Φ_t + ηΣΨ_t^{−ᵀ}, Ψ_{t+1} = (1−η)Ψ_t + ηΣΦ_t^{−ᵀ} for t ≥ 1",
    hypotheses=where("exact"),
    **RANDOM_START,
)
def equation_30(start: pairs.Start = "nystrom") -> Measured:
    """(30a), (30b), with NumPy's inverse in float64."""

    def gap(f: PairFamily, value: Any, other: Any) -> np.ndarray:
        value, other = np.asarray(value[:, 1:]), np.asarray(other[:, 1:], np.float64)
        eta, sigma = f.eta[:, None, None, None], np.asarray(f.spectrum)[:, None, :, None]
        expected = (1 - eta) * value[:, :-1] + eta * sigma * transposed(
            np.linalg.inv(other[:, :-1])
        )
        inverse = f.norm[:, None] / singular_values(other[:, :-1])[..., -1]
        unit = (frobenius(value[:, 1:]) + inverse) * conditions(f)[:, None]
        return frobenius(value[:, 1:] - expected) / unit

    return worst(
        (
            "difference in units of eps·(‖left side‖ + ‖A‖‖inverse‖), times the condition number "
            "of Σ^{−1}Φ_0, which both inverses have"
        ),
        {
            **in_eps("exact", start, lambda f: gap(f, f.phi, f.psi), 100.0, "Φ"),
            **in_eps("exact", start, lambda f: gap(f, f.psi, f.phi), 100.0, "Ψ"),
        },
        rounding=True,
    )


def pair_cores(f: PairFamily) -> np.ndarray:
    """Return Φ_tΨ_tᵀ, t ≥ 1."""
    return (np.asarray(f.phi) @ transposed(f.psi))[:, 1:]


@claim(
    "eq-31",
    "Φ_1Ψ_1ᵀ = ηΣ, and Φ_tΨ_tᵀ is symmetric positive definite for t ≥ 1",
    hypotheses=where("exact"),
    **RANDOM_START,
)
def equation_31(start: pairs.Start = "nystrom") -> Measured:
    """(31) and the first step of the proof of Corollary 1."""

    def sizes(f: PairFamily) -> np.ndarray:
        return (frobenius(f.phi) * frobenius(f.psi))[:, 1:]

    def base(f: PairFamily) -> np.ndarray:
        sigma = np.asarray(f.spectrum)[:, :, None] * np.eye(f.spectrum.shape[1])
        return frobenius(pair_cores(f)[:, 0] - f.eta[:, None, None] * sigma) / sizes(f)[:, 0]

    def skew(f: PairFamily) -> np.ndarray:
        core = pair_cores(f)
        return frobenius(core - transposed(core)) / sizes(f)

    def indefinite(f: PairFamily) -> float:
        # Σ^{−1/2}ΦΨᵀΣ^{−1/2} is c_tI, with c_1 = η and c_t > η/2 ever after.
        root = np.sqrt(np.asarray(f.spectrum, np.float64))
        whitened = pair_cores(f) / root[:, None, :, None] / root[:, None, None, :]
        least = np.linalg.eigvalsh((whitened + transposed(whitened)) / 2)[..., 0]
        return float(np.max(np.where(least > 0, f.eta[:, None] / (2 * np.abs(least)), np.inf)))

    def most_indefinite(dtype: Dtype) -> float:
        return max(map(indefinite, pairs.families("exact", dtype, start)))

    return worst(
        (
            "‖Φ_1Ψ_1ᵀ − ηΣ‖_F and skewness in units of eps·‖Φ_t‖‖Ψ_t‖, and η/(2λ_min) of "
            "Σ^{−1/2}Φ_tΨ_tᵀΣ^{−1/2}"
        ),
        {
            **in_eps("exact", start, base, 100.0, "base"),
            **in_eps("exact", start, skew, 100.0, "skew"),
            **per_dtype(most_indefinite, 1.0, "η/(2λ_min)"),
        },
        rounding=True,
    )


@claim(
    "eq-32",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)Σ + η²ΣB_t^{−1}Σ with B = ΦΨᵀ, t ≥ 1: (12) again",
    hypotheses=where("exact"),
    **RANDOM_START,
)
def equation_32(start: pairs.Start = "nystrom") -> Measured:
    """(32)."""

    def gap(f: PairFamily) -> np.ndarray:
        core = jnp.asarray(pair_cores(f))
        eta = jnp.asarray(f.eta, core.dtype)
        new = over_time(nys.dynamics.core_step, 0, None, None)(core[:, :-1], f.spectrum, eta)
        values = singular_values(core[:, :-1])
        size = (frobenius(f.phi) * frobenius(f.psi))[:, 1:]
        unit = values[..., 0] / values[..., -1] * (size[:, 1:] + size[:, :-1] + f.norm[:, None])
        return frobenius(core[:, 1:] - new) / unit

    return worst(
        "difference in units of eps·cond(B_t)·(‖Φ‖‖Ψ‖ + ‖A‖)",
        in_eps("exact", start, gap, 20.0),
        rounding=True,
    )


@claim(
    "eq-35",
    "with pseudo-inverses (35) needs no case for Y_0 = 0: X_1 = X_0, and Y_1 = ηAᵀ(X_0†)ᵀ",
    hypotheses=where("over"),
    removes="Y_0 = 0",
    instead="a random Y_0 of the size of Aᵀ(X_0†)ᵀ, with the same X_0",
    start="lifted",
)
def equation_35(start: pairs.Start = "nystrom") -> Measured:
    """(35) at t = 0, against NumPy's pseudo-inverse, cut at the true rank."""

    def left(f: PairFamily) -> np.ndarray:
        return frobenius(f.x[:, 1] - f.x[:, 0]) / frobenius(f.x[:, 0])

    def right(f: PairFamily) -> np.ndarray:
        live = f.spectrum.shape[1]
        u, s, vt = np.linalg.svd(np.asarray(f.x[:, 0], np.float64), full_matrices=False)
        dual = (u[..., :live] / s[:, None, :live]) @ vt[:, :live]
        expected = f.eta[:, None, None] * transposed(f.a) @ dual
        unit = frobenius(expected) + f.eta * f.norm * frobenius(dual)
        return frobenius(np.asarray(f.y[:, 1]) - expected) / unit

    return worst(
        "‖X_1 − X_0‖/‖X_0‖, and Y_1 in units of eps·(‖Y_1‖ + η‖A‖‖X_0†‖)",
        {**in_eps("over", start, left, 30.0, "X"), **in_eps("over", start, right, 1e3, "Y")},
        rounding=True,
    )
