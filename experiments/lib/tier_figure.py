"""What `experiments/tier_*.py` draw and record."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from experiments.lib import comparison
from experiments.lib.comparison import Runs
from experiments.lib.curves import Curve
from experiments.lib.style import COLOURS, MARKERS, look_of
from experiments.lib.tier_methods import BASE, ENDPOINTS, REFERENCES, SHUFFLED


def curves_of(runs: Runs, screening: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Return what the record of the picture holds.

    Args:
        runs: the final runs by method and seed.
        screening: losses of short runs by learning rate.
    """
    curves = {
        endpoint.field.replace("_", " "): {
            label: Curve(sorted(lines), [lines[s][endpoint.field] for s in sorted(lines)])
            for label, lines in runs.items()
        }
        for endpoint in ENDPOINTS
    }
    curves["loss of ten steps"] = {}
    for label, lines in runs.items():
        losses = np.mean([line["losses"] for line in lines.values()], axis=0)
        blocks = losses[: len(losses) // 10 * 10].reshape(-1, 10).mean(axis=1)
        curves["loss of ten steps"][label] = Curve(10 * np.arange(1, len(blocks) + 1), blocks)
    return {panel: c for panel, c in curves.items() if c} | {"screening": screening}


def draw(runs: Runs, results: Any, screening: dict[str, Curve]) -> Any:
    """Draw paired differences to LoRA with their intervals, and losses by learning rate.

    Args:
        runs: the final runs by method and seed.
        results: what `comparison.compare` gave, by field.
        screening: losses of short runs by learning rate.
    """
    labels = [label for label in runs if label not in (BASE, SHUFFLED, *REFERENCES)]
    figure, axes = plt.subplots(
        1,
        3,
        figsize=(11, 0.9 + 0.32 * max(6, len(labels))),
        layout="constrained",
        width_ratios=(1, 1, 1.2),
    )
    for panel, axis, endpoint in zip("ab", axes, ENDPOINTS[:2], strict=False):
        found = results[endpoint.field]
        drawn = [label for label in labels if f"{label} − {BASE}" in found]
        for row, label in enumerate(labels):
            if label not in drawn:
                continue
            result = found[f"{label} − {BASE}"]
            seeds = comparison.common(runs, label, BASE)
            one, other = (
                comparison.values(runs, endpoint.field, name, seeds) for name in (label, BASE)
            )
            axis.plot(one - other, np.full(len(seeds), row), ".", color="0.6", ms=4)
            axis.plot((result["low"], result["high"]), (row, row), color=COLOURS[0])
            axis.plot(result["mean"], row, MARKERS[0], color=COLOURS[0])
            if label == drawn[0]:
                axis.axvspan(-result["margin"], result["margin"], color="0.9", zorder=0)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.set(
            title=f"({panel}) {endpoint.title},\ndifference to {BASE}",
            ylim=(len(labels) - 0.5, -0.5),
        )
        axis.set_yticks(range(len(labels)), labels if panel == "a" else [""] * len(labels))
        axis.set_xlabel("shaded: at most 2 % of LoRA's loss")
        axis.locator_params(axis="x", nbins=5)
    for index, (label, curve) in enumerate(screening.items()):
        axes[2].plot(*curve, label=label, **look_of(index))
    axes[2].set(
        xscale="log",
        yscale="log",
        xlabel="learning rate",
        title="(c) validation loss\nafter a short run",
    )
    axes[2].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_locator(ticker.NullLocator())
    axes[2].legend(handlelength=4)
    return figure
