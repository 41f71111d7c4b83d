"""A picture of a run: losses, accuracy and learning rate by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nyscaled._files import replacing
from nyscaled.finetune.progress import METRICS, VALIDATION, Line, column, read_metrics

FILE = "curves.png"

# Okabe and Ito's colours, which readers with any colour vision can distinguish.
TRAINING, EVALUATED, OTHER = "#56B4E9", "#D55E00", "#009E73"
SMOOTH = 20
"""The thick line is a mean over a part of so many of the steps."""


def write(folder: Path, evaluated: str = VALIDATION) -> None:
    """Draw the metrics of a run into its folder.

    Args:
        folder: the folder.
        evaluated: as in `draw`.
    """
    with replacing(folder / FILE) as file:
        draw(read_metrics(folder / METRICS), evaluated).savefig(file, format="png", dpi=160)


def draw(lines: Sequence[Line], evaluated: str = VALIDATION) -> Figure:
    """Draw the losses of a run, its accuracy and its learning rate.

    Args:
        lines: lines of the metrics.
        evaluated: name of the losses that are drawn as points.

    Examples:
        >>> draw([{"step": 1, "loss": 0.7, "learning_rate": 1e-4}]).axes[0].get_ylabel()
        'loss'
    """
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    losses, others = figure.subplots(1, 2)
    step, loss, rate = _columns(lines, "loss", "learning_rate")
    losses.plot(step, loss, color=TRAINING, alpha=0.4, lw=1)
    width = max(1, len(loss) // SMOOTH)
    mean = np.convolve(loss, np.full(width, 1 / width), "valid")
    losses.plot(step[width - 1 :], mean, color=TRAINING, lw=2, label="loss of steps")
    at, evaluations = _columns(lines, column(evaluated))
    losses.plot(at, evaluations, "o-", color=EVALUATED, ms=4, label=evaluated)
    losses.set(xlabel="step", ylabel="loss", title="(a) loss")
    losses.legend()
    others.plot(step, rate, color=OTHER)
    others.set(xlabel="step", ylabel="learning rate", title="(b) learning rate")
    at, accuracy = _columns(lines, "accuracy")
    if len(at):
        right = others.twinx()
        right.plot(at, accuracy, "o-", color=EVALUATED, ms=4)
        right.set(ylabel="accuracy in validation", ylim=(0, 1))
        others.set(title="(b) learning rate, and accuracy (points)")
    for axes in (losses, others):
        axes.grid(alpha=0.3)
    return figure


def _columns(lines: Sequence[Line], *names: str) -> tuple[np.ndarray, ...]:
    """The steps of the lines that have these columns, and the columns."""
    rows = [(line["step"], *(line[n] for n in names)) for line in lines if names[0] in line]
    return tuple(np.array(rows, float).reshape(-1, 1 + len(names)).T)
