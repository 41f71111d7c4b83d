"""Section 3 and Appendix C: the asymmetric problem."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks import common
from paper_checks.claim import Measured, claim, worst
from paper_checks.common import (
    DTYPES,
    PairFamily,
    Regime,
    eps,
    frobenius,
    over_time,
    pair_family,
    singular_values,
)

SIZES = {"exact": "r = r_A = 5", "under": "r = 5, r_A = 8", "over": "r = 8, r_A = 5"}
GRID = "κ = 2 … 1e6 (float32: 2 … 1e3), two kinds of spectrum, ξ = .1, 1, 10"


def where(regime: Regime, etas: str = "η = .1, .5, .9, 1; 32 runs of 12 steps each") -> str:
    """The runs of a claim in words."""
    return f"60 × 40, {SIZES[regime]}, Nyström start X_0 = AΩ, Y_0 = 0; {GRID}, {etas}, float64 and float32"


def products(f: PairFamily) -> np.ndarray:
    """X_tY_tᵀ."""
    return np.einsum("btmr,btnr->btmn", np.asarray(f.x), np.asarray(f.y))


def pair_alignment(f: PairFamily, dtype: str) -> tuple[float, float]:
    """‖(I − UUᵀ)X_t‖_F and ‖(I − VVᵀ)Y_t‖_F in units of rounding."""
    residual = over_time(nys.optimality.residual_space, 0, None)
    live = f.spectrum.shape[1]
    result = []
    for mine, other, basis in ((f.x, f.y, f.left), (f.y, f.x, f.right)):
        rest = np.asarray(residual(mine, basis))
        size = frobenius(mine)
        values = singular_values(other)[..., :live]
        least = values[..., min(live, values.shape[-1]) - 1]
        dual = np.where(least > 0, 1 / np.where(least > 0, least, 1), 0)
        unit = size[:, 0]
        ratio = rest[:, 0] / np.maximum(unit, 1e-30)
        for t in range(1, rest.shape[1]):
            unit = np.maximum(size[:, t], (1 - f.eta) * unit + f.eta * dual[:, t - 1])
            ratio = np.maximum(ratio, rest[:, t] / unit)
        result.append(float(np.max(ratio)) / eps(dtype))
    return result[0], result[1]


@claim(
    "lem-6",
    "X_t = UΦ_t and Y_t = VΨ_t for all t",
    hypotheses=where("exact"),
    removes="the Nyström start",
    instead="both factors small and random (ζ = 1e-3)",
    start="small",
)
def lemma_6(start: Any = "nystrom") -> Measured:
    """Lemma 6."""
    parts = {}
    for dtype in DTYPES:
        x, y = pair_alignment(pair_family("exact", dtype, start), dtype)
        parts |= {f"X_{dtype}": (x, 30.0), f"Y_{dtype}": (y, 30.0)}
    return worst("‖(I − UUᵀ)X_t‖_F and ‖(I − VVᵀ)Y_t‖_F in units of rounding", **parts)


def one_step(regime: Regime, eta: float) -> Measured:
    """‖X_1Y_1ᵀ − A‖_F after one step, in units of the rounding of the product X_1Y_1ᵀ."""
    parts = {}
    for dtype in DTYPES:
        f = common.at_eta(pair_family(regime, dtype), eta)
        residual = jax.vmap(lambda a, x, y: nys.problems.Asymmetric(a).residual(nys.Factors(x, y)))
        unit = frobenius(f.x[:, 1]) * frobenius(f.y[:, 1]) + frobenius(f.a)
        error = np.asarray(residual(f.a, f.x[:, 1], f.y[:, 1])) / unit
        still = np.max(
            np.abs(np.asarray(f.x[:, 1] - f.x[:, 0])) / frobenius(f.x[:, 0])[:, None, None]
        )
        parts[dtype] = (np.max(error) / eps(dtype), 100.0)
        parts[f"X₁_minus_X₀_{dtype}"] = (float(still) / eps(dtype), 30.0)
    return worst(
        "‖X_1Y_1ᵀ − A‖_F/(‖X_1‖‖Y_1‖ + ‖A‖) and ‖X_1 − X_0‖/‖X_0‖, in units of eps", **parts
    )


@claim(
    "thm-3",
    "η = 1: X_1Y_1ᵀ = A",
    hypotheses=where("exact", "η = 1; 8 runs each"),
    removes="η = 1",
    instead="η = 0.9",
    eta=0.9,
)
def theorem_3(eta: float = 1.0) -> Measured:
    """Theorem 3."""
    return one_step("exact", eta)


@claim(
    "thm-6",
    "η = 1, pseudo-inverses (35): X_1Y_1ᵀ = A",
    hypotheses=where("over", "η = 1; 8 runs each"),
    removes="η = 1",
    instead="η = 0.9",
    eta=0.9,
)
def theorem_6(eta: float = 1.0) -> Measured:
    """Theorem 6."""
    return one_step("over", eta)


def weak_after_one_step(eta: float = 1.0, regime: Regime = "under") -> Measured:
    """‖Y_1ᵀA†X_1 − I‖_F, in units of eps·κ (A† magnifies rounding by κ)."""
    parts = {}
    for dtype in DTYPES:
        f = common.at_eta(pair_family(regime, dtype), eta)
        measure = jax.vmap(
            lambda x, y, *rest: nys.optimality.generalized_weak_optimality(nys.Factors(x, y), *rest)
        )
        error = np.asarray(measure(f.x[:, 1], f.y[:, 1], f.left, f.right, f.spectrum))
        parts[dtype] = (np.max(error / f.kappa) / eps(dtype), 100.0)
    return worst("‖Y_1ᵀA†X_1 − I‖_F in units of eps·κ, largest over runs", **parts)


@claim(
    "thm-4",
    "η = 1: Y_1ᵀA†X_1 = I_r",
    hypotheses=where("under", "η = 1; 8 runs each"),
    removes="η = 1",
    instead="η = 0.9",
    eta=0.9,
)
def theorem_4(eta: float = 1.0) -> Measured:
    """Theorem 4."""
    return weak_after_one_step(eta)


@claim(
    "def-2",
    "generalized weak optimality YᵀA†X = I_r: the measure is the ‖YᵀA†X − I‖_F of its definition",
    hypotheses="A† by NumPy; 60 × 40, r = 5, r_A = 8, κ = 2 … 1e6; points are X_1, Y_1 of thm-4 with A† "
    "exact to eps·κ",
    removes="weakly optimal points",
    instead="the points after one step with η = 0.9",
    eta=0.9,
)
def definition_2(eta: float = 1.0) -> Measured:
    """Definition 2."""
    f = common.at_eta(pair_family("under"), eta)
    zero, agree = [], []
    for i in range(len(f.kappa)):
        x, y = f.x[i, 1], f.y[i, 1]
        inverse = np.linalg.pinv(np.asarray(f.a[i]), rcond=1e-10)
        plain = np.linalg.norm(np.asarray(y).T @ inverse @ np.asarray(x) - np.eye(5))
        library = float(
            nys.optimality.generalized_weak_optimality(
                nys.Factors(x, y), f.left[i], f.right[i], f.spectrum[i]
            )
        )
        zero.append(library / f.kappa[i])
        agree.append(abs(library - plain) / f.kappa[i])
    return worst("both over κ", library=(max(zero), 1e-13), library_minus_NumPy=(max(agree), 1e-12))


@claim(
    "lem-13",
    "every global optimum of (4), X* = U₁Σ₁^{1/2}S, Y* = V₁Σ₁^{1/2}S^{−ᵀ}, is weakly optimal",
    hypotheses="r ≤ r_A; 60 × 40, r_A = 8, r = 1, 3, 5, 8, κ = 2, 100, 1e4; X*, Y* by problems.Asymmetric.optimum, S = I + a random matrix, invertible; allowed 1e-12·κ",
    removes="r ≤ r_A",
    instead="r = 10 > r_A = 8, where X*Y*ᵀ = A has rank 8 only",
    ranks=(10,),
)
def lemma_13(ranks: tuple[int, ...] = (1, 3, 5, 8)) -> Measured:
    """Lemma 13."""
    rng = np.random.default_rng((common.SEED, 50))
    errors = []
    for kappa in (2.0, 1e2, 1e4):
        spectrum = common.spectrum("geometric", 8, kappa)
        a, left, right = nys.spectra.rectangular(common.key(51), common.M, common.N, spectrum)
        for rank in ranks:
            turn = np.eye(rank) + 0.2 * rng.standard_normal((rank, rank))
            x, y = nys.problems.Asymmetric(a).optimum(rank)
            pair = nys.Factors(x @ turn, y @ np.linalg.inv(turn).T)
            weak = nys.optimality.generalized_weak_optimality(pair, left, right, spectrum)
            errors.append(float(weak) / kappa)
    return Measured(max(errors), 1e-12, detail="‖Y*ᵀA†X* − I‖_F/κ, largest")


@claim(
    "eq-30",
    "Φ_{t+1} = (1−η)Φ_t + ηΣΨ_t^{−ᵀ}, Ψ_{t+1} = (1−η)Ψ_t + ηΣΦ_t^{−ᵀ} for t ≥ 1",
    hypotheses=where("exact"),
    removes="the Nyström start",
    instead="both factors small and random (ζ = 1e-3)",
    start="small",
)
def equation_30(start: Any = "nystrom") -> Measured:
    """(30a), (30b)."""
    parts = {}
    for dtype in DTYPES:
        f = pair_family("exact", dtype, start)
        phi, psi = f.phi[:, 1:], f.psi[:, 1:]
        eta = jnp.asarray(f.eta, phi.dtype)
        step = over_time(
            lambda p, q, s, e: nys.dynamics.pair_step(nys.Factors(p, q), s, e), 0, 0, None, None
        )
        new = step(phi[:, :-1], psi[:, :-1], f.spectrum, eta)
        for name, value, expected, other in (("Φ", phi, new.left, psi), ("Ψ", psi, new.right, phi)):
            unit = frobenius(value[:, 1:]) + 1 / singular_values(other[:, :-1])[..., -1]
            gap = frobenius(value[:, 1:] - expected) / unit
            parts[f"{name}_{dtype}"] = (np.max(gap) / eps(dtype), 100.0)
    return worst("difference in units of eps·(‖left side‖ + ‖inverse‖)", **parts)


def pair_cores(f: PairFamily) -> np.ndarray:
    """Φ_tΨ_tᵀ, t ≥ 1."""
    return np.einsum("btkr,btlr->btkl", np.asarray(f.phi), np.asarray(f.psi))[:, 1:]


@claim(
    "eq-31",
    "Φ_1Ψ_1ᵀ = ηΣ, and Φ_tΨ_tᵀ is symmetric positive definite for t ≥ 1",
    hypotheses=where("exact"),
    removes="the Nyström start",
    instead="both factors small and random (ζ = 1e-3)",
    start="small",
)
def equation_31(start: Any = "nystrom") -> Measured:
    """(31) and the first step of the proof of Corollary 1."""
    parts = {}
    for dtype in DTYPES:
        f = pair_family("exact", dtype, start)
        core = pair_cores(f)
        sigma = np.asarray(f.spectrum)[:, :, None] * np.eye(5)
        unit = (frobenius(f.phi) * frobenius(f.psi))[:, 1:]
        base = frobenius(core[:, 0] - f.eta[:, None, None] * sigma) / unit[:, 0]
        skew = frobenius(core - np.swapaxes(core, -1, -2)) / unit
        whitened = core / np.sqrt(np.asarray(f.spectrum))[:, None, :, None]
        whitened = whitened / np.sqrt(np.asarray(f.spectrum))[:, None, None, :]
        least = np.linalg.eigvalsh((whitened + np.swapaxes(whitened, -1, -2)) / 2)[..., 0]
        parts[f"base_{dtype}"] = (np.max(base) / eps(dtype), 100.0)
        parts[f"skew_{dtype}"] = (np.max(skew) / eps(dtype), 100.0)
        # D = Σ^{-1/2}ΦΨᵀΣ^{-1/2} is c_t I, with c_1 = η and c_t > η/2 ever after.
        parts[f"η_over_2λ_min_{dtype}"] = (np.max(f.eta[:, None] / (2 * np.abs(least))), 1.0)
    return worst(
        "‖Φ_1Ψ_1ᵀ − ηΣ‖_F and skewness in units of eps·‖Φ_t‖‖Ψ_t‖, and η/(2λ_min(D_t))", **parts
    )


@claim(
    "eq-32",
    "B_{t+1} = (1−η)²B_t + 2η(1−η)Σ + η²ΣB_t^{−1}Σ with B = ΦΨᵀ, t ≥ 1: (12) again",
    hypotheses=where("exact"),
    removes="the Nyström start",
    instead="both factors small and random (ζ = 1e-3)",
    start="small",
)
def equation_32(start: Any = "nystrom") -> Measured:
    """(32)."""
    parts = {}
    for dtype in DTYPES:
        f = pair_family("exact", dtype, start)
        core = jnp.asarray(pair_cores(f))
        eta = jnp.asarray(f.eta, core.dtype)
        new = over_time(nys.dynamics.core_step, 0, None, None)(core[:, :-1], f.spectrum, eta)
        values = singular_values(core[:, :-1])
        size = (frobenius(f.phi) * frobenius(f.psi))[:, 1:]
        unit = values[..., 0] / values[..., -1] * (size[:, 1:] + size[:, :-1] + 1)
        parts[dtype] = (np.max(frobenius(core[:, 1:] - new) / unit) / eps(dtype), 20.0)
    return worst("difference in units of eps·cond(B_t)·(‖Φ‖‖Ψ‖ + 1)", **parts)


@claim(
    "eq-35",
    "with pseudo-inverses (35) needs no case for Y_0 = 0: X_1 = X_0, and Y_1 = ηAᵀ(X_0†)ᵀ",
    hypotheses=where("over", "η = .1, .5, .9, 1; 32 runs each"),
    removes="Y_0 = 0",
    instead="both factors small and random (ζ = 1e-3)",
    start="small",
)
def equation_35(start: Any = "nystrom") -> Measured:
    """(35) at t = 0, against NumPy's pseudo-inverse."""
    parts = {}
    for dtype in DTYPES:
        f = pair_family("over", dtype, start)
        a, x, y = (np.asarray(v) for v in (f.a, f.x, f.y))
        moved = frobenius(x[:, 1] - x[:, 0]) / frobenius(x[:, 0])
        dual = np.swapaxes(np.linalg.pinv(x[:, 0].astype(np.float64), rcond=30 * eps(dtype)), 1, 2)
        expected = f.eta[:, None, None] * np.swapaxes(a, 1, 2) @ dual
        unit = frobenius(expected) + f.eta * frobenius(dual)
        gap = frobenius(y[:, 1] - expected) / unit
        parts[f"X_{dtype}"] = (np.max(moved) / eps(dtype), 30.0)
        parts[f"Y_{dtype}"] = (np.max(gap) / eps(dtype), 1e3)
    return worst("‖X_1 − X_0‖/‖X_0‖, and Y_1 in units of eps·(‖Y_1‖ + η‖X_0†‖)", **parts)


def corollary(etas: tuple[float, float], steps: int, start: Any = "nystrom") -> Any:
    """‖X_tY_tᵀ − A‖_F: `steps` of the first η, then 12 of the second; κ = 2, 3, 4."""
    kappas = np.repeat([2.0, 3.0, 4.0], 2)
    spectra = np.array(
        [common.spectrum(("geometric", "last")[i % 2], 5, k) for i, k in enumerate(kappas)]
    )
    a, _, _, factors = common._pair_problems(
        common.keys(6, 52), common.keys(6, 53), spectra, np.ones(6), 5, start
    )
    norm = np.linalg.norm(spectra, axis=1)
    first = 1 / (kappas**3 * norm) if etas[0] == 0 else np.full(6, etas[0])
    curve, factors = _pair_curves(a, factors, first, steps)
    tail, _ = _pair_curves(a, factors, np.full(6, etas[1]), 12)
    return np.asarray(curve), np.asarray(tail), kappas


def _pair_curves_impl(a: Any, factors: Any, eta: Any, steps: int) -> Any:
    def one(a: Any, factors: Any, eta: Any) -> Any:
        problem = nys.problems.Asymmetric(a)
        step = nys.solvers.scaled_step(problem, eta)
        solution = nys.solvers.run(step, factors, steps, problem.residual)
        return solution.history, solution.params

    return jax.vmap(one)(a, factors, eta)


_pair_curves = jax.jit(_pair_curves_impl, static_argnums=3)


@claim(
    "cor-1-phase1",
    "η = O(1/(κ³‖A‖_F)): ‖X_tY_tᵀ − A‖_F ≤ O(1/κ²) after O(κ³√r log κ) steps",
    hypotheses="60 × 40, r = r_A = 5, Nyström start, any ξ; κ = 2, 3, 4, two kinds of spectrum, η = 1/(κ³‖A‖_F), T₁ = ⌈log(9κ²‖A‖_F)/η⌉ steps: the log 9 is for σ_r(B_1) = ησ_r(Σ), which no ξ can raise",
    removes="the Nyström start and η < 1",
    instead="a small random start and η = 1, where one step does not reach A",
    eta=1.0,
    start="small",
)
def corollary_1_phase_1(eta: float = 0.0, start: Any = "nystrom") -> Measured:
    """Corollary 1, first phase."""
    curve, _, kappa = corollary((eta, 0.5), 600, start)
    norm = curve[:, 0] if start == "nystrom" else np.full(6, 2.0)
    paper_eta = 1 / (kappa**3 * norm)
    steps = np.minimum(np.ceil(np.log(9 * kappa**2 * norm) / paper_eta).astype(int), 600)
    final = curve[np.arange(6), steps]
    return Measured(
        float(np.max(final * kappa**2)),
        1.0,
        detail="κ²‖X_tY_tᵀ − A‖_F at t = T₁, largest",
        facts={
            "T₁ at κ = 4": float(np.max(steps)),
            "steps/(κ³√r log κ)": float(np.max(steps / (kappa**3 * 5**0.5 * np.log(kappa)))),
        },
    )


@claim(
    "cor-1-phase2",
    "η = 1/2 after phase 1: ‖X_tY_tᵀ − A‖_F ≤ (4/(3κ²)) 2^{−2^t}",
    hypotheses="60 × 40, r = r_A = 5, Nyström start; κ = 2, 3, 4, two kinds of spectrum; 600 steps with η = 1/(κ³‖A‖_F), then η = 1/2",
    removes="the Nyström start",
    instead="both factors small and random (ζ = 1e-3), 20 steps before the count begins",
    start="small",
)
def corollary_1_phase_2(start: Any = "nystrom") -> Measured:
    """Corollary 1, second phase."""
    steps = 600 if start == "nystrom" else 20
    _, curve, kappa = corollary((0.0 if start == "nystrom" else 0.5, 0.5), steps, start)
    t = np.arange(curve.shape[1])
    bound = (4 / (3 * kappa**2))[:, None] * 2.0 ** -(2.0**t) + 1e-13
    return Measured(float(np.max(curve / bound)), 1.0, detail="error over (bound + 1e-13), largest")


FACTORIZATIONS = ("cholesky", "svd", "eigh", "eig", "lu", "geqrf", "householder_product", "qr")


def largest_factorized(jaxpr: Any) -> int:
    """The longest side of any matrix that is factored in a jaxpr."""
    sides = [0]
    for equation in jaxpr.eqns:
        if equation.primitive.name in FACTORIZATIONS:
            sides += [max(v.aval.shape[-2:]) for v in equation.invars if hasattr(v, "aval")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                sides.append(largest_factorized(getattr(inner, "jaxpr", inner)))
    return max(sides)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


@claim(
    "rem-1",
    "one step of (6) with η = 1 factors A by products with A and factorizations of r × r matrices only",
    hypotheses="60 × 40, r = 5; read off the traced program of one step: the longest side of any matrix that is factored",
    removes="the ScaledGD step",
    instead="the factorization by an SVD of A (problems.Asymmetric.optimum)",
    svd=True,
)
def remark_1(svd: bool = False) -> Measured:
    """Remark 1 and A.5: the work of the step, not its time."""
    f = common.at_eta(pair_family("exact"), 1.0)
    problem = nys.problems.Asymmetric(f.a[0])
    factors = nys.Factors(f.x[0, 0], f.y[0, 0])
    if svd:
        traced = jax.make_jaxpr(lambda p: p.optimum(5))(problem)
    else:
        step = nys.solvers.scaled_step(problem, 1.0)
        state = step.init(factors)
        traced = jax.make_jaxpr(step.update)(state)
    side = largest_factorized(traced.jaxpr)
    if side == 0:
        raise ValueError("no factorization found in the traced program; the names have changed")
    return Measured(side, 5, detail="longest side of a factored matrix; r = 5, m = 60, n = 40")
