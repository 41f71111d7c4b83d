"""A picture of the low-rank approximability of weights, by kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nyscaled.cli.table import Row, depth, kinds

# Okabe and Ito's colours, which readers with any colour vision can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
SHARES = np.linspace(0, 1, 401)


def draw(table: Sequence[Row], title: str, tol: float | None = None) -> Figure:
    """Draw relative errors against rank, and the rank of each layer, by kind of layer.

    Args:
        table: rows of matrices.
        title: above the picture.
        tol: the tolerance that ranks were found for, below which no error is drawn.
    """
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    decay, ranks = figure.subplots(1, 2)
    groups: dict[str, list[Row]] = {}
    for kind, entry in zip(kinds([entry.name for entry in table]), table, strict=True):
        groups.setdefault(kind, []).append(entry)
    for index, (kind, group) in enumerate(groups.items()):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
        _draw_decay(decay, group, kind, colour, dash)
        _draw_ranks(ranks, group, colour, dash)
    decay.set(
        xlabel="rank / smaller side",
        ylabel="relative error (Frobenius norm)",
        yscale="log" if any(np.any(entry.errors > 0) for entry in table) else "linear",
        title="(a) error by rank: median, least and largest",
    )
    found = "(b) rank found; lines across: weights of no layer"
    ranks.set(xlabel="layer", ylabel="rank / smaller side", ylim=(0, 1.02), title=found)
    if tol is not None:
        decay.set_ylim(0.9 * tol, 1.1)
    for axes in (decay, ranks):
        axes.grid(alpha=0.3)
    decay.xaxis.set_major_formatter(PercentFormatter(1))
    ranks.yaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(title)
    figure.legend(*decay.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def write_png(path: Path, figure: Figure) -> None:
    """Write a picture.

    Args:
        path: path of the file.
        figure: the picture.
    """
    figure.savefig(path, format="png", dpi=160)


def _draw_decay(axes: Axes, group: Sequence[Row], kind: str, colour: str, dash: str) -> None:
    """Draw errors up to the rank to which all matrices of a kind are known."""
    shares = [np.arange(len(r.errors)) / min(r.rows, r.columns) for r in group]
    grid = SHARES[min(share[-1] for share in shares) >= SHARES]
    squares = [np.interp(grid, x, r.errors**2) for x, r in zip(shares, group, strict=True)]
    errors = np.sqrt(squares)
    label = kind or "matrix"
    axes.plot(grid, np.median(errors, axis=0), dash, color=colour, label=label)
    if len(group) > 1:
        low, high = errors.min(axis=0), errors.max(axis=0)
        axes.fill_between(grid, low, high, color=colour, alpha=0.12, lw=0)


def _draw_ranks(axes: Axes, group: Sequence[Row], colour: str, dash: str) -> None:
    """Draw the rank of each layer; a line across for a weight that belongs to none."""
    shares = {(r.name, depth(r.name)): r.rank / min(r.rows, r.columns) for r in group}
    layers = sorted((layer, share) for (_, layer), share in shares.items() if layer is not None)
    if layers:
        axes.plot(*zip(*layers, strict=True), dash, color=colour, marker="o", ms=3)
    for (_, layer), share in shares.items():
        if layer is None:
            axes.axhline(share, color=colour, ls=dash, lw=1)
