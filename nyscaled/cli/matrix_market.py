"""Matrix Market files, plain or compressed by gzip.

`scipy.io.mmread` (1.17) can crash the process on files that are cut short, so it is not used.

References:
    Boisvert, Pozo and Remington, The Matrix Market exchange formats: initial design, NISTIR 5935,
    1996.
"""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Inexact

BANNER = "%%matrixmarket"
# By field, how many numbers an entry has.
FIELDS = {"real": 1, "double": 1, "integer": 1, "complex": 2, "pattern": 0}
SYMMETRIES = ("general", "symmetric", "skew-symmetric", "hermitian")


class _Header(NamedTuple):
    sparse: bool
    field: str
    symmetry: str


def read(path: Path) -> Inexact[np.ndarray, "m n"] | scipy.sparse.csr_array:
    """Return the matrix in a Matrix Market file, in float64 or complex128.

    Args:
        path: path of the file; `.gz` at its end means that it is compressed.

    Raises:
        ValueError: on a file of another format, with more or fewer entries than it says, or with
            indices out of range.
        OSError: if it cannot be read, or its compression is broken.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        assert isinstance(file, io.TextIOBase)
        header = _header(file.readline(1000))
        line = file.readline()
        while line.startswith("%") or (line and not line.strip()):
            line = file.readline()
        sizes = [int(word) for word in line.split()]
        if len(sizes) != 2 + header.sparse or min(sizes) < 0:
            raise ValueError(f"its line of sizes is {line.strip()[:80]!r}")
        # An empty body is what loadtxt warns of.
        lines = [line for line in file if line.strip() and not line.startswith("%")]
        body = np.loadtxt(lines, ndmin=2, comments=None) if lines else np.zeros((0, 4))
    m, n = sizes[:2]
    if header.symmetry != "general" and m != n:
        raise ValueError(f"it is {header.symmetry} and has the shape {(m, n)}")
    return _sparse(header, body, m, n, sizes[2]) if header.sparse else _dense(header, body, m, n)


def _header(line: str) -> _Header:
    words = line.lower().split()
    if len(words) != 5 or words[:2] != [BANNER, "matrix"]:
        raise ValueError(f"it begins with {line[:40]!r}")
    _, _, layout, field, symmetry = words
    dense_pattern = layout == "array" and field == "pattern"
    known = layout in ("array", "coordinate") and field in FIELDS and symmetry in SYMMETRIES
    if not known or dense_pattern:
        raise ValueError(f"its kind is {layout} {field} {symmetry}")
    return _Header(layout == "coordinate", field, symmetry)


def _values(
    header: _Header, columns: Inexact[np.ndarray, "count c"]
) -> Inexact[np.ndarray, " count"]:
    if header.field == "pattern":
        return np.ones(len(columns))
    return columns[:, 0] + 1j * columns[:, 1] if header.field == "complex" else columns[:, 0]


def _mirrored(
    header: _Header, values: Inexact[np.ndarray, " count"]
) -> Inexact[np.ndarray, " count"]:
    """What the entries below the diagonal are above it."""
    if header.symmetry == "hermitian":
        return values.conj()
    return -values if header.symmetry == "skew-symmetric" else values


def _require_body(body: Inexact[np.ndarray, "count c"], count: int, columns: int) -> None:
    if len(body) != count or (count and body.shape[1] != columns):
        raise ValueError(f"it has {len(body)} entries; expected {count} of {columns} numbers")


def _sparse(
    header: _Header, body: Inexact[np.ndarray, "count c"], m: int, n: int, count: int
) -> scipy.sparse.csr_array:
    _require_body(body, count, 2 + FIELDS[header.field])
    inside = np.all((body[:, :2] >= 1) & (body[:, :2] <= (m, n)))
    places = body[:, :2].astype(np.int64) - 1 if inside else np.zeros((0, 2))
    if not inside or np.any(places + 1 != body[:, :2]):
        raise ValueError(f"it has indices out of the range of its shape {(m, n)}")
    (rows, columns), values = places.T, _values(header, body[:, 2:])
    if header.symmetry != "general":
        off = rows != columns
        upper = _mirrored(header, values[off])
        values = np.concatenate([values, upper])
        rows, columns = (
            np.concatenate([rows, columns[off]]),
            np.concatenate([columns, rows[off]]),
        )
    return scipy.sparse.csr_array((values, (rows, columns)), shape=(m, n))


def _dense(
    header: _Header, body: Inexact[np.ndarray, "count c"], m: int, n: int
) -> Inexact[np.ndarray, "m n"]:
    if header.symmetry == "general":
        _require_body(body, m * n, FIELDS[header.field])
        return _values(header, body).reshape(n, m).T
    offset = int(header.symmetry == "skew-symmetric")
    # Before any array is made: the sizes of a broken file may be large.
    _require_body(body, n * (n + 1 - 2 * offset) // 2, FIELDS[header.field])
    # Columns of the lower triangle lie one after another: rows of the upper one.
    columns, rows = np.triu_indices(n, offset)
    values = _values(header, body)
    matrix = np.zeros((m, n), values.dtype)
    matrix[columns, rows] = _mirrored(header, values)
    matrix[rows, columns] = values
    return matrix
