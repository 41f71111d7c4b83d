"""Table 1: the rows of other papers, as upper bounds.

The bounds of the table are for worst cases, with constants that it leaves out. The constants here
are this project's, and the sizes are small. A bound that holds here need not be tight; the report
says by how much the measured powers of κ are smaller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nyscaled as nys
from paper_checks.claims.table1 import (
    RANK,
    SEEDS,
    SIZES,
    Instance,
    M,
    counts,
    power,
    spectrum,
    steps_of,
)
from paper_checks.framework import Measured, claim, worst

CAP = 20_000


def over_bound(steps: np.ndarray, bounds: Any) -> float:
    """Return the largest count over its bound, (κ, SEEDS) over (κ,)."""
    return float(np.max(steps / np.asarray(bounds)[:, None]))


@claim(
    "table1-gd-asymmetric",
    "“GD, small, O(κ⁴ + κ⁴ log 1/ε)”, asymmetric EP (Ye, Du 2021), as an upper bound: at most "
    "10κ⁴(1 + log 1/ε) iterations to ‖XYᵀ − A‖_F ≤ ε‖A‖",
    source="literature",
    hypotheses=f"{SIZES}; r = 3, η = 0.3, entries N(0, 1e-6); κ = 1, 2, 4, 8, ε = 1e-3, 1e-6",
    removes="a small start",
    instead=f"entries N(0, 4); at most {CAP} iterations",
    scale=2.0,
)
def gd_asymmetric(scale: float = 1e-3) -> Measured:
    """Measure the row; the power of κ is far below 4."""
    kappas, tolerances = np.array((1.0, 2.0, 4.0, 8.0)), (1e-3, 1e-6)
    steps = counts(_gd_asymmetric, kappas, tolerances, [scale])[:, :, 0]
    ratios = [
        over_bound(steps[:, i], 10 * kappas**4 * (1 + np.log(1 / tol)))
        for i, tol in enumerate(tolerances)
    ]
    facts = {"power of κ from κ = 2": power((2.0, 4.0, 8.0), steps[1:, 1])}
    return Measured(max(ratios), 1.0, detail="iterations over the bound, largest", facts=facts)


def _gd_asymmetric(kappa: Any, tol: Any, scale: Any, instance: Instance) -> Any:
    problem = nys.problems.Asymmetric((instance.left * spectrum(kappa)) @ instance.right.T)
    start = nys.initializers.small_factors(instance.key, problem.a.shape, RANK, scale)
    step = nys.solvers.gradient_step(problem, optax.sgd(0.3))
    return steps_of(step, start, problem.residual, tol, CAP)


@claim(
    "table1-gd-symmetric",
    "“GD, small, O(κ⁸ + κ² log 1/ε)” (EP) and “O(κ⁸ + κ⁶ log κ/ε)” (OP), symmetric (Stöger, "
    "Soltanolkotabi 2021), as upper bounds with the constant 10",
    source="literature",
    hypotheses=f"{M} × {M}, r_A = {RANK}, {SEEDS} seeds; factorization, not the sensing of that "
    "paper; r = 3, 6, η = 0.3, entries N(0, 1e-8); κ = 1, 2, 4, 8, ε = 1e-3, 1e-6",
    removes="a small start",
    instead=f"entries N(0, 4); at most {CAP} iterations",
    scale=2.0,
)
def gd_symmetric(scale: float = 1e-4) -> Measured:
    """Measure both rows: r = r_A and r > r_A."""
    kappas, tolerances = np.array((1.0, 2.0, 4.0, 8.0)), (1e-3, 1e-6)
    ratios, facts = {}, {}
    for name, rank in (("EP", 3), ("OP", 6)):
        steps = counts(_gd_symmetric(rank), kappas, tolerances, [scale])[:, :, 0]
        of_rank = []
        for i, tol in enumerate(tolerances):
            linear = kappas**2 * np.log(1 / tol) if rank == 3 else kappas**6 * np.log(kappas / tol)
            of_rank.append(over_bound(steps[:, i], 10 * (kappas**8 + linear)))
        ratios[name] = (max(of_rank), 1.0)
        facts[f"power of κ from κ = 2, {name}"] = power((2.0, 4.0, 8.0), steps[1:, 1])
    result = worst("iterations over the bound, largest", ratios)
    return Measured(result.measured, 1.0, detail=result.detail, facts=facts)


@functools.cache
def _gd_symmetric(rank: int) -> Callable[..., Any]:
    def count(kappa: Any, tol: Any, scale: Any, instance: Instance) -> Any:
        problem = nys.problems.Symmetric((instance.left * spectrum(kappa)) @ instance.left.T)
        start = nys.initializers.small(instance.key, M, rank, scale)
        step = nys.solvers.gradient_step(problem, optax.sgd(0.3))
        return steps_of(step, start, problem.residual, tol, CAP)

    return count


@claim(
    "table1-altgd",
    "“AltGD, special, O(κ² log 1/ε)”, EP and OP (Ward, Kolda 2023), as an upper bound: the "
    "count to ‖XYᵀ − A‖_F ≤ 1e-6‖A‖ grows at most like κ², and from ε = 1e-3 to 1e-6 by at "
    "most the factor 2.5",
    source="literature",
    hypotheses=f"{SIZES}; r = 3, 6, the start and the step size of that paper; κ = 4, 8, 16, "
    "slopes by least squares",
    removes="a step size independent of κ",
    instead="that step size over κ",
    divided=True,
)
def altgd(divided: bool = False) -> Measured:
    """Alternating gradient descent."""
    kappas = (4.0, 8.0, 16.0)
    powers, factors, facts = [], [], {}
    for name, rank in (("EP", 3), ("OP", 6)):
        steps = counts(_altgd(rank), kappas, (1e-3, 1e-6), [divided])[:, :, 0]
        powers.append(power(kappas, steps[:, 1]))
        factors.append(np.max(steps[:, 1] / steps[:, 0]))
        facts[f"power of κ, {name}"] = powers[-1]
    result = worst(
        "the larger of EP and OP", {"power of κ": (max(powers), 2.0), "factor": (max(factors), 2.5)}
    )
    return Measured(result.measured, 1.0, detail=result.detail, facts=facts)


@functools.cache
def _altgd(rank: int) -> Callable[..., Any]:
    def count(kappa: Any, tol: Any, divided: Any, instance: Instance) -> Any:
        problem = nys.problems.Asymmetric((instance.left * spectrum(kappa)) @ instance.right.T)
        start = nys.initializers.altgd(instance.key, problem.a, rank, 1.0)
        rate = nys.solvers.altgd_learning_rate(1.0) / kappa**divided
        step = nys.solvers.alternating_step(problem, optax.sgd(rate))
        return steps_of(step, start, problem.residual, tol, 200_000)

    return count


@claim(
    "table1-scaled-local",
    "“ScaledGD, local, O(log 1/ε)”, asymmetric EP (Tong, Ma, Chi 2021): at most 2 log2 1/ε "
    "iterations to ‖XYᵀ − A‖_F ≤ εσ_r(A), for each κ",
    source="literature",
    hypotheses=f"{SIZES}; r = 3, η = 1/2, starts at a distance ‖ΔΣ^{{1/2}}‖_F of about 0.2σ_r(A) "
    "from balanced factors of A; κ = 1, 1e2, 1e4, ε = 1e-4, 1e-8",
    removes="the preconditioner",
    instead="gradient descent with the same η and starts, at most 1,000 iterations",
    preconditioned=False,
)
def scaled_local(preconditioned: bool = True) -> Measured:
    """Measure the row that the paper improves on: its start must be near the optimum."""
    kappas, tolerances = (1.0, 1e2, 1e4), (1e-4, 1e-8)

    def count(kappa: Any, tol: Any, instance: Instance) -> Any:
        left, right, key = instance
        sigma = spectrum(kappa)
        problem = nys.problems.Asymmetric((left * sigma) @ right.T)
        away = nys.initializers.small_factors(key, problem.a.shape, RANK, 1.0)
        truth = nys.Factors(left * jnp.sqrt(sigma), right * jnp.sqrt(sigma))
        size = 0.1 * sigma[-1] / jnp.sqrt(sigma)
        start = jax.tree.map(lambda f, e: f + size * e / len(e) ** 0.5, truth, away)
        tx = nys.scaled_gd(0.5) if preconditioned else optax.sgd(0.5)
        step = nys.solvers.gradient_step(problem, tx)
        return steps_of(step, start, problem.residual, tol / kappa, 1_000)

    steps = counts(count, kappas, tolerances)
    ratios = [np.max(steps[:, i]) / (2 * np.log2(1 / tol)) for i, tol in enumerate(tolerances)]
    facts = {
        f"iterations to 1e-8 at κ = {kappa:g}": float(np.max(of_seeds))
        for kappa, of_seeds in zip(kappas, steps[:, 1], strict=True)
    }
    return Measured(max(ratios), 1.0, detail="iterations over the bound, largest", facts=facts)


@claim(
    "table1-lambda",
    "“ScaledGD-λ, small, O(log² κ + log 1/ε)”, symmetric OP (Xu, Shen, Chi, Ma 2023): at most "
    "5(1 + log² κ + log 1/ε) iterations to ‖XXᵀ − A‖_F ≤ ε‖A‖",
    source="literature",
    hypotheses=f"{M} × {M}, r_A = {RANK}, {SEEDS} seeds; factorization, not the sensing of that "
    "paper; r = 6, η = 1/2, λ = 0.1σ_r(A), entries N(0, 1e-12); κ = 1, 10, … 1e4, ε = 1e-8",
    removes="λ in proportion to σ_r(A)",
    instead="λ = 0.1 for each κ; at most 20,000 iterations",
    fixed=True,
)
def scaled_lambda(fixed: bool = False) -> Measured:
    """Measure the row; with damping the last phase is linear."""
    kappas = (1.0, 1e1, 1e2, 1e3, 1e4)
    steps = counts(_scaled_lambda, kappas, [not fixed])[:, 0]
    bounds = 5 * (1 + np.log(kappas) ** 2 + np.log(1e8))
    facts = {
        f"iterations at κ = {k:g}": float(np.max(s)) for k, s in zip(kappas, steps, strict=True)
    }
    return Measured(
        over_bound(steps, bounds), 1.0, detail="iterations over the bound, largest", facts=facts
    )


def _scaled_lambda(kappa: Any, proportional: Any, instance: Instance) -> Any:
    problem = nys.problems.Symmetric((instance.left * spectrum(kappa)) @ instance.left.T)
    start = nys.initializers.small(instance.key, M, 2 * RANK, 1e-6)
    step = nys.solvers.scaled_step(problem, 0.5, 0.1 / kappa**proportional)
    return steps_of(step, start, problem.residual, 1e-8, CAP)


@claim(
    "table1-gd-under",
    "“GD, small, asymptotic”, asymmetric UP (Du, Hu, Lee 2018): GD ends at a global optimum; "
    "‖XYᵀ − A‖_F is within 1e-6 of the least possible of rank r",
    source="literature",
    hypotheses=f"{SIZES}; A diagonal; r = 2, κ = 4, η = 0.3, entries N(0, 1e-6), 2,000 iterations",
    removes="a start that sees all of A",
    instead="the same start with the first row of both factors zero, where A has its largest entry",
    blind=True,
)
def gd_under(blind: bool = False) -> Measured:
    """Measure the limit; the row states no rate."""
    return Measured(
        float(np.max(counts(_error_under, [blind]))),
        1e-6,
        detail="error over that of the best rank 2, less 1, largest",
        rounding=True,
    )


def _error_under(blind: Any, instance: Instance) -> Any:
    sigma, shape = spectrum(4.0), (len(instance.left), len(instance.right))
    # Rotating A rotates the iterates. With a diagonal A, a zero row stays exactly zero.
    problem = nys.problems.Asymmetric(jnp.eye(shape[0], RANK) * sigma @ jnp.eye(RANK, shape[1]))
    start = nys.initializers.small_factors(instance.key, shape, 2, 1e-3)
    start = jax.tree.map(lambda f: f.at[0].multiply(1 - blind), start)
    step = nys.solvers.gradient_step(problem, optax.sgd(0.3))
    last = nys.solvers.run(step, start, 2_000).params
    return problem.residual(last) / sigma[2] - 1


@claim(
    "table1-modified",
    "modified gradient descent (Xiong, Ding, Du 2024), over-parametrized: the count does not "
    "depend on the scale α of its start",
    source="literature",
    hypotheses="24 × 18, r = 6, r_A = 3, κ = 2, α = 0.1, 0.05, 0.025, 0.0125 for X_0 and α/3 for "
    "Y_0, η = 0.3, β² = 1/2, refactored after 60 steps; 3 seeds, to 1e-4",
    removes="the refactoring",
    instead=f"plain gradient descent, whose rate is α²; at most {CAP} iterations",
    refactor_step=-1,
)
def modified(refactor_step: int = 60) -> Measured:
    """Measure that refactoring removes the dependence on the scale of the start."""
    scales = (0.1, 0.05, 0.025, 0.0125)
    steps = counts(_modified, [(2.0, 0.3, refactor_step)], scales)[0]
    return Measured(
        float(np.max(steps.max(axis=0) / steps.min(axis=0))),
        1.5,
        detail="most steps over least, over α, largest over seeds",
        facts={"steps at α = 0.0125": float(np.median(steps[-1]))},
    )


def _modified(setting: Any, scale: Any, instance: Instance) -> Any:
    """Return iterations of modified GD to 1e-4, β² = 1/κ, for (κ, η, step of the refactoring)."""
    kappa, rate, refactor_step = setting
    problem = nys.problems.Asymmetric((instance.left * spectrum(kappa)) @ instance.right.T)
    x, y = nys.initializers.small_factors(instance.key, problem.a.shape, 6, 1.0)
    step = nys.solvers.modified_step(
        problem, optax.sgd(rate), refactor_step.astype(int), kappa**-0.5
    )
    start = nys.Factors(scale * x, scale / 3 * y)
    return steps_of(step, start, problem.residual, 1e-4, CAP)


@claim(
    "table1-modified-rate",
    "“modified GD, small, O(κ² log 1/ε)”, asymmetric OP (Xiong, Ding, Du 2024), as an upper "
    "bound: at most 20κ²(1 + log 1/ε) iterations to ‖XYᵀ − A‖_F ≤ ε‖A‖",
    source="literature",
    hypotheses=f"{SIZES}; factorization, not the sensing of that paper; r = 6, α = 0.0125, η = "
    "1/(2κ), β² = 1/κ, refactored after 40κ² steps; κ = 2, 4, 8, ε = 1e-4",
    removes="the refactoring",
    instead="plain gradient descent, at most 20,000 iterations",
    modified=False,
)
def modified_rate(modified: bool = True) -> Measured:
    """Measure the row's κ², with the step size that β² = σ_r(A) allows."""
    kappas = np.array((2.0, 4.0, 8.0))
    refactor_steps = 40 * kappas**2 if modified else -np.ones(3)
    settings = np.stack([kappas, 0.5 / kappas, refactor_steps], axis=1)
    steps = counts(_modified, settings, [0.0125])[:, 0]
    return Measured(
        over_bound(steps, 20 * kappas**2 * (1 + np.log(1e4))),
        1.0,
        detail="iterations over the bound, largest",
        facts={"power of κ": power(tuple(kappas), steps)},
    )


@claim(
    "table1-nesterov",
    "Nesterov's method from X_0 = AΩ large, Y_0 = 0 (Xu et al. 2024): iterations grow at most "
    "like κ",
    source="literature",
    hypotheses="24 × 18, r_A = 3, r = 9, ξ = 20, η and the momentum of X_0's singular values; κ "
    "= 5, 10, 20, 40, 3 seeds, to 1e-4; the power of κ, by least squares",
    removes="the momentum",
    instead="the same step without it",
    momentum=False,
)
def nesterov(momentum: bool = True) -> Measured:
    """Measure O(κ log 1/ε), against κ² without momentum."""
    kappas = (5.0, 10.0, 20.0, 40.0) if momentum else (5.0, 10.0, 20.0)

    def count(kappa: Any, instance: Instance) -> Any:
        a = (instance.left * spectrum(kappa)) @ instance.right.T
        problem = nys.problems.Asymmetric(a)
        start = nys.initializers.nystrom_factors(instance.key, a, 3 * RANK, 20.0)
        rate, beta = nys.solvers.nesterov_parameters(start.left)
        tx = optax.sgd(rate, beta if momentum else None, nesterov=momentum)
        return steps_of(
            nys.solvers.gradient_step(problem, tx), start, problem.residual, 1e-4, 50_000
        )

    steps = counts(count, kappas)
    return Measured(
        power(kappas, steps),
        1.15,
        detail="power of κ",
        facts={"steps at κ = 20": float(np.median(steps[2]))},
    )
