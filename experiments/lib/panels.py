"""How the panels of Figures 1 and 4 are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.lib.style import draw, draw_prediction

GREYS = ("#000000", "#555555", "#999999")


def draw_comparison(
    axes: Any,
    curves: Any,
    predicted: Any,
    floor: float,
    label: str = "exact prediction, Nyström",
    legend: str = "center right",
) -> None:
    """Draw panel (a), with logarithmic iterations, because GD makes many more than the others.

    Args:
        axes: where to draw.
        curves: errors by iteration, by series.
        predicted: a predicted curve.
        floor: the lower end of the axis.
        label: the entry of the prediction in the legend.
        legend: the place of the legend.
    """
    for index, (name, errors) in enumerate(curves.items()):
        every = np.unique(np.geomspace(1, len(errors), 16).astype(int) - 1).tolist()
        draw(axes, errors, index, name, markevery=every)
    draw_prediction(axes, predicted, floor, label)
    for line in axes.lines:
        line.set_xdata(np.asarray(line.get_xdata()) + 1)
    axes.relim()
    axes.set(xscale="log", yscale="log", xlabel="iteration + 1")
    axes.set_ylim(floor, None)
    axes.legend(loc=legend)


def draw_sensitivity(
    axes: Any, curves: Any, exact: Any, floor: float, top: float | None = None
) -> None:
    """Draw panel (b): Nyström solid with its exact curve, perturbed starts dotted and grey.

    Args:
        axes: where to draw.
        curves: errors by iteration, by series; those with an exact curve come first.
        exact: the exact curves, by series.
        floor: the lower end of the axis.
        top: the upper end of the axis, where the legend needs room.
    """
    for index, (label, errors) in enumerate(curves.items()):
        grey = index - len(exact)
        style = (
            {}
            if grey < 0
            else {"color": GREYS[grey % len(GREYS)], "linestyle": ":", "mfc": "white"}
        )
        draw(axes, errors, index, label, **style)
    for index, errors in enumerate(exact.values()):
        draw_prediction(axes, errors, floor, None if index else "exact prediction, Nyström")
    axes.set(yscale="log", xlabel="iteration")
    axes.set_ylim(floor, top)
    axes.legend(loc="upper right")


def draw_learning_rates(axes: Any, curves: Any, decay: Any, floor: float) -> None:
    """Draw panel (c): measured curves, and the slope that the spectral gap predicts.

    Args:
        axes: where to draw.
        curves: errors by iteration, by series.
        decay: the predicted decay, by series.
        floor: the level of rounding.
    """
    for index, (label, errors) in enumerate(curves.items()):
        errors, rate = np.asarray(errors), np.asarray(decay[label])
        draw(axes, errors, index, label)
        start = len(errors) // 3
        # Pinned where the measured curve is last well above rounding.
        pin = int(np.flatnonzero(errors > 1e4 * floor)[-1])
        slope = np.where(np.arange(len(errors)) >= start, errors[pin] * rate / rate[pin], np.nan)
        last = index == len(curves) - 1
        draw_prediction(axes, slope, floor, "slope that the gap predicts, ρ²ᵗ" if last else None)
    axes.set(yscale="log", xlabel="iteration")
    axes.legend(loc="upper right")
