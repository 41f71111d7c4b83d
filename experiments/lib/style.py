"""How figures look: fonts, colours, markers, and one line of a panel."""

from __future__ import annotations

from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import ArrayLike

from experiments.lib.curves import Curve

# Okabe and Ito's colours, which readers with any colour vision can distinguish. Line styles and
# markers carry the same information for print without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PREDICTION: dict[str, Any] = {"color": "0.1", "lw": 0.9, "ls": (0, (4, 3))}
"""Thin, dashed and dark: a prediction or a reference."""

plt.switch_backend("agg")
matplotlib.rcParams.update(
    {
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.fontsize": 7.5,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "pdf.fonttype": 42,
        "savefig.dpi": 200,
    }
)


def look_of(index: int) -> dict[str, Any]:
    """Return colour and marker of a series; dashed with hollow markers where colours repeat.

    Args:
        index: number of the series.
    """
    repeated = index >= len(COLOURS)
    style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    return style | ({"mfc": "white", "ls": "--"} if repeated else {})


def draw(
    axes: Any, values: Curve | ArrayLike, index: int, label: str | None, **options: Any
) -> None:
    """Draw one series with the colour and the marker of its index.

    Args:
        axes: where to draw.
        values: a Curve, or errors by iteration.
        index: which colour and marker.
        label: the name of the series in the legend; None for no entry.
        **options: options of matplotlib's `plot`, which override the defaults.
    """
    curve = Curve.of(values)
    defaults = {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markevery": max(1, len(np.asarray(curve.y)) // 12),
        "label": label,
    }
    axes.plot(*curve, **(defaults | options))


def draw_prediction(axes: Any, errors: ArrayLike, floor: float, label: str | None = None) -> None:
    """Draw an exact prediction on top of the measured curve.

    Args:
        axes: where to draw.
        errors: the predicted errors by iteration.
        floor: errors below it are not drawn.
        label: the entry of the legend; None for none.
    """
    errors = np.asarray(errors)
    shown = np.where(errors > floor, errors, np.nan)
    axes.plot(np.arange(len(errors)), shown, label=label, zorder=5, **PREDICTION)
