"""Table 1, measured: iterations against the condition number and against the accuracy.

    python experiments/table1.py                      # figures/table1.*, figures/table1_accuracy.*
    python experiments/table1.py --quick --out /tmp   # four series, κ ≤ 32

Problems (1), 30 × 30, and (4), 30 × 24, with ‖A‖ = 1; EP: r = r_A = 3; OP: r = 6, r_A = 3; UP:
r = 3, r_A = 6. Singular values are geometric from 1 to 1/κ. In UP the first three go from 1 to 4/κ
and the others from 2/κ to 1/κ, so that the gap σ_{r+1}/σ_r is 1/2 for every κ.

Iterations are counted to ‖XYᵀ − A‖_F ≤ ε‖A‖_F (EP, OP, ε = 1e-8), to ‖XYᵀ − A‖_F ≤ (1 + ε) times
the best error of rank r (UP, ε = 1e-6), and, for the series "weak", to ‖YᵀA†X − I‖_F ≤ ε (UP,
1e-8). ε is so small that no direction may be left out, for any κ. Each method has the step size of
its grid of four with the least median count, chosen per κ; against ε it keeps that of κ = 10.
Counts are medians and ranges over the seeds (matrix and start). A method that reaches ε at no step
size within its cap is shown hollow at the cap, left out of the fit, and not run at larger κ. Fits
are least squares over all seeds, on those κ ≥ 10 that every seed has reached.
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
from scipy import stats
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.sweep import best, spread
from experiments.lib.table1_methods import METHODS, Case, Setting

M, N = 30, 24
KAPPAS = (1.0, 10**0.5, 10.0, 10**1.5, 1e2, 10**2.5, 1e3, 10**3.5, 1e4, 1e5, 1e6)
BASE = 10.0  # accuracies are varied at this κ
TOLERANCES = np.array([10.0**-d for d in (1.5, 3, 4.5, 6, 7.5, 9, 10.5, 12)])
SETTINGS = {
    "symmetric, EP": Setting(True, 3, 3),
    "symmetric, OP": Setting(True, 6, 3),
    "symmetric, UP": Setting(True, 3, 6),
    "asymmetric, EP": Setting(False, 3, 3),
    "asymmetric, OP": Setting(False, 6, 3),
    "asymmetric, UP": Setting(False, 3, 6),
}
GD, MODIFIED, ALTGD, NESTEROV, LOCAL, SMALL, DAMPED, OURS, WEAK = METHODS
# Which methods a panel has, and what is proved of the count: by Table 1 where it lists the method,
# "NAG" by Xu et al. 2024. None: nothing is proved, or nothing of the rate.
BOUNDS: dict[str, dict[str, str | None]] = {
    "symmetric, EP": {
        GD: "κ⁸", LOCAL: None, SMALL: None, DAMPED: None, OURS: "κ³"
    },
    "symmetric, OP": {
        GD: "κ⁸", MODIFIED: None, SMALL: None, DAMPED: "log²κ", OURS: "κ³"
    },
    "symmetric, UP": {
        GD: None, LOCAL: None, SMALL: None, DAMPED: None, OURS: None, WEAK: "1"
    },
    "asymmetric, EP": {
        GD: "κ⁴", MODIFIED: None, ALTGD: "κ²", NESTEROV: "κ", LOCAL: "1", SMALL: None,
        DAMPED: None, OURS: "1",
    },
    "asymmetric, OP": {
        GD: None, MODIFIED: "κ²", ALTGD: "κ²", NESTEROV: "κ", SMALL: None, DAMPED: None, OURS: "1",
    },
    "asymmetric, UP": {
        GD: None, ALTGD: None, LOCAL: None, SMALL: None, DAMPED: None, OURS: None, WEAK: "1"
    },
}  # fmt: skip
QUICK = {"symmetric, EP": (GD, OURS), "asymmetric, EP": (ALTGD, OURS)}
COLOURS = (
    *("#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7"),
    *("#8C6D31", "#000000", "#777777"),
)
LOOKS = dict(zip(METHODS, zip(COLOURS, "ovs^DPXo*", strict=True), strict=True))


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The complexities of Table 1, as slopes. --quick: four series, κ ≤ 32."""

    trials: int = 3
    """How many matrices and starts for each κ."""


def spectrum(setting: Setting, kappa: float) -> np.ndarray:
    """Return singular values of A, with ‖A‖ = 1 and condition number κ.

    Args:
        setting: the panel.
        kappa: κ.
    """
    if setting.columns >= setting.rank:
        return kappa ** -np.linspace(0, 1, setting.rank)
    beyond = setting.rank - setting.columns
    top = (kappa / 4) ** -np.linspace(0, 1, setting.columns)
    return np.concatenate([top, np.geomspace(2, 1, beyond) / kappa])


def accuracy(setting: Setting, name: str) -> float:
    """Return ε of the counts against κ."""
    return 1e-6 if setting.columns < setting.rank and name != WEAK else 1e-8


@functools.partial(jax.jit, static_argnums=0)
def cases(setting: Setting, values: Any, keys: Any, rates: Any, tols: Any) -> Case:
    """Return the cases of all pairs of (rate, tolerance) and key; the keys vary fastest.

    Args:
        setting: the panel.
        values: singular values of A.
        keys: one per matrix and start.
        rates: step sizes.
        tols: the tolerance of each step size.
    """

    def instance(key: Any) -> tuple[Any, ...]:
        if setting.symmetric:
            a, left = nys.spectra.psd(key, M, values)
            return a, left, left, jax.random.fold_in(key, 1)
        return (*nys.spectra.rectangular(key, M, N, values), jax.random.fold_in(key, 1))

    a, left, right, starts = jax.vmap(instance)(keys)
    repeated = [jnp.concatenate([x] * len(rates)) for x in (a, left, right, starts)]
    values = jnp.broadcast_to(values, (len(rates) * len(keys), len(values)))
    a, left, right, starts = repeated
    rates, tols = (jnp.repeat(x, len(keys)) for x in (rates, tols))
    return Case(a, left, right, values, starts, rates, tols)


@functools.partial(jax.jit, static_argnums=(0, 1))
def counted(setting: Setting, name: str, batch: Case) -> Any:
    """Return the iterations of each case; infinite for those that did not reach the tolerance.

    Args:
        setting: the panel.
        name: the method.
        batch: the cases.
    """
    method = METHODS[name]
    steps, reached = jax.vmap(lambda case: method.count(setting, case, method.cap))(batch)
    return jnp.where(reached, steps.astype(float), jnp.inf)


def measure(setting: Setting, name: str, kappas: Any, keys: Any) -> dict[str, Any]:
    """Return counts (κ, seed) at the best step sizes, and (ε, seed) at that of κ = BASE.

    Args:
        setting: the panel.
        name: the method.
        kappas: condition numbers.
        keys: one per matrix and start.
    """

    def run(kappa: float, rates: Any, tols: Any) -> np.ndarray:
        batch = cases(setting, spectrum(setting, kappa), keys, jnp.array(rates), jnp.array(tols))
        return np.asarray(counted(setting, name, batch)).reshape(len(rates), len(keys))

    rates = METHODS[name].rates
    result: dict[str, Any] = {"kappas": [], "counts": [], "rates": []}
    for kappa in kappas:  # one κ per batch: a batch takes as long as its slowest run
        table = run(kappa, rates, [accuracy(setting, name)] * len(rates))
        choice = best(table, np.median(table, axis=1))
        result["kappas"].append(kappa)
        result["counts"].append(choice.trials)
        result["rates"].append(rates[choice.point])
        if kappa >= BASE and not np.isfinite(table).any():
            break
    rate = result["rates"][result["kappas"].index(BASE)]
    width = len(rates)  # as in the batches above, so that nothing is compiled again
    parts = np.split(TOLERANCES, len(TOLERANCES) // width)
    result["by tolerance"] = np.concatenate([run(BASE, [rate] * width, part) for part in parts])
    return result


def fit(x: np.ndarray, counts: np.ndarray) -> dict[str, float] | None:
    """Return the slope of counts (point, seed) in x with its 95 % half width, or None.

    Args:
        x: abscissas, (point,); None is returned for fewer than 3 different ones.
        counts: iterations, (point, seed).
    """
    x, y = np.broadcast_to(x[:, None], counts.shape).ravel(), counts.ravel()
    if len(np.unique(x)) < 3:
        return None
    design = np.stack([x, np.ones_like(x)], axis=1)
    slope, intercept = np.linalg.lstsq(design, y)[0]
    residuals = y - slope * x - intercept
    error = np.sqrt(np.sum(residuals**2) / (len(x) - 2) / np.sum((x - x.mean()) ** 2))
    half = stats.t.ppf(0.975, len(x) - 2) * error
    return {"slope": float(slope), "half_width": float(half), "intercept": float(intercept)}


def fits(result: dict[str, Any], least: float) -> dict[str, Any]:
    """Return fits of log count to log κ, of count to log2 κ, and of count to log10 1/ε.

    Points that a seed has not reached are left out.

    Args:
        result: what `measure` returns.
        least: the least κ of the fits.
    """
    kappas, counts = np.array(result["kappas"]), np.array(result["counts"])
    use = (kappas >= least) & np.isfinite(counts).all(axis=1)
    kappas, counts = kappas[use], counts[use]
    tolerances, by_tol = -np.log10(TOLERANCES), result["by tolerance"]
    reached = np.isfinite(by_tol).all(axis=1)
    return {
        "power of kappa": fit(np.log10(kappas), np.log10(counts)),
        "per doubling of kappa": fit(np.log2(kappas), counts),
        "per digit": fit(tolerances[reached], by_tol[reached]),
    }


def text(value: dict[str, float] | None) -> str:
    """Return a slope with its half width as text."""
    if value is None:
        return "too few points"
    digits = 2 if abs(value["slope"]) < 100 else 0
    slope = round(value["slope"], digits) + 0.0  # no −0
    return f"{slope:.{digits}f} ± {value['half_width']:.{digits}f}"


def draw(axes: Any, x: Any, counts: Any, name: str, label: str) -> None:
    """Draw medians and ranges over seeds; hollow at the cap where the median is not finite.

    A range ends at the cap if a seed did not reach the tolerance. Counts of 0 are off the axis.

    Args:
        axes: where to draw.
        x: abscissas.
        counts: iterations, (x, seed).
        name: the method.
        label: the entry of the legend.
    """
    x, counts = np.asarray(x), np.asarray(counts)
    (colour, marker), cap = LOOKS[name], METHODS[name].cap
    medians = np.median(counts, axis=1)
    shown = np.isfinite(medians) & (medians >= 1)
    low, high = np.maximum(counts.min(axis=1), 0.7)[shown], counts.max(axis=1)[shown]
    high = np.where(np.isfinite(high), high, np.maximum(cap, medians[shown]))
    bars = np.stack([medians[shown] - low, high - medians[shown]])
    axes.errorbar(
        x[shown], medians[shown], bars, color=colour, marker=marker, ms=5, lw=1.3, capsize=2,
        label=label, zorder=4 if name in (OURS, WEAK) else 3,
    )  # fmt: skip
    missed = x[~np.isfinite(medians)]
    if missed.size:
        axes.plot(missed, np.full(len(missed), cap), color=colour, marker=marker, mfc="w", ls="")


def grid(results: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a figure and its axes by panel."""
    rows = 1 if len(results) < 4 else 2
    figure, axes = plt.subplots(rows, len(results) // rows, figsize=(14, 6.2 * rows), squeeze=False)
    figure.set_layout_engine("constrained", h_pad=0.15)
    return figure, dict(zip(results, axes.ravel(), strict=True))


def legend(axes: Any, title: str) -> None:
    """Draw the legend below the panel, where it covers no curve."""
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=1, title=title, title_fontsize=7.5
    )


def against_kappa(results: dict[str, Any], slopes: dict[str, Any]) -> Any:
    """Draw the counts against κ.

    Args:
        results: what `measure` returns, by panel and method.
        slopes: the fits, by panel and method.
    """
    figure, panels = grid(results)
    for panel, methods in results.items():
        axes, under = panels[panel], "UP" in panel
        for name, result in methods.items():
            slope = text(slopes[panel][name]["power of kappa"])
            bound = BOUNDS[panel][name]
            label = f"{name}: {slope}" + (f" (bound: {bound})" if bound else "")
            draw(axes, result["kappas"], result["counts"], name, label)
        if panel.startswith("symmetric") and not under:
            ours = methods[OURS]
            x = np.array([k for k in ours["kappas"] if k >= BASE])
            start = np.median(ours["counts"][ours["kappas"].index(BASE)])
            line = start + 0.5 * np.log2(x / BASE)
            axes.plot(
                x, line, color="0.3", lw=1, ls=(0, (4, 3)), label="½ log₂ κ + const", zorder=5
            )
        accuracies = "1e-6 (weak: 1e-8)" if under else "1e-8"
        axes.set(
            title=f"{panel}, to {accuracies}",
            xscale="log",
            yscale="log",
            xlabel="κ",
            ylabel="iterations",
        )
        axes.set_ylim(0.7, 2e5)
        legend(axes, "power of κ in the count, ± 95 %")
    return figure


def against_accuracy(results: dict[str, Any], slopes: dict[str, Any]) -> Any:
    """Draw the counts against ε.

    Args:
        results: what `measure` returns, by panel and method.
        slopes: the fits, by panel and method.
    """
    figure, panels = grid(results)
    for panel, methods in results.items():
        axes = panels[panel]
        for name, result in methods.items():
            label = f"{name}: {text(slopes[panel][name]['per digit'])}"
            draw(axes, TOLERANCES, result["by tolerance"], name, label)
        axes.set(
            title=f"{panel}, κ = {BASE:g}",
            xscale="log",
            yscale="log",
            xlabel="ε",
            ylabel="iterations",
        )
        axes.set_ylim(0.7, 2e5)
        axes.invert_xaxis()
        legend(axes, "iterations for a digit more, ± 95 %")
    return figure


def curves(results: dict[str, Any], x: str, y: str) -> dict[str, dict[str, Curve]]:
    """Return medians and extremes for the record, infinite where ε was not reached.

    Args:
        results: what `measure` returns, by panel and method.
        x: the entry of the abscissas.
        y: the entry of the counts.
    """
    return {
        panel + suffix: {
            name: Curve(result.get(x, TOLERANCES), spread(result[y], axis=1)[suffix])
            for name, result in methods.items()
        }
        for suffix in ("", " low", " high")
        for panel, methods in results.items()
    }


def main(config: Config) -> None:
    """Count, fit and draw."""
    jax.config.update("jax_enable_x64", True)
    keys = jax.random.split(jax.random.key(config.seed), config.trials)
    chosen = QUICK if config.quick else {panel: tuple(b) for panel, b in BOUNDS.items()}
    results: dict[str, dict[str, Any]] = {panel: {} for panel in chosen}
    with tqdm(total=sum(map(len, chosen.values())), desc="table1", file=sys.stderr) as bar:
        for panel, names in chosen.items():
            setting = SETTINGS[panel]
            kappas = [k for k in KAPPAS if k <= (32 if config.quick else 1e6)]
            kappas = [k for k in kappas if setting.columns >= setting.rank or k >= BASE]
            for name in names:
                results[panel][name] = measure(setting, name, kappas, keys)
                bar.update()
    least = 3.0 if config.quick else BASE
    slopes = {
        p: {name: fits(f, least) for name, f in methods.items()} for p, methods in results.items()
    }
    rates = {p: {name: f["rates"] for name, f in methods.items()} for p, methods in results.items()}
    notes: dict[str, Any] = {
        "fits": slopes,
        "fitted from kappa": least,
        "caps": {name: m.cap for name, m in METHODS.items()},
    }
    for name, picture, x, y in (
        ("table1", against_kappa, "kappas", "counts"),
        ("table1_accuracy", against_accuracy, "tolerances", "by tolerance"),
    ):
        columns = ("kappa" if x == "kappas" else "tolerance", "iterations")
        figure, record = picture(results, slopes), curves(results, x, y)
        save(config.out, name, figure, record, config, columns=columns, rates=rates, **notes)


if __name__ == "__main__":
    command_line(main, Config)
