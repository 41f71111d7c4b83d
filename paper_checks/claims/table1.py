"""Table 1: the rows of the paper, and the functions that all rows share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nyscaled as nys
from paper_checks.framework import Measured, claim, common, worst

M, N, RANK, SEEDS = 24, 18, 3, 3
KAPPAS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
SIZES = f"{M} × {N}, r_A = {RANK}, geometric singular values from 1 to 1/κ, {SEEDS} seeds"


class Instance(NamedTuple):
    """Singular vectors, U (M, RANK) and V (N, RANK), and the key of the start."""

    left: Any
    right: Any
    key: Any


@functools.cache
def instances() -> Instance:
    """Return one instance per seed."""
    keys = common.keys(SEEDS, 100)
    make = jax.jit(jax.vmap(lambda key: nys.spectra.rectangular(key, M, N, jnp.ones(RANK))[1:]))
    return Instance(*make(keys), key=jax.vmap(jax.random.fold_in, (0, None))(keys, 1))


def spectrum(kappa: Any) -> Any:
    """Return singular values from 1 to 1/κ."""
    return kappa ** -jnp.linspace(0.0, 1.0, RANK)


def counts(count: Callable[..., Any], *axes: Any) -> np.ndarray:
    """Return `count(value, …, instance)` over the values of each axis and the seeds.

    Args:
        count: takes a value of each axis and an instance; see `common.over_grid`.
        *axes: the values of each axis.
    """
    values = (np.asarray(axis, float) for axis in axes)
    return common.over_grid(count, *values, instances()).astype(float)


def power(values: tuple[float, ...], steps: np.ndarray) -> float:
    """Return the slope of log steps in log values, by least squares over all seeds."""
    x = np.broadcast_to(np.log(values)[:, None], steps.shape)
    return float(np.polyfit(x.ravel(), np.log(steps).ravel(), 1)[0])


def steps_of(step: Any, start: Any, measure: Callable[[Any], Any], tol: Any, cap: int) -> Any:
    """Return iterations to measure ≤ tol; `cap` for a run that does not reach it.

    Args:
        step: an iteration of `nys.solvers`.
        start: its first factors.
        measure: a number of the factors.
        tol: the tolerance.
        cap: the most iterations.
    """
    solution = nys.solvers.run_until(step, start, lambda x: measure(x) / tol, 1.0, cap)
    return jnp.where(solution.status == nys.solvers.Status.CONVERGED, solution.num_steps, cap)


@claim(
    "table1-asymmetric",
    "“ScaledGD, Nyström, O(1)”, EP, OP and UP: one iteration of (6) or (35) with η = 1 reaches "
    "‖XYᵀ − A‖_F ≤ 1e-8‖A‖ (r ≥ r_A) or ‖YᵀA†X − I‖_F ≤ 1e-8 (r < r_A)",
    hypotheses=f"{SIZES}; r = 3, 6, 2; κ = 10 … 1e6",
    removes="the Nyström start",
    instead="a random X_0, also with Y_0 = 0",
    random=True,
)
def asymmetric(random: bool = False) -> Measured:
    """Count the rows of Theorems 3, 4 and 6."""
    most = [np.max(counts(_asymmetric(rank), KAPPAS, [random])) for rank in (3, 6, 2)]
    facts = {name: float(count) for name, count in zip(("EP", "OP", "UP"), most, strict=True)}
    return Measured(float(max(most)), 1, detail="iterations, largest", facts=facts)


@functools.cache
def _asymmetric(rank: int) -> Callable[..., Any]:
    def count(kappa: Any, random: Any, instance: Instance) -> Any:
        sigma = spectrum(kappa)
        problem = nys.problems.Asymmetric((instance.left * sigma) @ instance.right.T)
        x0, y0 = nys.initializers.nystrom_factors(instance.key, problem.a, rank)
        x0 = jnp.where(random > 0, jax.random.normal(instance.key, x0.shape), x0)

        def weak(f: nys.Factors) -> Any:
            return nys.optimality.generalized_weak_optimality(
                f, instance.left, instance.right, sigma
            )

        measure = problem.residual if rank >= RANK else weak
        step = nys.solvers.scaled_step(problem, 1.0)
        return steps_of(step, nys.Factors(x0, y0), measure, 1e-8, 10)

    return count


@claim(
    "table1-symmetric",
    "“ScaledGD, Nyström, O(κ³ + log log 1/ε)”, EP and OP, as an upper bound: with η = 1/2 the "
    "count to ‖XXᵀ − A‖_F ≤ ε‖A‖ grows by at most ½ for each doubling of κ (ε = 1e-8), and at "
    "κ = 10 by at most 2 from ε = 1e-4 to 1e-8",
    hypotheses=f"{M} × {M}, r_A = {RANK}, {SEEDS} seeds; (2) and (26), r = 3, 6, ξ = 0.1; κ = 10 "
    "… 1e6, slope by least squares (control: κ = 10, 20, 40)",
    removes="the preconditioner",
    instead="gradient descent with η = 1/4 from the same starts, at most 10,000 iterations",
    preconditioned=False,
)
def symmetric(preconditioned: bool = True) -> Measured:
    """Count the rows of Theorems 1 and 5."""
    kappas = KAPPAS if preconditioned else (10.0, 20.0, 40.0)
    doublings = np.broadcast_to(np.log2(kappas)[:, None], (len(kappas), SEEDS)).ravel()
    growth, extra = [], []
    for rank in (3, 6):
        steps = counts(_symmetric(rank, preconditioned), kappas, (1e-4, 1e-8))
        growth.append(np.polyfit(doublings, steps[:, 1].ravel(), 1)[0])
        extra.append(np.max(steps[0, 1] - steps[0, 0]))
    return worst(
        "iterations, the larger of EP and OP",
        {"for each doubling of κ": (max(growth), 0.5), "from ε = 1e-4 to 1e-8": (max(extra), 2)},
    )


@functools.cache
def _symmetric(rank: int, preconditioned: bool) -> Callable[..., Any]:
    def count(kappa: Any, tol: Any, instance: Instance) -> Any:
        root = instance.left * jnp.sqrt(spectrum(kappa))
        problem = nys.problems.Symmetric(root @ root.T)
        start = nys.initializers.nystrom(instance.key, problem.a, rank, 0.1)
        if preconditioned:
            step, cap = nys.solvers.scaled_step(problem, 0.5), 100
        else:
            step, cap = nys.solvers.gradient_step(problem, optax.sgd(0.25)), 10_000
        return steps_of(step, start, problem.residual, tol, cap)

    return count


@claim(
    "table1-symmetric-under",
    "“ScaledGD, Nyström, O(1/ε · log 1/ε)”, UP, as an upper bound: with η = ε/(6r) the count "
    "to ‖XᵀA†X − I‖_F ≤ ε, divided by log 1/ε, grows at most like (1/ε)^1.1",
    hypotheses=f"{M} × {M}, r_A = {RANK}, r = 2, κ = 100, ξ = 1, {SEEDS} seeds; ε = 0.2, 0.1, "
    "0.05, 0.025, slope by least squares",
    removes="η in proportion to ε",
    instead="η = ε²/(6r)",
    exponent=2,
)
def symmetric_under(exponent: int = 1) -> Measured:
    """Count the row of Theorem 2."""
    accuracies = np.array((0.2, 0.1, 0.05, 0.025))
    steps = counts(_under, accuracies, [exponent])
    inverse = tuple(1 / accuracies)
    return Measured(
        power(inverse, steps[:, 0] / np.log(inverse)[:, None]),
        1.1,
        detail="power of 1/ε",
        facts={"iterations at ε = 0.025, median": float(np.median(steps[-1]))},
    )


def _under(epsilon: Any, exponent: Any, instance: Instance) -> Any:
    sigma = spectrum(100.0)
    problem = nys.problems.Symmetric((instance.left * sigma) @ instance.left.T)
    start = nys.initializers.nystrom(instance.key, problem.a, 2)
    step = nys.solvers.scaled_step(problem, epsilon**exponent / 12)

    def weak(x: Any) -> Any:
        return nys.optimality.weak_optimality(x, instance.left, sigma)

    return steps_of(step, start, weak, epsilon, 200_000)
