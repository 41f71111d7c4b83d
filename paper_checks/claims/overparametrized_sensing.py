"""PrecGD, ScaledGD(λ) and GD on sensing with more columns than the rank.

The rates are theorems of the cited papers; starts, sizes and constants are this project's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nyscaled as nys
from experiments.lib.methods import KAPPAS, METHODS, RANK, START, spectrum
from paper_checks.framework import Limit, Measured, claim, common, worst

M, MEASUREMENTS, TRIALS = 20, 300, 3
SETTING = (
    f"m = {M}, r* = {RANK}, ‖M‖ = 1, {MEASUREMENTS} Gaussian measurements, {TRIALS} problems each"
)
PRECGD = "(Zhang, Fattahi, Zhang, NeurIPS 2021)"
DAMPED = "ScaledGD(λ)"


def transform(method: str, kappa: Any) -> optax.GradientTransformation:
    """Return a method with η = 1/2.

    Args:
        method: one of the experiments' `METHODS`, or `DAMPED`, which has λ = 0.1 σ_min(M).
        kappa: κ of M.
    """
    return nys.scaled_gd(0.5, 0.1 / kappa) if method == DAMPED else METHODS[method](0.5, 0.0)


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None, None))
def _problems(key: Any, kappa: Any, noise: Any, columns: int, scale: Any) -> Any:
    """Return the problem, M and the start of each key."""
    problem, truth = nys.problems.sensing.gaussian(key, M, spectrum(kappa), MEASUREMENTS, noise)
    start = nys.initializers.small(jax.random.fold_in(key, 1), M, columns, scale)
    return problem, nys.problems.Symmetric(truth @ truth.T), start


@functools.partial(jax.jit, static_argnums=(0, 5))
def _errors(method: str, kappa: Any, problem: Any, target: Any, start: Any, steps: int) -> Any:
    def one(kappa: Any, problem: Any, target: Any, start: Any) -> Any:
        step = nys.solvers.gradient_step(problem, transform(method, kappa))
        return nys.solvers.run(step, start, steps, target.residual).history

    return jax.vmap(one)(kappa, problem, target, start)


def errors(
    method: str,
    kappas: Any = (10.0,),
    noises: Any = (0.0,),
    *,
    columns: int = 2 * RANK,
    steps: int = 200,
    scale: float = START,
) -> np.ndarray:
    """Return ‖X_tX_tᵀ − M‖_F, (κ × σ, problem, t), from small starts.

    Args:
        method: see `transform`.
        kappas: condition numbers κ.
        noises: noise levels σ.
        columns: the columns of X.
        steps: the number of steps.
        scale: the standard deviation of the entries of the start.
    """
    cells = np.array([(k, s) for k in kappas for s in noises])
    kappa, noise = np.repeat(cells, TRIALS, axis=0).T
    # The problems differ only in κ and σ.
    keys = jnp.tile(common.keys(TRIALS, 110), len(cells))
    problems = _problems(keys, jnp.asarray(kappa), jnp.asarray(noise), columns, scale)
    curves = _errors(method, jnp.asarray(kappa), *problems, steps)
    return np.asarray(curves).reshape(len(cells), TRIALS, -1)


@claim(
    "precgd-rate",
    f"PrecGD with r > r* is linear at a rate independent of κ {PRECGD}: ‖X_tX_tᵀ − M‖_F ≤ "
    "4·0.9^t‖X_0X_0ᵀ − M‖_F",
    source="literature",
    hypotheses=f"{SETTING}; r = 2r*, κ = 1 … 1e4, η = 1/2, small start (1e-3), t ≤ 200, down to "
    "1e-10",
    removes="damping",
    instead="λ = 0, which is ScaledGD; its first step divides by the small start",
    method="ScaledGD",
)
def linear_rate(method: str = "PrecGD") -> Measured:
    """Measure the rate of PrecGD."""
    curves = errors(method, KAPPAS)
    envelope = 4 * 0.9 ** np.arange(curves.shape[-1]) * curves[..., :1] + 1e-10
    facts = {"last error": Limit(common.largest(curves[..., -1]), 1e-9)}
    return Measured(
        common.largest(curves / envelope), 1.0, detail="error over envelope, largest", facts=facts
    )


@claim(
    "precgd-noise",
    f"PrecGD ends at an error in proportion to the noise {PRECGD}: between 1/2 and 3/2 of σ√(mr/p)",
    source="literature",
    hypotheses=f"{SETTING}; r = 2r*, κ = 10, σ = 1e-1 … 1e-6, η = 1/2, small start, X_200",
    removes="the preconditioner",
    instead="GD with the same η and steps",
    method="GD",
)
def noise_floor(method: str = "PrecGD") -> Measured:
    """Compare the last error with σ√(mr/p), that of least squares with about mr free numbers."""
    noises = np.geomspace(1e-1, 1e-6, 6)
    last = errors(method, noises=noises)[..., -1]
    ratios = last / (noises[:, None] * (M * 2 * RANK / MEASUREMENTS) ** 0.5)
    return worst(
        "last error over σ√(mr/p)",
        {"largest": (np.max(ratios), 1.5), "one over the least": (1 / np.min(ratios), 2.0)},
    )


@claim(
    "scaledgd-lambda-count",
    "ScaledGD(λ) with λ ∝ σ_min(M) finds M to σ_min(M)/10 in O(log κ) steps from a small "
    "random start, r > r* "
    "(Xu, Shen, Chi, Ma, ICML 2023): at most 20 + 10 log2 κ",
    source="literature",
    hypotheses=f"{SETTING}; r = 2r*, κ = 1 … 1e4, λ = 0.1/κ, η = 1/2, start 1e-6",
    removes="the preconditioner",
    instead="GD with the same η (400 steps at most)",
    method="GD",
)
def logarithmic_count(method: str = DAMPED) -> Measured:
    """Count the steps to ‖XXᵀ − M‖_F ≤ 1/(10κ)."""
    curves = errors(method, KAPPAS, steps=400, scale=1e-6)
    reached = curves <= 0.1 / np.array(KAPPAS)[:, None, None]
    counts = np.where(reached.any(axis=-1), np.argmax(reached, axis=-1), curves.shape[-1])
    allowed = 20 + 10 * np.log2(KAPPAS)
    facts = {f"steps at κ = {k:g}": float(np.max(c)) for k, c in zip(KAPPAS, counts, strict=True)}
    return Measured(
        common.largest(counts / allowed[:, None]), 1.0, detail="steps over the bound", facts=facts
    )


@claim(
    "gd-sublinear",
    f"GD with r > r* is sublinear, ‖X_tX_tᵀ − M‖_F ~ 1/t {PRECGD}: doubling t divides it by 1.5 "
    "to 2.5",
    source="literature",
    hypotheses=f"{SETTING}; r = 2r*, κ = 2, η = 1/2, start 0.1, t = 50, 100, … 1600",
    removes="r > r*",
    instead="r = r*, where it is linear",
    columns=RANK,
)
def sublinear(columns: int = 2 * RANK) -> Measured:
    """Measure the 1/t of x⁺ = x − ηx³, which the columns beyond r* follow."""
    curves = errors("GD", (2.0,), columns=columns, steps=1600, scale=0.1)
    doubled = curves[..., 50 * 2 ** np.arange(6)]
    gains = doubled[..., :-1] / doubled[..., 1:]
    return worst(
        "error at t over error at 2t",
        {"largest": (np.max(gains), 2.5), "one over the least": (1 / np.min(gains), 1 / 1.5)},
    )
