"""A picture of a sweep: losses by one setting, or by two as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nyscaled.finetune.progress import VALIDATION
from nyscaled.finetune.sweeping import Run

COLOUR = "#0072B2"  # of Okabe and Ito


def draw(runs: Sequence[Run], compared: str = VALIDATION) -> Figure:
    """Draw the losses of the runs of a sweep.

    Args:
        runs: the runs, which differ in one setting or two.
        compared: what the loss is called.

    Examples:
        >>> draw([Run({"rank": 4}, "", 0.7), Run({"rank": 8}, "", 0.6)]).axes[0].get_xlabel()
        'rank'
    """
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes, names = figure.subplots(), list(runs[0].settings)
    losses = [np.nan if run.loss is None else run.loss for run in runs]
    columns = [[run.settings[name] for run in runs] for name in names]
    if len(names) == 1:
        _curve(axes, columns[0], losses)
        axes.set(xlabel=names[0], ylabel=compared)
        axes.grid(alpha=0.3)
        return figure
    ticks = [list(dict.fromkeys(column)) for column in columns]
    table = np.full([len(own) for own in ticks], np.nan)
    for x, y, loss in zip(*columns, losses, strict=True):
        table[ticks[0].index(x), ticks[1].index(y)] = loss
    image = axes.imshow(table, cmap="viridis_r", aspect="auto")
    axes.set_yticks(range(len(ticks[0])), [str(value) for value in ticks[0]])
    axes.set_xticks(range(len(ticks[1])), [str(value) for value in ticks[1]])
    for x, y, loss in zip(*columns, losses, strict=True):
        i, j = ticks[0].index(x), ticks[1].index(y)
        text = "not finite" if np.isnan(loss) else f"{loss:.3f}"
        axes.text(j, i, text, ha="center", va="center", bbox={"fc": "white", "alpha": 0.6, "lw": 0})
    axes.set(ylabel=names[0], xlabel=names[1])
    figure.colorbar(image, label=compared)
    return figure


def _curve(axes: Axes, values: Sequence[int | float | str], losses: Sequence[float]) -> None:
    """Draw losses against values; numbers that span more than a factor of 3 on a log scale."""
    if any(isinstance(value, str) for value in values):
        axes.plot([str(value) for value in values], losses, "o", color=COLOUR)
        return
    order = np.argsort(np.array(values, float))
    x, y = np.array(values, float)[order], np.array(losses)[order]
    axes.plot(x, y, "o-", color=COLOUR)
    if x[0] > 0 and x[-1] > 3 * x[0]:
        axes.set_xscale("log")
