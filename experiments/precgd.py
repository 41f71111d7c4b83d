"""Over-parametrized matrix sensing: GD, ScaledGD, ScaledGD(λ) and PrecGD on equal problems.

    python experiments/precgd.py                     # figures/precgd.png, .pdf, .csv, .json
    python experiments/precgd.py --quick --out /tmp  # fewer steps

M (m, m) of rank r* = 2 from p Gaussian measurements, ‖M‖ = 1, the same small start for all. In (a)
to (c) each method has the step size of a grid with the least last error; (d) to (f) have that of
(b). Curves are medians over the trials of ‖XXᵀ − M‖_F/‖M‖_F.
The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.methods import (
    DAMPED,
    INFORMED,
    KAPPA,
    KAPPAS,
    METHODS,
    NOISES,
    PEERS,
    RANK,
    floor,
    instances,
    small_starts,
    spectrum,
    tuned,
)
from experiments.lib.record import save
from experiments.lib.style import PREDICTION, draw
from experiments.lib.sweep import Best

M, MEASUREMENTS, NOISE = 24, 250, 1e-2
LEARNING_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """PrecGD against its peers, with more columns than the rank. --quick: 120 steps."""

    trials: int = 3
    """How many random problems; curves are medians over them."""
    steps: int = 250
    """Iterations of each run."""


def sensing(key: jax.Array, kappa: Any, noise: Any) -> tuple[nys.problems.Sensing, jax.Array]:
    """Return a problem and its M."""
    problem, truth = nys.problems.sensing.gaussian(key, M, spectrum(kappa), MEASUREMENTS, noise)
    return problem, truth @ truth.T


def main(config: Config) -> None:
    """Run the six panels and draw them."""
    jax.config.update("jax_enable_x64", True)
    steps = 120 if config.quick else config.steps
    keys = jax.random.split(jax.random.key(config.seed), config.trials)
    ranks = {"a": RANK, "b": 2 * RANK, "c": 4 * RANK}
    starts = {panel: small_starts(keys, M, rank) for panel, rank in ranks.items()}
    panels: dict[str, dict[str, np.ndarray]] = {p: {} for p in "abcdef"}
    rates: dict[str, dict[str, float]] = {p: {} for p in ranks}
    total = len(ranks) * len(PEERS) + len(METHODS)
    with tqdm(total=total, desc="precgd", unit="run", file=sys.stderr) as bar:

        def measure(name: str, cases: Any, panel: str, *args: Any) -> list[Best]:
            bests = tuned(name, cases, starts[panel], steps, *args)
            bar.update()
            return bests

        kappas, noises = [*KAPPAS, *[KAPPA] * len(NOISES)], [*[0.0] * len(KAPPAS), *NOISES]
        cases = instances(sensing, keys, kappas, noises)
        ten = kappas.index(KAPPA)
        plain = jax.tree.map(lambda x: x[ten : ten + 1], cases)
        for panel in ranks:
            for name in PEERS:
                (best,) = measure(name, plain, panel, LEARNING_RATES)
                rates[panel][name] = LEARNING_RATES[best.point]
                panels[panel][f"{name}, η = {rates[panel][name]}"] = best.median
        # From here on the step sizes are those of (b).
        rate = rates["b"] | {INFORMED: rates["b"]["PrecGD"]}
        errors = {
            name: [best.median for best in measure(name, cases, "b", (rate[name],), noises)]
            for name in METHODS
        }
    split = len(KAPPAS)
    for name in ("PrecGD", DAMPED):
        by_kappa = zip(KAPPAS, errors[name][:split], strict=True)
        panels["d"] |= {f"{name}, κ = {kappa:g}": curve for kappa, curve in by_kappa}
    for name, curves in errors.items():
        panels["e"][f"{name}, η = {rate[name]}"] = curves[split + NOISES.index(NOISE)]
    by_noise = zip(NOISES, errors["PrecGD"][split:], strict=True)
    panels["f"] = {f"PrecGD, σ = {noise:g}": curve for noise, curve in by_noise}
    save(config.out, "precgd", picture(panels, ranks), panels, config, learning_rates=rates)


def picture(panels: Any, ranks: dict[str, int]) -> Any:
    """Draw the six panels, with one scale of errors per row.

    Args:
        panels: errors by iteration, by panel and series.
        ranks: the columns of X in panels (a) to (c).
    """
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
    for ax, (panel, series) in zip(axes.flat, panels.items(), strict=True):
        for index, (label, errors) in enumerate(series.items()):
            style: dict[str, Any] = {}
            if panel == "d" and index >= len(KAPPAS):
                style = {"color": "0.6", "ls": ":", "mfc": "white"}
                label = f"{DAMPED}, the same κ" if index == len(KAPPAS) else None
            draw(ax, errors, index % len(KAPPAS) if panel == "d" else index, label, **style)
        if panel == "e":
            level = NOISE * floor(M, MEASUREMENTS)
            ax.axhline(level, label="σ√(d/p), rank r*", **PREDICTION)
        ax.set(yscale="log", xlabel="iteration", title=titles[panel])
        ax.set_ylim(*limits[panel])
        ax.legend(loc="upper right")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\|XX^\top - M\|_F\,/\,\|M\|_F$")
    return figure


if __name__ == "__main__":
    command_line(main, Config)
