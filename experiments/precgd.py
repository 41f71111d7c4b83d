"""Over-parametrized matrix sensing: GD, ScaledGD, ScaledGD(λ) and PrecGD on equal problems.

    python experiments/precgd.py                     # figures/precgd.png, .pdf, .csv, .json
    python experiments/precgd.py --quick --out /tmp  # fewer steps

M (m, m) of rank r* = 2 from p Gaussian measurements, ‖M‖ = 1, the same small start for all. The step
size of each method is the best of a grid for each of (a) to (c), the smallest last error; (d) to (f)
have that of (b). Curves are medians over the trials of ‖XXᵀ − M‖_F/‖M‖_F.

With r > r* columns GD and constant damping become sublinear. Without damping the first step divides
by the small start: the error grows a thousandfold before it falls, and in (c) hardly falls. (At
η = 0.7 it overflows.) Under noise GD alone ends near the level of rank r*: it is too slow to fit
the noise with its small columns.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from _record import draw, save
from tqdm import tqdm

import nyscaled as nys

M, RANK, MEASUREMENTS = 24, 2, 250
KAPPA, DAMPING, START = 10.0, 0.01, 1e-3
KAPPAS = (1.0, 10.0, 1e2, 1e3, 1e4)
NOISE, NOISES = 1e-2, (1e-1, 1e-2, 1e-3, 1e-4)
LEARNING_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
DAMPED = f"ScaledGD(λ = {DAMPING})"
METHODS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "GD": optax.sgd,
    "ScaledGD": lambda eta: nys.scaled_gd(eta),
    DAMPED: lambda eta: nys.scaled_gd(eta, DAMPING),
    "PrecGD": lambda eta: nys.precgd(eta),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """PrecGD against its peers, with more columns than the rank."""

    out: Path = Path("figures")
    """Folder for the picture and its record."""
    seed: int = 0
    """Seed of the matrices, the measurements and the starts."""
    trials: int = 3
    """How many random problems; curves are medians over them."""
    steps: int = 250
    """Iterations of each run."""
    quick: bool = False
    """120 steps."""


@jax.jit
def instances(keys: jax.Array, kappa: Any, noise: Any) -> tuple[nys.problems.Sensing, jax.Array]:
    """A problem and its M for each key."""

    def instance(key: jax.Array) -> tuple[nys.problems.Sensing, jax.Array]:
        spectrum = kappa ** -jnp.linspace(0.0, 1.0, RANK)
        problem, truth = nys.problems.sensing.gaussian(key, M, spectrum, MEASUREMENTS, noise)
        return problem, truth @ truth.T

    return jax.vmap(instance)(keys)


def curves(
    make: Callable[[Any], optax.GradientTransformation],
    cases: tuple[nys.problems.Sensing, jax.Array],
    starts: jax.Array,
    steps: int,
    rates: Any,
    axis: int | None = None,
) -> np.ndarray:
    """Medians over the trials of the relative errors, (case, iteration).

    Each case has a step size, and with `axis=0` instances of its own. A run that overflowed counts
    as infinitely far.
    """

    def trial(eta: Any, instance: Any, start: jax.Array) -> jax.Array:
        problem, target = instance
        step = nys.solvers.gradient_step(problem, make(eta))

        def error(x: jax.Array) -> jax.Array:
            return jnp.linalg.norm(x @ x.T - target) / jnp.linalg.norm(target)

        return nys.solvers.run(step, start, steps, error).history

    trials = jax.vmap(trial, (None, 0, 0))
    found = jax.jit(jax.vmap(trials, (0, axis, None)))(jnp.asarray(rates), cases, starts)
    return np.median(np.nan_to_num(np.asarray(found), nan=np.inf), axis=1)


def main(config: Config) -> None:
    """Runs the six panels and draws them."""
    jax.config.update("jax_enable_x64", True)
    steps = 120 if config.quick else config.steps
    keys = jax.random.split(jax.random.key(config.seed), config.trials)
    ranks = {"a": RANK, "b": 2 * RANK, "c": 4 * RANK}
    starts = {
        p: jax.vmap(lambda k, r=r: nys.initializers.small(jax.random.fold_in(k, 1), M, r, START))(
            keys
        )
        for p, r in ranks.items()
    }
    panels: dict[str, dict[str, np.ndarray]] = {p: {} for p in "abcdef"}
    rates: dict[str, dict[str, float]] = {p: {} for p in ranks}
    with tqdm(total=4 * len(METHODS) + 3, desc="precgd", unit="run", file=sys.stderr) as bar:

        def measure(name: str, cases: Any, panel: str, *args: Any) -> np.ndarray:
            found = curves(METHODS[name], cases, starts[panel], steps, *args)
            bar.update()
            return found

        plain = instances(keys, KAPPA, 0.0)
        for panel in ranks:
            for name in METHODS:
                found = measure(name, plain, panel, LEARNING_RATES)
                best = int(np.argmin(found[:, -1]))
                rates[panel][name] = LEARNING_RATES[best]
                panels[panel][f"{name}, η = {LEARNING_RATES[best]}"] = found[best]
        # From here on the step sizes are those of (b).
        rate = rates["b"]
        cases = jax.vmap(instances, (None, 0, None))(keys, jnp.asarray(KAPPAS), 0.0)
        for name in ("PrecGD", DAMPED):
            found = measure(name, cases, "b", [rate[name]] * len(KAPPAS), 0)
            panels["d"] |= {f"{name}, κ = {k:g}": c for k, c in zip(KAPPAS, found, strict=True)}
        noisy = instances(keys, KAPPA, NOISE)
        for name in METHODS:
            panels["e"][f"{name}, η = {rate[name]}"] = measure(name, noisy, "b", [rate[name]])[0]
        cases = jax.vmap(instances, (None, None, 0))(keys, KAPPA, jnp.asarray(NOISES))
        found = measure("PrecGD", cases, "b", [rate["PrecGD"]] * len(NOISES), 0)
        panels["f"] = {f"PrecGD, σ = {s:g}": c for s, c in zip(NOISES, found, strict=True)}
    figure = picture(panels, ranks)
    save(config.out, "precgd", figure, panels, config, learning_rates=rates)


def picture(panels: Any, ranks: dict[str, int]) -> Any:
    """The six panels, on one scale of errors for each row."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    titles = {
        p: f"({p}) r = {r}{' = r*' if r == RANK else f' = {r // RANK} r*'}"
        for p, r in ranks.items()
    }
    titles |= {
        "d": "(d) r = 2 r*, condition number of M",
        "e": f"(e) r = 2 r*, noise σ = {NOISE:g}",
        "f": "(f) r = 2 r*, noise of other sizes",
    }
    # Room for the legends above the curves.
    limits = dict.fromkeys("abc", (1e-16, 1e9)) | {"d": (1e-12, 1e6), "e": (1e-4, 1e6)}
    limits["f"] = (1e-5, 1e2)
    # The mean error of least squares over the tangent space of matrices of rank r* at M.
    floor = NOISE * np.sqrt((M * RANK - RANK * (RANK - 1) / 2) / MEASUREMENTS)
    for ax, (panel, series) in zip(axes.flat, panels.items(), strict=True):
        for index, (label, errors) in enumerate(series.items()):
            look: dict[str, Any] = {}
            if panel == "d" and index >= len(KAPPAS):
                look = {"color": "0.6", "ls": ":", "mfc": "white"}
                label = f"{DAMPED}, the same κ" if index == len(KAPPAS) else None
            draw(ax, errors, index % len(KAPPAS) if panel == "d" else index, label, **look)
        if panel == "e":
            ax.axhline(floor, color="0.1", lw=0.9, ls=(0, (4, 3)), label="σ√(d/p), rank r*")
        ax.set(yscale="log", xlabel="iteration", title=titles[panel])
        ax.set_ylim(*limits[panel])
        ax.legend(loc="upper right")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\|XX^\top - M\|_F\,/\,\|M\|_F$")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Config))
