"""What every script writes: a CSV of its curves, a JSON of how they were made, and a picture."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

import nyscaled as nys
from experiments.lib import style  # noqa: F401  # pyright: ignore[reportUnusedImport]  # sets fonts
from experiments.lib.curves import Curve, Curves, kept_iterations
from experiments.lib.files import write_atomically


def six_digits(value: Any) -> Any:
    """Return a tree of JSON values with its floats in 6 significant digits.

    Further digits depend on the processor.
    """
    if isinstance(value, Mapping):
        return {name: six_digits(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [six_digits(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, of this one from a clone too."""
    packages = ("jax", "jaxlib", "optax", "numpy", "matplotlib")
    others = {package: importlib.metadata.version(package) for package in packages}
    return {"nyscaled": nys.__version__, **others}


def save_record(out: Path, name: str, config: Any, **notes: Any) -> None:
    """Write `name`.json: the command, its options, the versions, and the notes.

    Args:
        out: the folder.
        name: the name of the figure.
        config: the options of the script.
        **notes: further entries, as JSON values.
    """
    script, *arguments = sys.argv
    record = {
        "command": " ".join(["python", os.path.relpath(script), *arguments]),
        "config": dataclasses.asdict(config),
        "versions": versions(),
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
    """Write `name`.png, .pdf, .csv (panel, series, *columns) and .json.

    Errors by iteration are drawn in full; the CSV holds those of `kept_iterations`.

    Args:
        out: the folder.
        name: the name of the figure.
        figure: the picture; it is closed.
        curves: what the CSV holds.
        config: the options of the script.
        columns: the names of x and y in the CSV.
        **notes: further entries of the JSON.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["panel", "series", *columns])
    for panel, series in curves.items():
        for label, values in series.items():
            x, y = (np.asarray(part) for part in Curve.of(values))
            if not isinstance(values, Curve):
                kept = kept_iterations(len(y))
                x, y = x[kept], y[kept]
            for abscissa, value in zip(x, y, strict=True):
                writer.writerow([panel, label, f"{abscissa:.10g}", f"{value:.6g}"])
    write_atomically(out / f"{name}.csv", text.getvalue().encode())
    save_record(out, name, config, **notes)
    # Without the creation date, equal runs write equal files.
    options = {"png": {}, "pdf": {"metadata": {"CreationDate": None}}}
    for suffix, of_suffix in options.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, bbox_inches="tight", **of_suffix)
        write_atomically(out / f"{name}.{suffix}", buffer.getvalue())
    plt.close(figure)
