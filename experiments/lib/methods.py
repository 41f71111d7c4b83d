"""The methods on matrices with more columns than the rank, and their runs from small starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nyscaled as nys
from experiments.lib import sweep

RANK, DAMPING, START = 2, 0.01, 1e-3
KAPPA, KAPPAS = 10.0, (1.0, 10.0, 1e2, 1e3, 1e4)
NOISES = (1e-1, 1e-2, 1e-3, 1e-4)
ROUNDING = 1e-12
"""Below this, smaller errors are not better."""

Make = Callable[[Any, Any], optax.GradientTransformation]
"""A transform for a step size and the loss at the truth."""

DAMPED, INFORMED = f"ScaledGD(λ = {DAMPING})", "PrecGD that knows σ"
METHODS: dict[str, Make] = {
    "GD": lambda eta, _: optax.sgd(eta),
    "ScaledGD": lambda eta, _: nys.scaled_gd(eta),
    DAMPED: lambda eta, _: nys.scaled_gd(eta, DAMPING),
    "PrecGD": lambda eta, _: nys.precgd(eta),
    INFORMED: lambda eta, level: nys.precgd(eta, noise_level=level),
}
PEERS = tuple(name for name in METHODS if name != INFORMED)
"""The methods that do not know the noise; without noise, `INFORMED` is PrecGD."""


def spectrum(kappa: Any) -> jax.Array:
    """Return the eigenvalues of M, from 1 to 1/κ."""
    return kappa ** -jnp.linspace(0.0, 1.0, RANK)


def instances(make: Callable[..., Any], keys: jax.Array, kappas: Any, noises: Any) -> Any:
    """Return problems and their M for pairs of κ and σ, with leading axes (case, trial).

    Args:
        make: takes a key, κ and σ, and returns a problem and its M.
        keys: one per trial.
        kappas: κ of each case.
        noises: σ of each case.
    """
    batch = sweep.over(make, (None, 0, 0), (0, None, None))
    return batch(keys, jnp.asarray(kappas), jnp.asarray(noises))


def small_starts(keys: jax.Array, m: int, rank: int) -> jax.Array:
    """Return a small start of each trial, (trial, m, rank).

    Args:
        keys: one per trial.
        m: rows.
        rank: columns.
    """
    starts = jax.vmap(lambda k: nys.initializers.small(jax.random.fold_in(k, 1), m, rank, START))
    return starts(keys)


def tuned(
    name: str, cases: Any, starts: jax.Array, steps: int, rates: Any, noises: Any = None
) -> list[sweep.Best]:
    """Return ‖XXᵀ − M‖_F/‖M‖_F by iteration, (trial, iteration), at each case's best step size.

    The best step size has the least median of the last errors, and of those at rounding it comes
    there first. A run that overflowed counts as infinitely far.

    Args:
        name: the method.
        cases: the problems that `instances` returns.
        starts: X_0, (trial, m, r).
        steps: the number of iterations.
        rates: the step sizes, (k,).
        noises: σ of each case; `INFORMED` is given the loss σ²/4. None for 0.
    """

    def one(problem: Any, target: Any, noise: Any, start: jax.Array, eta: Any) -> jax.Array:
        step = nys.solvers.gradient_step(problem, METHODS[name](eta, noise**2 / 4))

        def error(x: jax.Array) -> jax.Array:
            return jnp.linalg.norm(x @ x.T - target) / jnp.linalg.norm(target)

        return nys.solvers.run(step, start, steps, error).history

    case, trial, rate = (0, 0, 0, None, None), (0, 0, None, 0, None), (None,) * 4 + (0,)
    problems, targets = cases
    noises = jnp.zeros(len(targets)) if noises is None else jnp.asarray(noises)
    errors = sweep.over(one, case, trial, rate)(
        problems, targets, noises, starts, jnp.asarray(rates)
    )
    errors = np.swapaxes(np.nan_to_num(np.asarray(errors), nan=np.inf), 1, 2)
    return [sweep.best(of_case, np.median(scores(of_case), axis=1)) for of_case in errors]


def scores(errors: np.ndarray) -> np.ndarray:
    """Return the last error of runs, or a number below `ROUNDING` that grows with their time to it.

    Args:
        errors: errors by iteration, (…, iteration).
    """
    below = np.cumprod((errors <= ROUNDING)[..., ::-1], axis=-1).sum(axis=-1)
    share = 1 - below / errors.shape[-1]
    return np.where(below > 0, share * ROUNDING, errors[..., -1])


def floor(m: int, count: int) -> float:
    """Return √(d/p), with d the dimension of the matrices of rank r*.

    Times σ it is the error of least squares over their tangent space at M, where 𝒜 keeps norms.

    Args:
        m: the side of M.
        count: the number p of measurements.
    """
    return float(np.sqrt((m * RANK - RANK * (RANK - 1) / 2) / count))
