"""GD, ScaledGD, ScaledGD(λ) and PrecGD on completion, 1-bit sensing and phase retrieval.

    python experiments/precgd_problems.py                     # figures/precgd_problems.*
    python experiments/precgd_problems.py --quick --out /tmp  # GD and PrecGD, r = 2 r*

As in precgd.py: M (m, m) of rank r* = 2, ‖M‖ = 1, one small start for all, medians over the trials
of ‖XXᵀ − M‖_F/‖M‖_F. Each point of each panel has the step size of a grid with the least last
error. The last two columns show these errors; one at the upper edge is larger, or overflowed.

    completion   m = 40, half of the entries, with the diagonal; entries + N(0, σ²/m²)
    1-bit        m = 24, p = 250 frequencies of 4/σ² coins each, exact ones without noise
    phase        m = 24, p = 250 Gaussian vectors of `problems.phase.gaussian`

The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.methods import (
    INFORMED,
    KAPPA,
    KAPPAS,
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

UNSEEN = "PrecGD, half of the diagonal unseen"
LOW, HIGH = 2e-17, 1e4
SIZES = {"completion": (40, 800), "1-bit": (24, 250), "phase": (24, 250)}
"""(m, p) of each problem."""


class Grid(NamedTuple):
    """The values of a run; κ and σ are varied at r = 2 r*."""

    multiples: tuple[int, ...] = (1, 2, 4)  # r/r*
    rates: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)
    kappas: tuple[float, ...] = KAPPAS
    noises: tuple[float, ...] = NOISES
    methods: tuple[str, ...] = PEERS


FULL, QUICK = Grid(), Grid((2,), (0.1, 0.5), (KAPPA, 1e4), (1e-2, 1e-3), ("GD", "PrecGD"))


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """PrecGD against its peers on problems other than linear sensing.

    --quick: GD and PrecGD at r = 2 r*, 200 steps, two values each of η, κ and σ.
    """

    trials: int = 3
    """How many random problems; curves are medians over them."""
    steps: int = 400
    """Iterations of each run."""


def completion(key: jax.Array, kappa: Any, noise: Any, diagonal: bool = True) -> Any:
    """Return a problem with 800 entries of 1600, and its M.

    Args:
        key: the PRNG key.
        kappa: κ of M.
        noise: σ; entries have the noise N(0, σ²/m²).
        diagonal: whether the diagonal is among the entries.
    """
    m, p = SIZES["completion"]
    truth_key, seen_key, noise_key = jax.random.split(key, 3)
    x = nys.problems.sensing.random_factor(truth_key, m, spectrum(kappa), m)
    order = jax.random.permutation(seen_key, m * m)
    if diagonal:  # first in the order, by a stable sort
        order = order[jnp.argsort(order % (m + 1) != 0)]
    rows, columns = jnp.divmod(order[:p], m)
    errors = noise / m * jax.random.normal(noise_key, (p,))
    values = jnp.sum(x[rows] * x[columns], axis=1) + errors
    return nys.problems.completion.observed(rows, columns, values, (m, m)), x @ x.T


def onebit(key: jax.Array, kappa: Any, noise: Any) -> Any:
    """Return a problem with frequencies of 4/σ² coins, and its M.

    The loss at the truth is σ²/4, as with noise σ in sensing.

    Args:
        key: the PRNG key.
        kappa: κ of M.
        noise: σ; 0 for exact frequencies.
    """
    m, p = SIZES["1-bit"]
    exact, x = nys.problems.onebit.gaussian(key, m, spectrum(kappa), p)
    trials = 4 / jnp.where(noise > 0, noise, 1) ** 2
    noisy, _ = nys.problems.onebit.gaussian(key, m, spectrum(kappa), p, trials)
    return dataclasses.replace(exact, b=jnp.where(noise > 0, noisy.b, exact.b)), x @ x.T


def phase(key: jax.Array, kappa: Any, noise: Any) -> Any:
    """Return a problem with quadratic measurements, and its M."""
    m, p = SIZES["phase"]
    problem, x = nys.problems.phase.gaussian(key, m, spectrum(kappa), p, noise)
    return problem, x @ x.T


PROBLEMS: dict[str, Callable[..., Any]] = {
    "completion": completion,
    "1-bit": onebit,
    "phase": phase,
}


def main(config: Config) -> None:
    """Run all problems, r and methods, and draw them."""
    jax.config.update("jax_enable_x64", True)
    grid = QUICK if config.quick else FULL
    keys = jax.random.split(jax.random.key(config.seed), config.trials)
    steps = 200 if config.quick else config.steps
    panels: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    rates: dict[str, dict[str, Any]] = defaultdict(dict)
    lasts: dict[str, dict[str, list[float]]] = defaultdict(dict)
    total = len(PROBLEMS) * (len(grid.multiples) * len(grid.methods) + 1) + len(grid.multiples)
    with tqdm(total=total, desc="precgd_problems", unit="run", file=sys.stderr) as bar:

        def measure(name: str, cases: Any, starts: Any, noises: Any = None) -> Any:
            """Return (case, iteration) at the best step size of each case, and these step sizes."""
            bests = tuned(name, cases, starts, steps, grid.rates, noises)
            bar.update()
            return np.array([b.median for b in bests]), [grid.rates[b.point] for b in bests]

        for (problem, make), multiple in itertools.product(PROBLEMS.items(), grid.multiples):
            varied = multiple == 2
            kappas, noises = (grid.kappas, grid.noises) if varied else ((KAPPA,), ())
            # Each κ without noise, then each σ.
            pairs = [*kappas, *[KAPPA] * len(noises)], [*[0.0] * len(kappas), *noises]
            cases = instances(make, keys, *pairs)
            starts = small_starts(keys, SIZES[problem][0], multiple * RANK)
            panel, split = f"{problem}, r = {multiple * RANK}", len(kappas)
            for name in grid.methods:
                errors, picks = measure(name, cases, starts)
                panels[panel][name] = errors[kappas.index(KAPPA)]
                rates[panel][name] = picks[kappas.index(KAPPA)]
                for symbol, part in ("κ", slice(split)), ("σ", slice(split, None)):
                    if varied:
                        lasts[f"{problem}, {symbol}"][name] = errors[part, -1].tolist()
                        rates[f"{problem}, {symbol}"][name] = picks[part]
            if varied:
                noisy = jax.tree.map(lambda x, split=split: x[split:], cases)
                errors, picks = measure(INFORMED, noisy, starts, noises)
                lasts[f"{problem}, σ"][INFORMED] = errors[:, -1].tolist()
                rates[f"{problem}, σ"][INFORMED] = picks
            if problem == "completion":
                cases = instances(functools.partial(make, diagonal=False), keys, (KAPPA,), (0.0,))
                errors, picks = measure("PrecGD", cases, starts)
                panels[panel][UNSEEN], rates[panel][UNSEEN] = errors[0], picks[0]
    record: dict[str, Any] = {"grid": grid._asdict(), "learning_rates": rates, "last_errors": lasts}
    figure = picture(panels, lasts, grid)
    save(config.out, "precgd_problems", figure, panels, config, **record)


def picture(panels: Any, lasts: Any, grid: Grid) -> Any:
    """Draw a row per problem: curves for each r, then last errors over κ and over σ.

    Args:
        panels: errors by iteration, by panel and method.
        lasts: last errors, by panel and method.
        grid: the values of the run.
    """
    columns = len(grid.multiples) + 2
    figure, axes = plt.subplots(
        len(PROBLEMS), columns, figsize=(3.1 * columns, 8.2), layout="constrained", squeeze=False
    )
    for row, problem in zip(axes, PROBLEMS, strict=True):
        for ax, multiple in zip(row, grid.multiples, strict=False):
            rank = multiple * RANK
            for index, (name, errors) in enumerate(panels[f"{problem}, r = {rank}"].items()):
                style = {"color": "0.35", "ls": ":", "marker": "None"} if name == UNSEEN else {}
                draw(ax, errors, index, name, **style)
            equal = "r*" if multiple == 1 else f"{multiple} r*"
            ax.set(title=f"{problem}, r = {equal}", xlabel="iteration")
            ax.set_ylim(LOW, HIGH)
        for ax, symbol, values in zip(row[-2:], "κσ", (grid.kappas, grid.noises), strict=True):
            for index, (name, errors) in enumerate(lasts[f"{problem}, {symbol}"].items()):
                draw(ax, np.minimum(errors, HIGH), index, name, markevery=1, clip_on=False)
                ax.lines[-1].set_xdata(values)
            ax.set_xscale("log")
            ax.set_xlim(min(values) / 2, max(values) * 2)
            ax.set(title=f"{problem}, r = 2 r*, last error", xlabel=symbol)
            ax.set_ylim(*((LOW, HIGH) if symbol == "κ" else (1e-6, HIGH)))
        line = np.array(grid.noises) * floor(*SIZES[problem])
        row[-1].plot(grid.noises, line, label="σ√(d/p), rank r*", **PREDICTION)
        row[0].set_ylabel(r"$\|XX^\top - M\|_F\,/\,\|M\|_F$")
    for ax in axes.flat:
        ax.set_yscale("log")
    handles = {line.get_label(): line for ax in axes[0] for line in ax.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    return figure


if __name__ == "__main__":
    command_line(main, Config)
