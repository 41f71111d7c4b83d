"""Table 1, measured: iterations against the condition number and against the accuracy.

    python experiments/table1.py                      # figures/table1.*, figures/table1_accuracy.*
    python experiments/table1.py --quick --out /tmp   # four series, κ ≤ 32

Problems (1), 30 × 30, and (4), 30 × 24, with ‖A‖ = 1; EP: r = r_A = 3; OP: r = 6, r_A = 3; UP: r = 3,
r_A = 6. Singular values are geometric from 1 to 1/κ; in UP the first three go from 1 to 4/κ and the
others from 2/κ to 1/κ, so that the gap σ_{r+1}/σ_r is 1/2 for every κ.

Counted are iterations to ‖XYᵀ − A‖_F ≤ ε‖A‖_F (EP, OP, ε = 1e-8), to ‖XYᵀ − A‖_F ≤ (1 + ε) times
the best error of rank r (UP, ε = 1e-6), and, for the series "weak", to ‖YᵀA†X − I‖_F ≤ ε (UP, 1e-8).
ε is so small that no direction may be left out, for any κ. Each method has the step size of its grid
of four with the least median count, chosen anew for every κ; against ε it keeps that of κ = 10.
Counts are medians and ranges over the seeds (matrix and start). A method that reaches ε at no step
size within its cap is shown hollow at the cap, left out of the fit, and not run at larger κ. Fits are
least squares over all seeds, on those κ ≥ 10 that every seed has reached.

The powers measured are those of this family of matrices and of these starts; a bound holds for all.
GD has little to lose here: its small start, ζ = 1e-6, leaves less than ε in the idle columns of OP.
Modified GD starts at α = 1e-3, where plain GD would be held up by them, and its step size,
at β² = σ_r(A), makes the κ² of its bound. Without damping, ScaledGD from small starts of
both factors of (4) fails for some seeds, in EP for most.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from _record import Curve, save
from _table1_methods import METHODS, Case, Setting
from scipy import stats
from tqdm import tqdm

import nyscaled as nys

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
LOOKS = dict(
    zip(
        METHODS,
        [
            ("#0072B2", "o"), ("#E69F00", "v"), ("#D55E00", "s"), ("#009E73", "^"),
            ("#56B4E9", "D"), ("#CC79A7", "P"), ("#8C6D31", "X"), ("#000000", "o"), ("#777777", "*"),
        ],
        strict=True,
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """The complexities of Table 1, as slopes."""

    out: Path = Path("figures")
    """Folder for the pictures and their records."""
    seed: int = 0
    """Seed of the matrices and the starts."""
    trials: int = 3
    """How many matrices and starts for each κ."""
    quick: bool = False
    """Four series, κ ≤ 32."""


def spectrum(setting: Setting, kappa: float) -> np.ndarray:
    """Singular values of A, with ‖A‖ = 1 and condition number κ."""
    if setting.columns >= setting.rank:
        return kappa ** -np.linspace(0, 1, setting.rank)
    rest = setting.rank - setting.columns
    top = (kappa / 4) ** -np.linspace(0, 1, setting.columns)
    return np.concatenate([top, np.geomspace(2, 1, rest) / kappa])


def accuracy(setting: Setting, name: str) -> float:
    """ε of the counts against κ."""
    return 1e-6 if setting.columns < setting.rank and name != WEAK else 1e-8


@functools.partial(jax.jit, static_argnums=0)
def cases(setting: Setting, values: Any, keys: Any, rates: Any, tols: Any) -> Case:
    """All pairs of (rate, tolerance) and key, the keys within."""

    def instance(key: Any) -> tuple[Any, ...]:
        if setting.symmetric:
            a, left = nys.spectra.psd(key, M, values)
            return a, left, left, jax.random.fold_in(key, 1)
        return (*nys.spectra.rectangular(key, M, N, values), jax.random.fold_in(key, 1))

    a, left, right, starts = jax.vmap(instance)(keys)
    again = [jnp.concatenate([x] * len(rates)) for x in (a, left, right, starts)]
    values = jnp.broadcast_to(values, (len(rates) * len(keys), len(values)))
    each = [jnp.repeat(x, len(keys)) for x in (rates, tols)]
    return Case(again[0], again[1], again[2], values, again[3], each[0], each[1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def counted(setting: Setting, name: str, batch: Case) -> Any:
    """Iterations of each case; infinite if it did not get there."""
    method = METHODS[name]
    steps, reached = jax.vmap(lambda case: method.count(setting, case, method.cap))(batch)
    return jnp.where(reached, steps.astype(float), jnp.inf)


def measure(setting: Setting, name: str, kappas: Any, keys: Any) -> dict[str, Any]:
    """Counts (κ, seed) at the best step sizes, and (ε, seed) at that of κ = BASE."""

    def run(kappa: float, rates: Any, tols: Any) -> np.ndarray:
        batch = cases(setting, spectrum(setting, kappa), keys, jnp.array(rates), jnp.array(tols))
        return np.asarray(counted(setting, name, batch)).reshape(len(rates), len(keys))

    rates = METHODS[name].rates
    found: dict[str, Any] = {"kappas": [], "counts": [], "rates": []}
    for kappa in kappas:  # one κ a batch: a batch takes as long as its slowest run
        table = run(kappa, rates, [accuracy(setting, name)] * len(rates))
        best = int(np.argmin(np.median(table, axis=1)))
        found["kappas"].append(kappa)
        found["counts"].append(table[best])
        found["rates"].append(rates[best])
        if kappa >= BASE and not np.isfinite(table).any():
            break
    rate = found["rates"][found["kappas"].index(BASE)]
    width = len(rates)  # of the batches above, so that nothing compiles anew
    parts = np.split(TOLERANCES, len(TOLERANCES) // width)
    found["by tolerance"] = np.concatenate([run(BASE, [rate] * width, part) for part in parts])
    return found


def fit(x: np.ndarray, counts: np.ndarray) -> dict[str, float] | None:
    """Slope of counts (point, seed) in x by least squares over all seeds, and its 95 % half width."""
    x, y = np.broadcast_to(x[:, None], counts.shape).ravel(), counts.ravel()
    if len(np.unique(x)) < 3:
        return None
    design = np.stack([x, np.ones_like(x)], axis=1)
    slope, intercept = np.linalg.lstsq(design, y)[0]
    rest = y - slope * x - intercept
    error = np.sqrt(np.sum(rest**2) / (len(x) - 2) / np.sum((x - x.mean()) ** 2))
    half = stats.t.ppf(0.975, len(x) - 2) * error
    return {"slope": float(slope), "half_width": float(half), "intercept": float(intercept)}


def fits(found: dict[str, Any], least: float) -> dict[str, Any]:
    """log count against log κ, count against log2 κ, count against log10 1/ε.

    Of κ ≥ `least`, and of points that all seeds have reached.
    """
    kappas, counts = np.array(found["kappas"]), np.array(found["counts"])
    use = (kappas >= least) & np.isfinite(counts).all(axis=1)
    kappas, counts = kappas[use], counts[use]
    tolerances, by_tol = -np.log10(TOLERANCES), found["by tolerance"]
    there = np.isfinite(by_tol).all(axis=1)
    return {
        "power of kappa": fit(np.log10(kappas), np.log10(counts)),
        "per doubling of kappa": fit(np.log2(kappas), counts),
        "per digit": fit(tolerances[there], by_tol[there]),
    }


def text(value: dict[str, float] | None) -> str:
    """A slope with its half width."""
    if value is None:
        return "too few points"
    digits = 2 if abs(value["slope"]) < 100 else 0
    slope = round(value["slope"], digits) + 0.0  # no −0
    return f"{slope:.{digits}f} ± {value['half_width']:.{digits}f}"


def draw(axes: Any, x: Any, counts: Any, name: str, label: str) -> None:
    """Medians and ranges over seeds; hollow at the cap where the median did not get there.

    A range ends at the cap if a seed did not get there; counts of 0 are off the logarithmic axis.
    """
    x, counts = np.asarray(x), np.asarray(counts)
    (colour, marker), cap = LOOKS[name], METHODS[name].cap
    middle = np.median(counts, axis=1)
    seen = np.isfinite(middle) & (middle >= 1)
    low, high = np.maximum(counts.min(axis=1), 0.7)[seen], counts.max(axis=1)[seen]
    high = np.where(np.isfinite(high), high, np.maximum(cap, middle[seen]))
    spread = np.stack([middle[seen] - low, high - middle[seen]])
    axes.errorbar(
        x[seen], middle[seen], spread, color=colour, marker=marker, ms=5, lw=1.3, capsize=2,
        label=label, zorder=4 if name in (OURS, WEAK) else 3,
    )  # fmt: skip
    missed = x[~np.isfinite(middle)]
    if missed.size:
        axes.plot(missed, np.full(len(missed), cap), color=colour, marker=marker, mfc="w", ls="")


def grid(results: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A figure and its axes by panel."""
    rows = 1 if len(results) < 4 else 2
    figure, axes = plt.subplots(rows, len(results) // rows, figsize=(14, 6.2 * rows), squeeze=False)
    figure.set_layout_engine("constrained", h_pad=0.15)
    return figure, dict(zip(results, axes.ravel(), strict=True))


def legend(axes: Any, title: str) -> None:
    """Below the panel, where no curve can be under it."""
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=1, title=title, title_fontsize=7.5
    )


def against_kappa(results: dict[str, Any], slopes: dict[str, Any]) -> Any:
    """The first figure."""
    figure, panels = grid(results)
    for panel, methods in results.items():
        axes, under = panels[panel], "UP" in panel
        for name, found in methods.items():
            slope = text(slopes[panel][name]["power of kappa"])
            bound = BOUNDS[panel][name]
            label = f"{name}: {slope}" + (f" (bound: {bound})" if bound else "")
            draw(axes, found["kappas"], found["counts"], name, label)
        if panel.startswith("symmetric") and not under:
            found = methods[OURS]
            x = np.array([k for k in found["kappas"] if k >= BASE])
            start = np.median(found["counts"][found["kappas"].index(BASE)])
            line = start + 0.5 * np.log2(x / BASE)
            axes.plot(
                x, line, color="0.3", lw=1, ls=(0, (4, 3)), label="½ log₂ κ + const", zorder=5
            )
        what = "1e-6 (weak: 1e-8)" if under else "1e-8"
        axes.set(
            title=f"{panel}, to {what}", xscale="log", yscale="log", xlabel="κ", ylabel="iterations"
        )
        axes.set_ylim(0.7, 2e5)
        legend(axes, "power of κ in the count, ± 95 %")
    return figure


def against_accuracy(results: dict[str, Any], slopes: dict[str, Any]) -> Any:
    """The second figure."""
    figure, panels = grid(results)
    for panel, methods in results.items():
        axes = panels[panel]
        for name, found in methods.items():
            label = f"{name}: {text(slopes[panel][name]['per digit'])}"
            draw(axes, TOLERANCES, found["by tolerance"], name, label)
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
    """What is recorded: medians and extremes, infinite where ε was not reached."""
    record: dict[str, dict[str, Curve]] = {}
    for end, reduce in (("", np.median), (" low", np.min), (" high", np.max)):
        for panel, methods in results.items():
            record[panel + end] = {
                name: Curve(found.get(x, TOLERANCES), reduce(found[y], axis=1))
                for name, found in methods.items()
            }
    return record


def main(config: Config) -> None:
    """Counts, fits and draws."""
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
    notes = {
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
    main(tyro.cli(Config))
