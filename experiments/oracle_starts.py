"""Starts of problems without A, for ScaledGD and GD: Nyström from gradients, spectral, random.

    python experiments/oracle_starts.py                     # figures/oracle_starts.*
    python experiments/oracle_starts.py --quick --out /tmp  # fewer problems and steps

Appendix A.4 makes a Nyström start from one gradient, X_0 = AΩ, and leaves other problems open.
Here p Gaussian measurements or entries of M of rank 2 are given, r = r*, and the gradient at (0, Ω)
gives BΩ with B = 𝒜*(b), which is M on average. d is the number of degrees of freedom. Counts are
gradients to a relative error of 1e-6, including those of the start (a spectral one takes 22
products with B or Bᵀ), medians and quartiles over the problems. The step size is the best of four
per method, start and cell: most successes, then the least median.
The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import nyscaled as nys
from experiments.lib import sweep
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.style import COLOURS, MARKERS

RANK = 2
SIDES = {"symmetric sensing": 24, "sensing": 24, "completion": 40}
OVERSAMPLING = (1.5, 2.0, 3.0, 4.0, 6.0)
TYPICAL = 4.0
KAPPAS = {"ScaledGD": (1.0, 10.0, 100.0, 1000.0), "GD": (1.0, 10.0)}
KAPPA = 10.0
LEARNING_RATES = {"ScaledGD": (0.35, 0.5, 0.65, 0.8), "GD": (0.5, 0.65, 0.8, 0.95)}
TICKS = (30, 60, 100, 200, 400, 1000, 2000)
METHODS = {"ScaledGD": nys.scaled_gd, "GD": optax.sgd}
TOLERANCE = 1e-6
ROUNDS = 2
# Gradients that a start costs, of a symmetric problem (where its size costs one) and of others.
STARTS = {
    "spectral": (22, 22),
    "Nyström, 1 gradient": (2, 1),
    f"Nyström, {ROUNDS} power rounds": (2 + 2 * ROUNDS, 1 + 2 * ROUNDS),
    "random, ζ = 0.1": (0, 0),
    "small, ζ = 0.001": (0, 0),
}


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Starts without access to A. --quick: only rectangular sensing, 4 problems, 160 steps."""

    trials: int = 10
    """The number of random problems per cell; results are medians and quartiles over them."""
    steps: int = 400
    """The most steps of ScaledGD; GD may make 2.5 times as many."""


def degrees_of_freedom(name: str) -> int:
    """Return the degrees of freedom d of matrices of rank r, to which p is compared."""
    m = SIDES[name]
    if name == "symmetric sensing":
        return m * RANK - RANK * (RANK - 1) // 2
    return (2 * m - RANK) * RANK


def instance(name: str, key: jax.Array, kappa: Any, p: int) -> tuple[nys.problems.Sensing, Any]:
    """Return a random problem with p measurements, and its solution.

    Args:
        name: a key of `SIDES`.
        key: the PRNG key.
        kappa: κ of M.
        p: the number of measurements.
    """
    m, spectrum = SIDES[name], kappa ** -jnp.linspace(0.0, 1.0, RANK)
    if name == "symmetric sensing":
        return nys.problems.sensing.gaussian(key, m, spectrum, p)
    if name == "sensing":
        return nys.problems.sensing.gaussian_factors(key, m, m, spectrum, p)
    *keys, entries_key = jax.random.split(key, 3)
    truth = nys.Factors(*(nys.problems.sensing.random_factor(k, m, spectrum, m) for k in keys))
    rows, columns = jnp.divmod(jax.random.choice(entries_key, m * m, (p,), replace=False), m)
    values = jnp.sum(truth.left[rows] * truth.right[columns], axis=1)
    return nys.problems.completion.observed(rows, columns, values, (m, m)), truth


def starts(problem: nys.problems.Sensing, key: jax.Array, symmetric: bool) -> Any:
    """Return the starts in the order of `STARTS`, stacked.

    Args:
        problem: the problem.
        key: the PRNG key.
        symmetric: whether M is symmetric.
    """
    init, m = nys.initializers, problem.shape[0]
    spectral = init.spectral(problem, RANK, symmetric=symmetric)
    b = problem.target()
    b = nys.linalg.symmetric_part(b) if symmetric else b
    omega = init.random_sketch(key, m, RANK, 1.0, "gaussian", problem.dtype)
    for _ in range(ROUNDS):
        omega = nys.linalg.orthonormalize(b.T @ nys.linalg.orthonormalize(b @ omega))
    if symmetric:
        sketched = init.nystrom_from_gradient(key, problem.gradient, m, RANK)
        nystrom = [init.rescaled(x, problem) for x in (sketched, b @ omega)]
        small = [init.small(key, m, RANK, scale) for scale in (0.1, 1e-3)]
    else:
        sketched = init.nystrom_factors_from_gradient(key, problem.gradient, (m, m), RANK)
        # With Y_0 = 0 only GD depends on the size of X_0: ‖X_0‖² = ‖M‖ = 1.
        nystrom = [
            nys.Factors(x / nys.lapack.svd(x)[1][0], jnp.zeros_like(omega))
            for x in (sketched.left, b @ omega)
        ]
        small = [init.small_factors(key, (m, m), RANK, scale) for scale in (0.1, 1e-3)]
    return jax.tree.map(lambda *x: jnp.stack(x), spectral, *nystrom, *small)


def product(point: Any) -> jax.Array:
    """Return XXᵀ or XYᵀ."""
    return point.left @ point.right.T if isinstance(point, nys.Factors) else point @ point.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def measure(
    name: str, p: int, method: str, max_steps: int, curves: bool, keys: Any, kappas: Any
) -> Any:
    """Return errors of the starts, (κ, problem, start), and steps to the tolerance, (…, step size).

    A run that does not reach the tolerance has infinitely many steps.

    Args:
        name: a key of `SIDES`.
        p: the number of measurements.
        method: a key of `METHODS`.
        max_steps: the most steps.
        curves: whether to return errors by iteration instead of steps.
        keys: one per problem.
        kappas: condition numbers.
    """

    def one(kappa: Any, key: jax.Array) -> Any:
        problem, truth = instance(name, jax.random.fold_in(key, 0), kappa, p)
        target = product(truth)
        points = starts(problem, jax.random.fold_in(key, 1), name == "symmetric sensing")

        def error(x: Any) -> jax.Array:
            return jnp.linalg.norm(product(x) - target) / jnp.linalg.norm(target)

        def steps(x: Any, eta: Any) -> jax.Array:
            step = nys.solvers.gradient_step(problem, METHODS[method](eta))
            if curves:
                return nys.solvers.run(step, x, max_steps, error).history
            solution = nys.solvers.run_until(step, x, error, TOLERANCE, max_steps)
            reached = solution.status == nys.solvers.Status.CONVERGED
            return jnp.where(reached, solution.num_steps, jnp.inf)

        of_starts = sweep.over(steps, (0, None), (None, 0))
        return jax.vmap(error)(points), of_starts(points, jnp.asarray(LEARNING_RATES[method]))

    return sweep.over(one, (0, None), (None, 0))(kappas, keys)


def tuned(counts: np.ndarray, method: str) -> tuple[np.ndarray, float]:
    """Return steps (problem,) at the best step size, and this step size.

    The best step size fails least often, and among equals has the least median.

    Args:
        counts: steps, (problem, step size).
        method: a key of `METHODS`.
    """
    failures = np.mean(np.isinf(counts), axis=0)
    best = sweep.best(counts.T, failures, [quantile(column, 0.5) for column in counts.T])
    return best.trials, LEARNING_RATES[method][best.point]


def quantile(counts: np.ndarray, q: float) -> float:
    """Return a quantile that is one of the counts, so that infinite ones do not change others."""
    return float(np.quantile(counts, q, method="inverted_cdf"))


def cell(
    name: str, method: str, errors: np.ndarray, counts: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return the results of each start: quartiles of calls, share of successes, error, η.

    Args:
        name: a key of `SIDES`.
        method: a key of `METHODS`.
        errors: of the starts, (problem, start).
        counts: steps, (problem, start, step size).
    """
    results = {}
    for s, (start, costs) in enumerate(STARTS.items()):
        steps, rate = tuned(counts[:, s], method)
        calls = steps + costs[name != "symmetric sensing"]
        lower, median, upper = (quantile(calls, q) for q in (0.25, 0.5, 0.75))
        results[start] = {
            "lower": lower,
            "median": median,
            "upper": upper,
            "steps": quantile(steps, 0.5),
            "success": float(np.mean(np.isfinite(steps))),
            "start error": float(np.nanmedian(errors[:, s])),
            "learning rate": rate,
        }
    return results


def measure_problem(
    name: str, oversampling: Any, max_steps: int, keys: Any, bar: Any
) -> dict[str, Any]:
    """Return the numbers of a column of the picture: errors, cells by p/d, by method and κ.

    Args:
        name: a key of `SIDES`.
        oversampling: values of p/d.
        max_steps: the most steps of ScaledGD.
        keys: one per random problem.
        bar: the progress bar.
    """

    def cells(ratio: float, method: str, kappas: tuple[float, ...]) -> list[Any]:
        p = round(ratio * degrees_of_freedom(name))
        steps = max_steps if method == "ScaledGD" else max_steps * 5 // 2
        results = measure(name, p, method, steps, False, keys, jnp.asarray(kappas))
        bar.update()
        return [cell(name, method, *map(np.asarray, c)) for c in zip(*results, strict=True)]

    by_ratio: dict[float, Any] = {}
    by_kappa: dict[str, Any] = {}
    for ratio in oversampling:
        kappas = KAPPAS["ScaledGD"] if ratio == TYPICAL else (KAPPA,)
        of_kappas = cells(ratio, "ScaledGD", kappas)
        by_ratio[ratio] = of_kappas[kappas.index(KAPPA)]
        if ratio == TYPICAL:
            by_kappa["ScaledGD"] = dict(zip(kappas, of_kappas, strict=True))
    of_kappas = cells(TYPICAL, "GD", KAPPAS["GD"])
    by_kappa["GD"] = dict(zip(KAPPAS["GD"], of_kappas, strict=True))
    p = round(TYPICAL * degrees_of_freedom(name))
    _, errors = measure(name, p, "ScaledGD", 100, True, keys, jnp.asarray((KAPPA,)))
    errors = np.asarray(errors)[0, :, :, LEARNING_RATES["ScaledGD"].index(0.5)]
    bar.update()
    return {
        "error": dict(zip(STARTS, np.median(errors, axis=0), strict=True)),
        "oversampling": by_ratio,
        "condition": by_kappa,
    }


def main(config: Config) -> None:
    """Run all cells and draw them."""
    jax.config.update("jax_enable_x64", True)
    quick = config.quick
    names = ("sensing",) if quick else tuple(SIDES)
    trials, max_steps = (4, 160) if quick else (config.trials, config.steps)
    oversampling = (TYPICAL,) if quick else OVERSAMPLING
    keys = jax.random.split(jax.random.key(config.seed), trials)
    total = len(names) * (len(oversampling) + 2)
    with tqdm(total=total, desc="oracle_starts", unit="run", file=sys.stderr) as bar:
        panels = {name: measure_problem(name, oversampling, max_steps, keys, bar) for name in names}
    rates = {
        name: {
            "oversampling": column(panel["oversampling"], "learning rate"),
            "condition": {
                method: column(cells, "learning rate")
                for method, cells in panel["condition"].items()
            },
        }
        for name, panel in panels.items()
    }
    figure, curves = picture(panels), records(panels)
    columns = ("x", "value")
    save(config.out, "oracle_starts", figure, curves, config, columns=columns, learning_rates=rates)


def column(cells: dict[float, Any], quantity: str) -> dict[str, Curve]:
    """Return one number of the cells as a curve per start.

    Args:
        cells: the results of `cell` by abscissa.
        quantity: the name of the number.
    """
    return {
        start: Curve(list(cells), [results[start][quantity] for results in cells.values()])
        for start in STARTS
    }


def records(panels: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of all panels, as panel → series → Curve."""
    recorded: dict[str, Any] = {}
    for name, panel in panels.items():
        recorded[f"{name}, error by iteration"] = panel["error"]
        groups = {"oversampling": panel["oversampling"]}
        groups |= {f"condition, {method}": c for method, c in panel["condition"].items()}
        for group, cells in groups.items():
            for quantity in ("median", "lower", "upper", "steps", "success", "start error"):
                recorded[f"{name}, {group}, {quantity}"] = column(cells, quantity)
    return recorded


def draw_calls(axes: Any, cells: dict[float, Any], top: float, **style: Any) -> None:
    """Draw medians of the calls with quartiles, shifted so that bars do not cover each other.

    Args:
        axes: where to draw.
        cells: the results of `cell` by abscissa.
        top: the upper end of the axis.
        **look: options of the lines.
    """
    for index, start in enumerate(STARTS):
        curves = {name: column(cells, name)[start] for name in ("median", "lower", "upper")}
        x = np.asarray(curves["median"].x) * 1.025 ** (index - 2)
        median, lower, upper = (np.asarray(curve.y) for curve in curves.values())
        shown = np.isfinite(median)
        ends = np.stack([lower, np.minimum(upper, 2 * top)])[:, shown]
        bars = np.abs(ends - median[shown])
        options = {"color": COLOURS[index], "marker": MARKERS[index], "lw": 1.2, "elinewidth": 0.8}
        axes.errorbar(x[shown], median[shown], bars, **(options | style))


def picture(panels: dict[str, Any]) -> Any:
    """Draw a column per problem: errors, successes, calls by oversampling, calls by κ."""
    figure, grid = plt.subplots(
        4,
        len(panels),
        figsize=(4.3 * len(panels) + 0.5, 12),
        layout="constrained",
        height_ratios=(1.2, 0.7, 1, 1.1),
        squeeze=False,
    )
    for axes, (name, panel) in zip(grid.T, panels.items(), strict=True):
        errors, success, calls, condition = axes
        m = SIDES[name]
        for index, (start, curve) in enumerate(panel["error"].items()):
            style = {"color": COLOURS[index], "marker": MARKERS[index]}
            errors.plot(curve, markevery=(2 * index, 10), label=start, **style)
            shares = column(panel["oversampling"], "success")[start]
            success.plot(shares.x, np.asarray(shares.y) + 0.008 * (index - 2), **style)
        errors.set(yscale="log", ylim=(1e-10, 1e4), xlabel="iteration")
        errors.set_title(f"{name}, {m} × {m}, r = {RANK}\np = {TYPICAL:g} d, κ = 10, η = 0.5")
        success.set(ylim=(-0.06, 1.06), ylabel="successes", title="κ = 10")
        draw_calls(calls, panel["oversampling"], 1000)
        calls.set(ylim=(25, 1000), ylabel="gradients to 1e-6")
        calls.set_title("κ = 10; no mark: fewer than half succeed", fontsize=9)
        draw_calls(condition, panel["condition"]["ScaledGD"], 2000)
        draw_calls(condition, panel["condition"]["GD"], 2000, ls=":", mfc="white", lw=1.0)
        condition.set(ylim=(25, 2000), xscale="log", xlabel="condition number κ", xlim=(0.7, 1500))
        condition.set(ylabel="gradients to 1e-6", title=f"p = {TYPICAL:g} d; dotted: GD, κ ≤ 10")
        for ax in (success, calls):
            ax.set(xscale="log", xlabel="measurements over degrees of freedom, p/d")
            ax.set_xticks(OVERSAMPLING, [f"{c:g}" for c in OVERSAMPLING])
            ax.minorticks_off()
        for ax in (calls, condition):
            ax.set_yscale("log")
            ax.set_yticks(TICKS, [f"{t}" for t in TICKS])
            ax.yaxis.minorticks_off()
    grid[0, 0].set_ylabel("relative error of the matrix")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3 if len(panels) == 1 else 5)
    return figure


if __name__ == "__main__":
    command_line(main, Config)
