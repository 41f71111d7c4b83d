"""The methods of Table 1 as functions of a case: where each starts and how it steps.

In all cases ‖A‖ = 1. Each method is given what its theory assumes to be known: σ_r(A) for the
damping of ScaledGD(λ), for β and the closeness of modified GD and for the radius of the local
start; the singular values of X_0 for Nesterov's method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import nyscaled as nys

Array = jax.Array
SMALL = 1e-6  # ζ, the scale of small starts
UNEQUAL = 1e-3  # α, that of modified GD: α for X_0 and α/3 for Y_0
LOCAL = 0.1  # distance of the local start from the optimum, in units of σ_r(A)^(1/2)
CLOSE = 0.1  # ‖XYᵀ − A‖_F at which modified GD refactors, in units of σ_r(A)
DAMPING = 0.1  # λ of ScaledGD(λ), in units of σ_r(A)
LARGE = 10.0  # ξ of Nesterov's start

SCALED_RATES = (0.3, 0.5, 0.7, 1.0)
GD_RATES = (0.3, 0.5, 0.7, 0.9)  # in units of 1/‖A‖; descent is unstable at the optimum from 1 on
FRACTIONS = (0.5, 1.0, 1.5, 2.0)  # of the step size of a theory


class Case(NamedTuple):
    """One run: A = U diag(spectrum) Vᵀ, the key of its start, the step size and the tolerance."""

    a: Array
    left: Array
    right: Array
    spectrum: Array
    key: Array
    rate: Array
    tol: Array


@dataclasses.dataclass(frozen=True)
class Setting:
    """A panel: which problem, the columns of X, and the rank of A."""

    symmetric: bool
    columns: int
    rank: int

    def problem(self, case: Case) -> nys.problems.Symmetric | nys.problems.Asymmetric:
        """Return the problem of a case."""
        return nys.problems.Symmetric(case.a) if self.symmetric else nys.problems.Asymmetric(case.a)

    @property
    def solution_rank(self) -> int:
        """The rank of a solution."""
        return min(self.columns, self.rank)

    def least(self, case: Case) -> Array:
        """Return σ_r(A), the least singular value of a solution."""
        return case.spectrum[self.solution_rank - 1]

    def error(self, case: Case, factors: Any) -> Array:
        """Return ‖XYᵀ − A‖_F/‖A‖_F; if under-parametrized, the relative excess over the best."""
        beyond = case.spectrum[self.solution_rank :]
        pair = isinstance(factors, nys.Factors)
        problem = nys.problems.Asymmetric(case.a) if pair else self.problem(case)
        if beyond.size:
            return problem.residual(factors) / jnp.linalg.norm(beyond) - 1
        return problem.residual(factors) / jnp.linalg.norm(case.spectrum)

    def weak(self, case: Case, factors: Any) -> Array:
        """‖YᵀA†X − I‖_F, Definitions 1 and 2."""
        x, y = factors if isinstance(factors, nys.Factors) else (factors, factors)
        return nys.optimality.generalized_weak_optimality(
            nys.Factors(x, y), case.left, case.right, case.spectrum
        )


Count = Callable[[Setting, Case, int], tuple[Array, Array]]
"""(setting, case, most steps) → the steps, and whether the accuracy was reached."""


def _until(step: Any, start: Any, measure: Any, case: Case, cap: int, tol: Any = None) -> Any:
    measure = jax.tree_util.Partial(measure, case)
    tol = case.tol if tol is None else tol
    return nys.solvers.run_until(step, start, measure, tol, cap)


def _reached(solution: Any) -> Array:
    return solution.status == nys.solvers.Status.CONVERGED


def _counter(step: Any, start: Any, weak: bool = False) -> Count:
    def count(setting: Setting, case: Case, cap: int) -> tuple[Array, Array]:
        measure = setting.weak if weak else setting.error
        first = start(setting, case)
        solution = _until(step(setting, case, first), first, measure, case, cap)
        return solution.num_steps, _reached(solution)

    return count


def _small(setting: Setting, case: Case) -> Any:
    m, n = case.a.shape
    if setting.symmetric:
        return nys.initializers.small(case.key, m, setting.columns, SMALL)
    return nys.initializers.small_factors(case.key, (m, n), setting.columns, SMALL)


def _local(setting: Setting, case: Case) -> Any:
    """Return the optimum, moved by LOCAL·σ_r(A)^(1/2) in a random direction."""
    optimum = nys.initializers.spectral(setting.problem(case), setting.columns)
    noise = _small(setting, case)
    size = LOCAL * jnp.sqrt(setting.least(case)) / optax.tree.norm(noise)
    return jax.tree.map(lambda x, n: x + size * n, optimum, noise)


def _nystrom(setting: Setting, case: Case, scale: float = 1.0) -> Any:
    make = nys.initializers.nystrom if setting.symmetric else nys.initializers.nystrom_factors
    return make(case.key, case.a, setting.columns, scale)


def _altgd(setting: Setting, case: Case) -> Any:
    return nys.initializers.altgd(case.key, case.a, setting.columns, 1.0)


def _gd(setting: Setting, case: Case, _: Any) -> Any:
    return nys.solvers.gradient_step(setting.problem(case), optax.sgd(case.rate))


def _alternating(setting: Setting, case: Case, _: Any) -> Any:
    rate = case.rate * nys.solvers.altgd_learning_rate(1.0)
    return nys.solvers.alternating_step(nys.problems.Asymmetric(case.a), optax.sgd(rate))


def _nesterov(setting: Setting, case: Case, start: Any) -> Any:
    rate, momentum = nys.solvers.nesterov_parameters(start.left)
    tx = optax.sgd(case.rate * rate, momentum, nesterov=True)
    return nys.solvers.gradient_step(setting.problem(case), tx)


def _scaled(setting: Setting, case: Case, _: Any) -> Any:
    return nys.solvers.scaled_step(setting.problem(case), case.rate)


def _damped(setting: Setting, case: Case, _: Any) -> Any:
    damping = DAMPING * setting.least(case)
    return nys.solvers.scaled_step(setting.problem(case), case.rate, damping)


def _modified(setting: Setting, case: Case, cap: int) -> tuple[Array, Array]:
    """Count GD until near, the refactoring, and GD: two loops, each with its step size."""
    problem = nys.problems.Asymmetric(case.a)
    least = setting.least(case)
    m, n = case.a.shape
    x, y = nys.initializers.small_factors(case.key, (m, n), setting.columns, UNEQUAL)
    first = nys.solvers.gradient_step(problem, optax.sgd(0.5))
    near = CLOSE * least / jnp.linalg.norm(case.spectrum)
    before = _until(first, nys.Factors(x, y / 3), setting.error, case, cap, near)
    beta = jnp.sqrt(least)
    second = nys.solvers.gradient_step(problem, optax.sgd(case.rate / (beta**2 + 1 / beta**2)))
    start = nys.solvers.unbalance(before.params, beta)
    after = _until(second, start, setting.error, case, cap)
    steps = before.num_steps + after.num_steps
    return steps, _reached(before) & _reached(after) & (steps <= cap)


@dataclasses.dataclass(frozen=True)
class Method:
    """How to count, over which step sizes, and the most steps."""

    count: Count
    rates: tuple[float, ...]
    cap: int


SLOW, FAST = 100_000, 2_000
METHODS = {
    "GD, small": Method(_counter(_gd, _small), GD_RATES, SLOW),
    "modified GD, small": Method(_modified, (0.75, 1.0, 1.5, 1.9), SLOW),
    "AltGD": Method(_counter(_alternating, _altgd), FRACTIONS, SLOW),
    "Nesterov, large Nyström": Method(
        _counter(_nesterov, lambda s, c: _nystrom(s, c, LARGE)), (0.5, 0.75, 1.0, 1.25), SLOW
    ),
    "ScaledGD, local": Method(_counter(_scaled, _local), SCALED_RATES, FAST),
    "ScaledGD, small": Method(_counter(_scaled, _small), SCALED_RATES, FAST),
    "ScaledGD(λ), small": Method(_counter(_damped, _small), SCALED_RATES, FAST),
    "ScaledGD, Nyström": Method(_counter(_scaled, _nystrom), SCALED_RATES, FAST),
    "ScaledGD, Nyström, weak": Method(_counter(_scaled, _nystrom, weak=True), SCALED_RATES, FAST),
}
