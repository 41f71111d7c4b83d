"""Section 3: the asymmetric problem, and its one step."""

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
