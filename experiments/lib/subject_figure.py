"""What the records and the pictures of tables of denoisers show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.lib import comparison
from experiments.lib.comparison import Endpoint
from experiments.lib.curves import Curve
from experiments.lib.paired_study import BLOCK, TUNING_SEED, PairedStudy
from experiments.lib.style import COLOURS, MARKERS, look_of
from experiments.lib.subject_methods import BASE, ROWS
from experiments.lib.tuning import Point


def tuned(study: PairedStudy) -> dict[str, Curve]:
    """Return the mean error over the tuning subjects by learning rate, at the first number."""
    curves: dict[str, Curve] = {}
    for label, row in study.rows.items():
        points: dict[float, list[float]] = {}
        for line in study.journal.lines.values():
            point = Point(line["rate"], row.first)
            own = study.identity(label, point, line["subject"], TUNING_SEED)
            if own.items() <= line.items():
                points.setdefault(line["rate"], []).append(line["instance"])
        if points:
            rates = sorted(points)
            curves[label] = Curve(rates, [float(np.mean(points[rate])) for rate in rates])
    return curves


def curves_of(runs: comparison.Runs, endpoints: Sequence[Endpoint]) -> dict[str, dict[str, Curve]]:
    """Return what the record of the picture holds.

    Args:
        runs: means over seeds by row and subject.
        endpoints: what is compared.
    """
    curves = {
        e.title: {
            label: Curve(sorted(lines), [lines[s][e.field] for s in sorted(lines)])
            for label, lines in runs.items()
        }
        for e in endpoints
    }
    curves["loss"] = {}
    for label, lines in runs.items():
        losses = np.mean([line["losses"] for line in lines.values()], axis=0)
        curves["loss"][label] = Curve(BLOCK * np.arange(1, len(losses) + 1), losses)
    return curves


def draw(
    runs: comparison.Runs,
    results: Any,
    curves: dict[str, dict[str, Curve]],
    endpoints: Sequence[Endpoint],
    tuning: str,
) -> Any:
    """Draw differences to LoRA with their intervals, errors by learning rate, and losses.

    Args:
        runs: means over seeds by row and subject.
        results: what `comparison.compare` gave, by field.
        curves: what the record holds.
        endpoints: what is compared; two are drawn.
        tuning: title of the errors by learning rate.
    """
    labels = [label for label in runs if label in ROWS and label != BASE]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for panel, axis, endpoint in zip("ab", axes, endpoints[:2], strict=False):
        found = results[endpoint.field]
        for i, label in enumerate(labels):
            result = found.get(f"{label} − {BASE}")
            if result is None or "diverged" in result:
                continue
            subjects = comparison.common(runs, label, BASE)
            one, other = (
                comparison.values(runs, endpoint.field, name, subjects) for name in (label, BASE)
            )
            axis.plot(1e3 * (one - other), np.full(len(subjects), i), ".", color="0.6", ms=4)
            axis.plot((1e3 * result["low"], 1e3 * result["high"]), (i, i), color=COLOURS[0])
            axis.plot(1e3 * result["mean"], i, MARKERS[0], color=COLOURS[0])
        margin = next((r["margin"] for r in found.values() if r["margin"] is not None), 0.0)
        axis.axvspan(-1e3 * margin, 1e3 * margin, color="0.9", zorder=0)
        axis.axvline(0, color="0.3", lw=0.8)
        axis.set(title=f"({panel}) {endpoint.title},\ndifference to {BASE}")
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_yticks(range(len(labels)), labels if panel == "a" else [""] * len(labels))
        axis.set_xlabel("difference · 10³; shaded: 2 %")
    # The draws of a step are the same for all methods, and decide most of its loss.
    base = np.asarray(curves["loss"][BASE].y)
    losses = {k: Curve(c.x, 1e3 * (c.y - base)) for k, c in curves["loss"].items()}
    for axis, of_panel in ((axes[2], curves["tuning"]), (axes[3], losses)):
        drawn = {label: curve for label, curve in of_panel.items() if label in ROWS}
        for i, (label, curve) in enumerate(drawn.items()):
            axis.plot(*curve, label=label, **look_of(i))
    axes[2].set(
        xscale="log", xlabel="learning rate", ylabel="mean squared error", title=f"(c) {tuning}"
    )
    errors = np.concatenate([curve.y for curve in curves["tuning"].values()])
    if not errors.max() <= 4 * errors.min():  # rates at which training failed
        axes[2].set_yscale("log")
    title = f"(d) loss of {BLOCK} steps at the chosen\nlearning rate, difference to {BASE}"
    axes[3].set(xlabel="step", ylabel="difference · 10³", title=title)
    axes[3].legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=4)
    return figure
