"""What the experiments on too many columns share: the methods, their runs, the choice of step sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nyscaled as nys

RANK, DAMPING, START = 2, 0.01, 1e-3
KAPPA, KAPPAS = 10.0, (1.0, 10.0, 1e2, 1e3, 1e4)
NOISES = (1e-1, 1e-2, 1e-3, 1e-4)

Make = Callable[[Any, Any], optax.GradientTransformation]
"""A transform of the step size and the loss at the truth."""

DAMPED, INFORMED = f"ScaledGD(λ = {DAMPING})", "PrecGD that knows σ"
METHODS: dict[str, Make] = {
    "GD": lambda eta, _: optax.sgd(eta),
    "ScaledGD": lambda eta, _: nys.scaled_gd(eta),
    DAMPED: lambda eta, _: nys.scaled_gd(eta, DAMPING),
    "PrecGD": lambda eta, _: nys.precgd(eta),
    INFORMED: lambda eta, level: nys.precgd(eta, noise_level=level),
}
PEERS = tuple(name for name in METHODS if name != INFORMED)
"""The methods that know nothing of the noise; without any, `INFORMED` is PrecGD."""


def spectrum(kappa: Any) -> jax.Array:
    """Eigenvalues of M, from 1 to 1/κ."""
    return kappa ** -jnp.linspace(0.0, 1.0, RANK)


def instances(make: Callable[..., Any], keys: jax.Array, kappas: Any, noises: Any) -> Any:
    """`make(key, κ, σ)`, a problem and its M, for pairs of κ and σ: leading axes (case, trial)."""
    trials = jax.vmap(make, (0, None, None))
    batch = jax.jit(jax.vmap(trials, (None, 0, 0)))
    return batch(keys, jnp.asarray(kappas), jnp.asarray(noises))


def small_starts(keys: jax.Array, m: int, rank: int) -> jax.Array:
    """A small start of each trial, (trial, m, rank)."""
    starts = jax.vmap(lambda k: nys.initializers.small(jax.random.fold_in(k, 1), m, rank, START))
    return starts(keys)


def curves(
    name: str, cases: Any, starts: jax.Array, steps: int, rates: Any, noises: Any = None
) -> np.ndarray:
    """Medians over the trials of ‖XXᵀ − M‖_F/‖M‖_F, (case, step size, iteration).

    Args:
        name: of the method.
        cases: from `instances`.
        starts: (trial, m, r).
        steps: how many iterations.
        rates: step sizes, (k,).
        noises: σ of each case, of which `INFORMED` is told the loss σ²/4; 0 if None.

    A run that overflowed counts as infinitely far.
    """

    def one(problem: Any, target: Any, noise: Any, start: jax.Array, eta: Any) -> jax.Array:
        step = nys.solvers.gradient_step(problem, METHODS[name](eta, noise**2 / 4))

        def error(x: jax.Array) -> jax.Array:
            return jnp.linalg.norm(x @ x.T - target) / jnp.linalg.norm(target)

        return nys.solvers.run(step, start, steps, error).history

    batch = jax.vmap(one, (None, None, None, None, 0))
    batch = jax.vmap(jax.vmap(batch, (0, 0, None, 0, None)), (0, 0, 0, None, None))
    problems, targets = cases
    noises = jnp.zeros(len(targets)) if noises is None else jnp.asarray(noises)
    found = jax.jit(batch)(problems, targets, noises, starts, jnp.asarray(rates))
    return np.median(np.nan_to_num(np.asarray(found), nan=np.inf), axis=1)


def best(found: np.ndarray) -> int:
    """The step size with the least last error, of curves (step size, iteration)."""
    return int(np.argmin(found[:, -1]))


def floor(m: int, count: int) -> float:
    """√(d/p), with d the dimension of the matrices of rank r*.

    Times σ it is the error of least squares over their tangent space at M, where 𝒜 keeps norms.
    """
    return float(np.sqrt((m * RANK - RANK * (RANK - 1) / 2) / count))
