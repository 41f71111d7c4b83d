"""How tests run the scripts of experiments/, and read what they wrote."""

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def run(script, *args, cwd=ROOT):
    """The finished process of a script with these arguments."""
    command = [sys.executable, str(ROOT / "experiments" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def read_rows(path, columns=None):
    """{panel: {series: array (2, n) of x and y}} from a record, which has these columns."""
    curves = defaultdict(lambda: defaultdict(list))
    with path.open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["panel", "series"]
    assert columns is None or header[2:] == list(columns)
    for panel, series, x, y in rows:
        curves[panel][series].append((float(x), float(y)))
    return {p: {s: np.array(c).T for s, c in series.items()} for p, series in curves.items()}


def read_errors(path):
    """{panel: {series: errors by iteration}} from a record; for an omitted one the previous."""
    curves = {}
    for panel, series in read_rows(path, ("iteration", "error")).items():
        for label, (iterations, errors) in series.items():
            assert len(errors) <= 301
            every = np.arange(int(iterations[-1]) + 1)
            previous = np.searchsorted(iterations, every, side="right") - 1
            curves.setdefault(panel, {})[label] = errors[previous]
    return curves


def record(tmp_path_factory, name):
    """The folder of the files that the quick form of a script wrote."""
    out = tmp_path_factory.mktemp(name)
    result = run(f"{name}.py", "--quick", "--out", out)
    assert result.returncode == 0, result.stderr
    for suffix in ("png", "pdf", "csv", "json"):
        assert (out / f"{name}.{suffix}").stat().st_size > 100
    return out
