"""Section 3 and Appendix C: the asymmetric problem, its one step, and its reduced iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework import Measured, claim, common, worst
from paper_checks.framework import pair_families as pairs
from paper_checks.framework.common import (
    Dtype,
    Parts,
    eps,
    frobenius,
    over_time,
    per_dtype,
    singular_values,
    transposed,
)
from paper_checks.framework.families import Regime, at_eta
from paper_checks.framework.pair_families import RANDOM_START, PairFamily, where


def in_eps(
    regimes: Regime | tuple[Regime, ...],
    start: pairs.Start,
    measure: Callable[[PairFamily], Any],
    bound: float,
    label: str = "",
) -> Parts:
    """Return the largest `measure` over the shapes of regimes, in units of eps, per dtype.

    Args:
        regimes: one or several.
        start: the kind of start.
        measure: takes a family and returns numbers in units of 1.
        bound: the upper bound, in units of eps.
        label: what is measured, where a claim measures several numbers.
    """
    regimes = (regimes,) if isinstance(regimes, str) else regimes

    def largest(dtype: Dtype) -> float:
        families = (f for regime in regimes for f in pairs.families(regime, dtype, start))
        return max(float(np.max(measure(f))) for f in families) / eps(dtype)

    return per_dtype(largest, bound, label)


def conditions(f: PairFamily) -> np.ndarray:
    """Return condition numbers of Σ⁻¹UᵀX_0, (b,); it is VᵀΩ for Nyström starts."""
    live = min(f.spectrum.shape[-1], f.x.shape[-1])
    whitened = transposed(f.left) @ np.asarray(f.x[:, 0]) / np.asarray(f.spectrum)[:, :, None]
    values = singular_values(whitened.astype(np.float64))
    return values[:, 0] / values[:, live - 1]


def outside(x: Any, basis: Any) -> np.ndarray:
    """Return ‖(I − QQᵀ)X_t‖_F, Q the basis; projecting twice removes rounding errors."""
    basis = np.asarray(basis)[:, None]
    residual = np.asarray(x)
    for _ in range(2):
        residual = residual - basis @ (transposed(basis) @ residual)
    return frobenius(residual)


def least_live(x: Any, live: int) -> np.ndarray:
    """Return the least of the `live` largest singular values."""
    values = singular_values(x)
    return values[..., min(live, values.shape[-1]) - 1]


def misalignment(f: PairFamily, of_x: bool) -> np.ndarray:
    """Return the part of X_t outside range(A), or of Y_t outside range(Aᵀ), over its rounding.

    The rounding of a step is ‖X_{t+1}‖ + (1−η)·(that of X_t) + η‖A‖‖dual(Y_t)‖.
    """
    factor, other, basis = (f.x, f.y, f.left) if of_x else (f.y, f.x, f.right)
    gap, size = outside(factor, basis), frobenius(factor)
    least = least_live(other, f.spectrum.shape[1])
    dual = np.where(least > 0, f.norm[:, None] / np.where(least > 0, least, 1), 0)
    unit = size[:, 0]
    ratios = [gap[:, 0] / np.maximum(unit, 1e-30)]
    for t in range(1, gap.shape[1]):
        unit = np.maximum(size[:, t], (1 - f.eta) * unit + f.eta * dual[:, t - 1])
        ratios.append(gap[:, t] / unit)
    return np.array(ratios)


@claim(
    "lem-6",
    "X_t = UΦ_t and Y_t = VΨ_t for all t; also under- and over-parametrized",
    hypotheses=where("exact", "under", "over"),
    **RANDOM_START,
)
def lemma_6(start: pairs.Start = "nystrom") -> Measured:
    """Measure Lemma 6, which Theorems 4 and 6 use beyond r = r_A."""
    regimes: tuple[Regime, ...] = ("exact", "under", "over")
    return worst(
        "‖(I − UUᵀ)X_t‖_F and ‖(I − VVᵀ)Y_t‖_F in units of rounding",
        {
            **in_eps(regimes, start, lambda f: misalignment(f, of_x=True), 30.0, "X"),
            **in_eps(regimes, start, lambda f: misalignment(f, of_x=False), 30.0, "Y"),
        },
        rounding=True,
    )


def one_step(regime: Regime, start: pairs.Start) -> Measured:
    """Measure ‖X_1Y_1ᵀ − A‖_F after one step with η = 1.

    Args:
        regime: "exact" or "over".
        start: the kind of start.
    """

    def error(f: PairFamily) -> np.ndarray:
        f = at_eta(f, 1.0)
        product = np.asarray(f.x[:, 1]) @ transposed(f.y[:, 1])
        unit = frobenius(f.x[:, 1]) * frobenius(f.y[:, 1]) + f.norm
        return frobenius(product - np.asarray(f.a)) / unit

    return worst(
        "‖X_1Y_1ᵀ − A‖_F in units of eps·(‖X_1‖_F‖Y_1‖_F + ‖A‖_F)",
        in_eps(regime, start, error, 100.0),
        rounding=True,
    )


@claim("thm-3", "η = 1: X_1Y_1ᵀ = A", hypotheses=where("exact", etas=(1.0,)), **RANDOM_START)
def theorem_3(start: pairs.Start = "nystrom") -> Measured:
    """Theorem 3."""
    return one_step("exact", start)


@claim(
    "thm-6",
    "η = 1, pseudo-inverses (35): X_1Y_1ᵀ = A",
    hypotheses=where("over", etas=(1.0,)),
    **RANDOM_START,
)
def theorem_6(start: pairs.Start = "nystrom") -> Measured:
    """Theorem 6."""
    return one_step("over", start)


@claim("thm-4", "η = 1: Y_1ᵀA†X_1 = I_r", hypotheses=where("under", etas=(1.0,)), **RANDOM_START)
def theorem_4(start: pairs.Start = "nystrom") -> Measured:
    """Theorem 4."""

    def error(f: PairFamily) -> np.ndarray:
        f = at_eta(f, 1.0)
        measure = jax.jit(jax.vmap(nys.optimality.generalized_weak_optimality))
        after = nys.Factors(f.x[:, 1], f.y[:, 1])
        return np.asarray(measure(after, f.left, f.right, f.spectrum)) / f.kappa

    return worst(
        "‖Y_1ᵀA†X_1 − I‖_F in units of eps·κ (A† magnifies rounding by κ)",
        in_eps("under", start, error, 100.0),
        rounding=True,
    )


@claim(
    "def-2",
    "generalized weak optimality YᵀA†X = I_r: the library's measure is ‖YᵀA†X − I‖_F",
    hypotheses="A† by NumPy; random X and Y, which leave the ranges of A and Aᵀ; 60 × 40, r = 5, "
    "r_A = 8, κ = 2 … 1e6, σ_1(A) = 1e-6, 1, 1e6; difference over κ(‖Y‖‖A†‖‖X‖ + √r), for A† "
    "from an SVD is known to eps·κ",
    removes="all of A†",
    instead="NumPy's measure with the pseudo-inverse of the best approximation of rank 4",
    rank=4,
)
def definition_2(rank: int = 8) -> Measured:
    """Definition 2, and the library's reading of it from an SVD of A."""
    f = at_eta(pairs.family("under", 0, "float64", "random"), 1.0)
    rng = np.random.default_rng((common.SEED, 53))
    gaps = []
    for a, left, right, spectrum in zip(f.a, f.left, f.right, f.spectrum, strict=True):
        m, n = a.shape
        x, y = rng.standard_normal((m, 5)), rng.standard_normal((n, 5))
        u, s, vt = np.linalg.svd(np.asarray(a))
        inverse = (vt[:rank].T / s[:rank]) @ u[:, :rank].T
        plain = np.linalg.norm(y.T @ inverse @ x - np.eye(5))
        pair = nys.Factors(jnp.asarray(x), jnp.asarray(y))
        library = nys.optimality.generalized_weak_optimality(pair, left, right, spectrum)
        unit = np.linalg.norm(x) * np.linalg.norm(y) / float(spectrum[-1]) + 5**0.5
        unit *= float(spectrum[0] / spectrum[-1])
        gaps.append(abs(float(library) - plain) / unit)
    return Measured(max(gaps), 1e-13, detail="difference in these units, largest", rounding=True)


@claim(
    "lem-13",
    "every global optimum of (4), X* = U₁Σ₁^{1/2}S, Y* = V₁Σ₁^{1/2}S^{−ᵀ}, is weakly optimal",
    hypotheses="r ≤ r_A; 60 × 40, r_A = 8, r = 1, 3, 5, 8, and 60 × 6, r_A = r = 6; κ = 2, 100, "
    "1e4, geometric and repeated singular values, σ_1(A) = 1e-6, 1, 1e6; X*, Y* by "
    "problems.Asymmetric.optimum, S = I + a random matrix, invertible; allowed 1e-12·κ",
    removes="r ≤ r_A",
    instead="r = 10 > r_A = 8, where X*Y*ᵀ = A has rank 8",
    cases=((60, 40, 8, 10),),
)
def lemma_13(
    cases: tuple[tuple[int, int, int, int], ...] = (
        *((60, 40, 8, rank) for rank in (1, 3, 5, 8)),
        (60, 6, 6, 6),
    ),
) -> Measured:
    """Lemma 13."""
    rng = np.random.default_rng((common.SEED, 50))
    errors = []
    for m, n, true_rank, rank in cases:
        for i, kappa in enumerate((2.0, 1e2, 1e4)):
            for profile in ("geometric", "repeated"):
                spectrum = pairs.UNITS[i] * pairs.spectrum(profile, true_rank, kappa)
                left, right = (np.linalg.qr(rng.standard_normal((k, true_rank)))[0] for k in (m, n))
                x, y = nys.problems.Asymmetric(jnp.asarray((left * spectrum) @ right.T)).optimum(
                    rank
                )
                turn = np.eye(rank) + 0.2 * rng.standard_normal((rank, rank))
                x, y = np.asarray(x) @ turn, np.asarray(y) @ np.linalg.inv(turn).T
                gram = (y.T @ right) @ ((left.T @ x) / spectrum[:, None])
                errors.append(np.linalg.norm(gram - np.eye(rank)) / kappa)
    return Measured(float(max(errors)), 1e-12, detail="‖Y*ᵀA†X* − I‖_F/κ, largest", rounding=True)


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
