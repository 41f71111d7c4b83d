"""The computations behind Figures 1 and 4: each panel is one compiled call over all its series."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import nyscaled as nys

Array = jax.Array

SCALES = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # ξ
SMALL = 1e-3  # ζ
NOISES = (1e-2, 1e-4, 1e-6)  # ξ_n
LEARNING_RATES = (0.5, 0.1, 0.01)
GD_LEARNING_RATE = 0.01
DAMPING = 0.01


Panels = dict[str, dict[str, Array]]
"""panel → series → errors by iteration."""


def compiled(panels: Any, *args: Any) -> Panels:
    """Return `panels(*args)`, compiled as one call; plain `jit` would sort the series by name.

    Args:
        panels: a function that returns panels.
        *args: its arguments.
    """
    labels: dict[str, list[str]] = {}

    @jax.jit
    def call(*args: Any) -> list[list[Array]]:
        result = panels(*args)
        labels.update({panel: list(series) for panel, series in result.items()})
        return [list(series.values()) for series in result.values()]

    values = jax.block_until_ready(call(*args))
    return {
        panel: dict(zip(labels[panel], series, strict=True))
        for panel, series in zip(labels, values, strict=True)
    }


def residual(basis: Array, spectrum: Array) -> Any:
    """Return ‖XXᵀ − A‖_F as a record for `run`."""

    def record(basis: Array, spectrum: Array, x: Array) -> Array:
        return nys.optimality.residual_in_basis(x, basis, spectrum)

    return jax.tree_util.Partial(record, basis, spectrum)


def weak(basis: Array, spectrum: Array) -> Any:
    """Return ‖XᵀA†X − I‖_F as a record for `run`."""

    def record(basis: Array, spectrum: Array, x: Array) -> Array:
        return nys.optimality.weak_optimality(x, basis, spectrum)

    return jax.tree_util.Partial(record, basis, spectrum)


def comparison(
    problem: nys.problems.Symmetric,
    record: Any,
    rank: int,
    key: Array,
    scale: float,
    steps: int,
    gd_steps: int,
    damped: bool,
) -> Panels:
    """Return panel (a): GD and ScaledGD or ScaledGD(λ) from a small start, ScaledGD from Nyström.

    Args:
        problem: the problem.
        record: the error of X.
        rank: the columns of X.
        key: the PRNG key of the starts.
        scale: ξ of the Nyström start.
        steps: the steps of ScaledGD.
        gd_steps: the steps of GD.
        damped: whether ScaledGD from the small start is damped, as for Figure 4.
    """
    m = problem.shape[0]
    small = nys.initializers.small(jax.random.fold_in(key, 1), m, rank, SMALL, problem.dtype)
    nystrom = nys.initializers.nystrom(key, problem.a, rank, scale)
    gd = nys.solvers.gradient_step(problem, optax.sgd(GD_LEARNING_RATE))
    scaled = nys.solvers.scaled_step(problem, 0.5)

    def history(step: Any, start: Array, count: int) -> Array:
        return nys.solvers.run(step, start, count, record).history

    curves = {f"GD (η = {GD_LEARNING_RATE}), small start": history(gd, small, gd_steps)}
    if damped:
        step = nys.solvers.scaled_step(problem, 0.5, damping=DAMPING)
        curves[f"ScaledGD-λ (λ = {DAMPING}), small start"] = history(step, small, steps)
        curves["ScaledGD (†), Nyström"] = history(scaled, nystrom, steps)
    else:
        histories = jax.vmap(lambda x: history(scaled, x, steps))(jnp.stack([small, nystrom]))
        curves["ScaledGD, small start"], curves["ScaledGD, Nyström"] = histories
    return {"a": curves}


def sensitivity(
    problem: nys.problems.Symmetric,
    record: Any,
    basis: Array,
    spectrum: Array,
    rank: int,
    key: Array,
    scale: float,
    steps: int,
) -> Panels:
    """Return panel (b): Nyström over ξ with exact curves, and perturbed Nyström over ξ_n.

    All use one Ω and one N, so that curves differ only by their scales.

    Args:
        problem: the problem.
        record: the error of X.
        basis: Q.
        spectrum: diag(Σ).
        rank: the columns of X.
        key: the PRNG key of the starts.
        scale: ξ of the perturbed starts.
        steps: the number of steps.
    """
    dtype = problem.dtype
    unit = nys.initializers.nystrom(key, problem.a, rank)
    noise = nys.initializers.perturbed(key, problem.a, rank, noise=1.0) - unit
    scales, noises = jnp.asarray(SCALES, dtype), jnp.asarray(NOISES, dtype)
    starts = jnp.concatenate(
        [scales[:, None, None] * unit, scale * unit + noises[:, None, None] * noise]
    )
    step = nys.solvers.scaled_step(problem, 0.5)
    histories = jax.vmap(lambda x: nys.solvers.run(step, x, steps, record).history)(starts)
    labels = [f"Nyström, ξ = {s:g}" for s in SCALES]
    labels += [f"perturbed (ξ = {scale:g}), ξₙ = {s:g}" for s in NOISES]
    phi = basis.T @ unit
    exact = jax.vmap(lambda s: nys.dynamics.symmetric_errors(s * phi, spectrum, 0.5, steps))(scales)
    return {
        "b": dict(zip(labels, histories, strict=True)),
        "b exact": dict(zip(labels[: len(SCALES)], exact, strict=True)),
    }


def learning_rates(
    problem: nys.problems.Symmetric,
    record: Any,
    spectrum: Array,
    rank: int,
    key: Array,
    scale: float,
    steps: int,
) -> Panels:
    """Return panel (c): weak optimality over η, and the decay ρ²ᵗ that `subspace_rate` predicts.

    Args:
        problem: the problem.
        record: the error of X.
        spectrum: the eigenvalues of A.
        rank: the columns of X.
        key: the PRNG key of the start.
        scale: ξ.
        steps: the number of steps.
    """
    start = nys.initializers.nystrom(key, problem.a, rank, scale)
    rates = jnp.asarray(LEARNING_RATES, problem.dtype)

    def history(eta: Array) -> Array:
        return nys.solvers.run(nys.solvers.scaled_step(problem, eta), start, steps, record).history

    labels = [f"ScaledGD, Nyström, η = {eta:g}" for eta in LEARNING_RATES]
    rho = nys.dynamics.subspace_rate(spectrum, rank, rates)
    decay = rho[:, None] ** (2 * jnp.arange(steps + 1))
    return {
        "c": dict(zip(labels, jax.vmap(history)(rates), strict=True)),
        "c predicted decay": dict(zip(labels, decay, strict=True)),
    }
