"""What every experiment leaves behind: a CSV of its curves, a JSON of how they came, a picture."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np


class Curve(NamedTuple):
    """Values y at abscissas x, where these are not the iterations 0, 1, …: steps against κ, say."""

    x: Any
    y: Any

    @classmethod
    def of(cls, values: Any) -> Curve:
        """`values` if they are a Curve; otherwise they are errors by iteration."""
        if isinstance(values, cls):
            return cls(np.asarray(values.x), np.asarray(values.y))
        return cls(np.arange(len(values)), np.asarray(values))


Curves = Mapping[str, Mapping[str, Any]]
"""panel → series → a Curve, or errors by iteration."""

KEPT = 300
"""How many iterations of a series a record holds at most, beside the start."""


def kept_iterations(count: int) -> np.ndarray:
    """Return which of the iterations 0 … count − 1 a record holds: all, or KEPT on a log scale."""
    if count <= KEPT + 1:
        return np.arange(count)
    return np.unique([0, *np.geomspace(1, count - 1, KEPT).round().astype(int)])


def six_digits(value: Any) -> Any:
    """Return a tree of JSON values with its floats in 6 significant digits.

    More digits would be those of the processor.
    """
    if isinstance(value, Mapping):
        return {name: six_digits(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [six_digits(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# Okabe and Ito's colours, told apart by readers with any colour vision; line styles and markers
# carry the same information for print without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

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


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def save_record(out: Path, name: str, config: Any, **notes: Any) -> None:
    """Writes `name`.json: the command, its configuration, the versions, and the notes."""
    packages = ("nyscaled", "jax", "jaxlib", "optax", "numpy", "matplotlib")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "config": dataclasses.asdict(config),
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "float": str(jax.numpy.result_type(float)),
        **six_digits(notes),
    }
    write_atomically(
        out / f"{name}.json", (json.dumps(record, indent=1, default=str) + "\n").encode()
    )


def save(
    out: Path,
    name: str,
    figure: Any,
    curves: Curves,
    config: Any,
    *,
    columns: tuple[str, str] = ("iteration", "error"),
    **notes: Any,
) -> None:
    """Writes `name`.png, .pdf, .csv (panel, series, *columns) and .json (how it was made).

    `columns` names x and y in the CSV; the notes go into the JSON. Errors by iteration are drawn in
    full, and of more than KEPT the CSV holds those of `kept_iterations`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["panel", "series", *columns])
    for panel, series in curves.items():
        for label, values in series.items():
            curve = Curve.of(values)
            if not isinstance(values, Curve):
                held = kept_iterations(len(curve.y))
                curve = Curve(curve.x[held], curve.y[held])
            for x, y in zip(*curve, strict=True):
                writer.writerow([panel, label, f"{x:.10g}", f"{y:.6g}"])
    write_atomically(out / f"{name}.csv", text.getvalue().encode())
    save_record(out, name, config, **notes)
    for suffix in ("png", "pdf"):
        # Without the creation date, equal runs write equal files.
        metadata = {"CreationDate": None} if suffix == "pdf" else {}
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, bbox_inches="tight", metadata=metadata)
        write_atomically(out / f"{name}.{suffix}", buffer.getvalue())
    plt.close(figure)


def draw(axes: Any, values: Any, index: int, label: str, **kwargs: Any) -> None:
    """One series, a Curve or errors by iteration: colour and marker both tell it from the others."""
    curve = Curve.of(values)
    options = {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markevery": max(1, len(curve.y) // 12),
        "label": label,
    }
    axes.plot(*curve, **(options | kwargs))


def draw_prediction(axes: Any, errors: Any, floor: float, label: str | None = None) -> None:
    """An exact prediction: thin, dashed and dark, on top of the measured curve, down to `floor`."""
    errors = np.asarray(errors)
    shown = np.where(errors > floor, errors, np.nan)
    axes.plot(
        np.arange(len(errors)), shown, color="0.1", lw=0.9, ls=(0, (4, 3)), label=label, zorder=5
    )
