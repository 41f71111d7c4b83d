"""How well the weights of a language model are approximated by low rank.

    python experiments/weight_spectra.py                     # figures/weight_spectra.png, .csv, …
    python experiments/weight_spectra.py --quick --out /tmp  # two layers
    python experiments/weight_spectra.py --weights FOLDER    # a model folder or a .gguf file

The weights are those of SmolLM2-135M-Instruct (`make weights`), which the file holds in 4 bits. So
errors near 0.1 include the rounding to 4 bits. Each matrix is factorized by `nys.factorize` at
full rank, as `nyscaled factorize FILE --tol 0.1 --out weights.csv` does it.

(a) is the relative error in the Frobenius norm by rank, as a share of the smaller side: medians
over layers with the least and the largest. The dashed line is a Gaussian matrix of the same shape
as most weights. (b) is the share of ranks that an error of 0.1 takes in each layer. The results are
in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.style import COLOURS, MARKERS, PREDICTION
from nyscaled.cli.inputs import entries
from nyscaled.cli.table import Row, depth, kinds, row

TOL = 0.1
TOP = 8
SHARES = np.linspace(0, 1, 101)
GAUSSIAN = "Gaussian matrix"


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Low-rank approximability of the weights of a language model.

    --quick: the weights of the first two layers.
    """

    weights: Path = Path("build/weights/SmolLM2-135M-Instruct.Q4_1.gguf")
    """A model folder, or a .gguf or .safetensors file."""


def measure(config: Config) -> list[Row]:
    """Factorize every matrix and return its row, with the errors of all ranks.

    Args:
        config: the options.
    """
    pattern = r".*\.[01]\..*" if config.quick else None
    rows = []
    key = jax.random.key(config.seed)
    for entry in tqdm(entries(config.weights, pattern), desc="weight_spectra", file=sys.stderr):
        low_rank = nys.factorize(entry.load(), min(entry.shape), key=key)
        rows.append(row(entry.name, low_rank, TOP, tol=TOL))
    return rows


def errors_of(group: list[Row]) -> np.ndarray:
    """Return relative errors at `SHARES` of the smaller side, one line per matrix."""
    squares = [np.interp(SHARES, np.linspace(0, 1, len(r.errors)), r.errors**2) for r in group]
    return np.sqrt(squares)


def gaussian(rows: list[Row], seed: int) -> np.ndarray:
    """Return relative errors at `SHARES` of a Gaussian matrix.

    Args:
        rows: its shape is the most frequent one of theirs.
        seed: of its entries.
    """
    shapes = [(r.rows, r.columns) for r in rows]
    shape = max(set(shapes), key=shapes.count)
    a = jax.random.normal(jax.random.key(seed), shape)
    return errors_of([row("", nys.factorize(a, min(shape)), TOP)])[0]


def draw(groups: dict[str, list[Row]], curves: dict[str, dict[str, Curve]]) -> Any:
    """Draw errors by rank, and ranks by layer.

    Args:
        groups: rows by kind of layer.
        curves: what is drawn, by panel and kind.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for index, (kind, group) in enumerate(groups.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        dash = "-" if index < len(COLOURS) else "--"
        left.plot(*curves["error"][kind], dash, color=colour, label=kind)
        errors = errors_of(group)
        if len(group) > 1:
            left.fill_between(SHARES, errors.min(0), errors.max(0), color=colour, alpha=0.1, lw=0)
        if kind in curves["rank by layer"]:
            x, y = curves["rank by layer"][kind]
            right.plot(x, y, dash, color=colour, marker=marker, ms=3)
        else:
            right.axhline(group[0].rank / min(group[0].rows, group[0].columns), color=colour, lw=1)
    left.plot(*curves["error"][GAUSSIAN], label=GAUSSIAN, zorder=5, **PREDICTION)
    left.set(
        yscale="log",
        ylim=(0.05, 1.1),
        xlabel="rank / smaller side",
        ylabel="relative error",
        title="(a) error by rank: median, least and largest",
    )
    right.set(
        ylim=(0, 1.02),
        xlabel="layer",
        ylabel="rank / smaller side",
        title=f"(b) rank for an error of {TOL:g}; line across: the embedding",
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def main(config: Config) -> None:
    """Measure all weights and draw them."""
    rows = measure(config)
    groups: dict[str, list[Row]] = {}
    rows.sort(key=lambda r: depth(r.name) or 0)  # names are in the order of letters
    for kind, entry in zip(kinds([r.name for r in rows]), rows, strict=True):
        groups.setdefault(kind, []).append(entry)
    curves: dict[str, dict[str, Curve]] = {"error": {}, "rank by layer": {}, "share of top 8": {}}
    medians = {}
    for kind, group in groups.items():
        curves["error"][kind] = Curve(SHARES, np.median(errors_of(group), axis=0))
        shares = [r.rank / min(r.rows, r.columns) for r in group]
        layers = [layer for r in group if (layer := depth(r.name)) is not None]
        medians[kind] = {
            "rank": float(np.median(shares)),
            "stable rank": float(np.median([r.stable_rank for r in group])),
            "share of top 8": float(np.median([r.top_share for r in group])),
        }
        if layers:
            curves["rank by layer"][kind] = Curve(layers, shares)
            curves["share of top 8"][kind] = Curve(layers, [r.top_share for r in group])
    curves["error"][GAUSSIAN] = Curve(SHARES, gaussian(rows, config.seed))
    save(
        config.out,
        "weight_spectra",
        draw(groups, curves),
        curves,
        config,
        columns=("x", "value"),
        tol=TOL,
        matrices=len(rows),
        medians=medians,
    )


if __name__ == "__main__":
    command_line(main, Config)
