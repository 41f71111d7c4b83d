"""The order of convergence, in 600 digits: Nyström against small and perturbed starts.

    python experiments/order.py                      # figures/order.png, .pdf, .csv, .json
    python experiments/order.py --quick --out /tmp   # r = 6, fewer digits

Iteration (2) itself, η = 1/2, on mpmath matrices in the basis of A's eigenvectors, where A is
diag(Σ, 0): from inside range(A), from range(A) plus noise in the four other coordinates, and from
small noise in all coordinates. The dashed curve is the closed form of dynamics.symmetric_errors in
the same precision. The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import matplotlib.pyplot as plt
import mpmath as mp
import numpy as np
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.record import save
from experiments.lib.style import COLOURS, MARKERS

FLOOR = mp.mpf(10) ** -300  # of the picture and the CSV


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The error down to 1e-300 from three kinds of start.

    --quick: r = 6 and 350 digits instead of r = 20 and 600.
    """


def matrix(values: np.ndarray) -> Any:
    """Return an mpmath matrix with exactly these values."""
    return mp.matrix(values.tolist())


def frobenius(x: Any) -> Any:
    """Return the Frobenius norm of an mpmath matrix."""
    return mp.mnorm(x, "f")  # pyright: ignore[reportArgumentType] (mistyped)


def errors(a: Any, start: np.ndarray, steps: int, bar: Any) -> list[Any]:
    """Return ‖X_tX_tᵀ − A‖_F of (2) with η = 1/2, t = 0 … steps, down to the floor.

    Args:
        a: A.
        start: X_0.
        steps: the most steps.
        bar: the progress bar.
    """
    x, curve = matrix(start), []
    for _ in range(steps + 1):
        curve.append(frobenius(x * x.T - a))
        if curve[-1] < FLOOR:
            break
        x = (x + a * (x * (x.T * x) ** -1)) / 2
        bar.update()
    return curve


def closed_form(phi: np.ndarray, spectrum: np.ndarray, steps: int) -> list[Any]:
    """Return the curve of dynamics.symmetric_errors from y_t = y_0^{2^t}, beyond double precision.

    Args:
        phi: Φ_0.
        spectrum: diag(Σ).
        steps: the number of steps.
    """
    root = mp.diag([mp.sqrt(float(s)) for s in spectrum])
    scaled = root**-1 * matrix(phi)
    values, vectors = mp.eigsy(scaled * scaled.T)
    y = [(mp.sqrt(v) - 1) / (mp.sqrt(v) + 1) for v in values]
    curve = []
    for _ in range(steps + 1):
        gaps = mp.diag([4 * v / (1 - v) ** 2 for v in y])
        curve.append(frobenius(root * vectors * gaps * vectors.T * root))
        y = [v**2 for v in y]
    return curve


def logarithms(curve: list[Any]) -> tuple[list[int], list[float]]:
    """Return iterations and log10 errors, down to the floor."""
    shown = [(t, float(mp.log10(e))) for t, e in enumerate(curve) if e > FLOOR]
    return [t for t, _ in shown], [e for _, e in shown]


def main(config: Config) -> None:
    """Run the three starts and draw them."""
    rank, extra, steps = (6, 2, 36) if config.quick else (20, 4, 36)
    mp.mp.dps = 350 if config.quick else 600
    spectrum = nys.spectra.paper_spectrum("fig1ab")
    spectrum = spectrum[np.linspace(0, 19, rank).round().astype(int)]
    rng = np.random.default_rng(config.seed)
    a = mp.diag([*(mp.mpf(float(s)) for s in spectrum), *([0] * extra)])
    # In the basis of its eigenvectors A is diag(Σ, 0), and QᵀΩ is Gaussian as Ω is: ξ = 0.1.
    phi = 0.1 * spectrum[:, None] * rng.standard_normal((rank, rank))
    outside = rng.standard_normal((extra, rank))
    starts = {"Nyström": np.vstack([phi, 0 * outside])}
    for noise in (1e-2, 1e-6):
        starts[f"perturbed, ξₙ = {noise:g}"] = np.vstack([phi, noise * outside])
    starts["small, ζ = 0.001"] = 1e-3 * rng.standard_normal((rank + extra, rank))
    panel = {}
    with tqdm(total=len(starts) * steps, desc="order", unit="step", file=sys.stderr) as bar:
        for label, start in starts.items():
            panel[label] = errors(a, start, steps, bar)
    exact = closed_form(phi, spectrum, len(panel["Nyström"]) - 1)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, (label, curve) in enumerate(panel.items()):
        for ax in axes:
            ax.plot(*logarithms(curve), color=COLOURS[i], marker=MARKERS[i], label=label)
    label = "closed form (of Nyström)"
    for ax in axes:
        ax.plot(*logarithms(exact), color="0.1", lw=1, ls=(0, (4, 3)), label=label, zorder=5)
        ax.axhline(np.log10(2.0**-52), color="0.5", lw=0.8, ls=":")
        ax.set(xlabel="iteration", ylabel=r"$\log_{10}\,\|XX^\top - A\|_F$")
    axes[0].text(18, np.log10(2.0**-52) - 4, "double precision ends here", fontsize=7.5, va="top")
    axes[0].set_title(f"η = 1/2, r = {rank}, κ = 100, {mp.mp.dps} digits")
    axes[0].legend(loc="lower left")
    # The slope of halving, for comparison.
    t = np.array([steps - 18, steps - 10])
    axes[1].plot(t, -12.4 - np.log10(2) * (t - t[0]), color="0.4", lw=1)
    axes[1].text(steps - 18.3, -12.6, "halving", fontsize=7.5, ha="right")
    axes[1].set(title="the same above 1e-18", ylim=(-18, 8))
    panel["closed form (Nyström)"] = exact
    curves = {
        "order": {s: [float(e) for e in c if e > FLOOR] for s, c in panel.items()},
    }
    tail = [e for e in panel["Nyström"] if e > FLOOR][-3:]
    order = float(mp.log(tail[2] / tail[1]) / mp.log(tail[1] / tail[0]))
    save(config.out, "order", figure, curves, config, digits=mp.mp.dps, last_order=order)


if __name__ == "__main__":
    command_line(main, Config)
