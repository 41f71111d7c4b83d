"""Read a matrix of the user; the example is an RBF kernel of scikit-learn's digits.

python -m experiments.lib.matrix digits.npy     # writes the example
"""

from __future__ import annotations

import gzip
import io
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib.files import write_atomically

# A dense matrix of this side takes 3 GB, and its eigenvalues hours.
MAX_SIDE = 20_000
MAX_TEXT = 2**30  # bytes of an unpacked .mtx file
_NUMBERS = ("real", "double", "integer")
_FIELDS = {"coordinate": (*_NUMBERS, "pattern"), "array": _NUMBERS}  # of Matrix Market


def load(path: Path) -> np.ndarray:
    """Return the square real matrix of a .npy, .npz (its only or its `a` array) or .mtx(.gz) file.

    The size in the header of a file is checked before memory is allocated.

    Raises:
        ValueError: if the file is missing, cannot be read, or does not hold one square matrix of
            at most `MAX_SIDE` rows.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a matrix as .npy, .npz or .mtx")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                matrix = _array(file)
        elif path.suffix == ".npz":
            matrix = _of_archive(path)
        elif path.name.endswith((".mtx", ".mtx.gz")):
            matrix = _matrix_market(path)
        else:
            raise ValueError(f"ends in {path.suffix!r}; expected .npy, .npz or .mtx")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a matrix: {error}") from error
    return matrix.astype(np.float64, copy=False)


def _require_square(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) != 2 or shape[0] != shape[1] or dtype.kind not in "fiu":
        got = f"shape {shape}, dtype {dtype}"
        raise ValueError(f"it holds {got}; expected a square real matrix (m, m)")
    if not 1 <= shape[0] <= MAX_SIDE:
        raise ValueError(f"it holds {shape[0]} rows; expected at least 1 and at most {MAX_SIDE}")


def _array(file: Any) -> np.ndarray:
    """Return the array of an open .npy file, after a check of its header."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"it is in version {version} of the format; expected 1.0 or 2.0")
    shape, fortran, dtype = readers[version](file)
    _require_square(shape, dtype)
    data = file.read(shape[0] * shape[1] * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _of_archive(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "a" not in names and len(names) != 1:
            raise ValueError(f"it holds {names}; expected one array, or one named 'a'")
        name = "a" if "a" in names else names[0]
        with archive.open(f"{name}.npy") as file:
            return _array(file)


def _matrix_market(path: Path) -> np.ndarray:
    """Return the matrix of a text; SciPy's reader crashes on some malformed ones."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT or b"\0" in data:
        raise ValueError(f"it has a NUL byte, or more than {MAX_TEXT} bytes; expected a text")
    # Comments may have any encoding; numbers are ASCII, and others are refused below.
    lines = io.StringIO(data.decode("latin-1"))
    header = lines.readline().lower().split()
    known = header[:2] == ["%%matrixmarket", "matrix"] and len(header) == 5
    form, field, symmetry = header[2:] if known else ("", "", "")
    if form not in _FIELDS or field not in _FIELDS[form]:
        raise ValueError("its first line is not that of a real matrix of Matrix Market")
    if symmetry not in ("general", "symmetric"):
        raise ValueError(f"it is {symmetry}; expected a general or symmetric matrix")
    words_of_lines = (line.split() for line in lines)
    sizes = next((words for words in words_of_lines if words and not words[0].startswith("%")), [])
    count = 3 if form == "coordinate" else 2
    if len(sizes) != count or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"its sizes are {' '.join(sizes)[:100]!r}; expected {count} integers")
    side, columns, *entries = map(int, sizes)
    _require_square((side, columns), np.dtype(float))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a text without numbers
        values = np.loadtxt(lines, comments="%", ndmin=2)
    if field == "integer" and (values != np.rint(values)).any():
        raise ValueError("it holds other numbers than the integers that it announces")
    if form == "coordinate":
        return _from_entries(values, side, entries[0], symmetry == "symmetric", field == "pattern")
    return _from_columns(values.ravel(), side, symmetry == "symmetric")


def _from_entries(
    values: np.ndarray, side: int, count: int, symmetric: bool, pattern: bool
) -> np.ndarray:
    """Return the matrix of rows (i, j, value), or (i, j) where all values are 1."""
    shape = (count, 2 if pattern else 3)
    if values.shape != shape and (values.size or count):
        raise ValueError(f"it holds {values.shape} numbers; expected {shape}, as announced")
    values = values.reshape(shape)
    if not np.isin(values[:, :2], np.arange(1, side + 1)).all():
        raise ValueError(f"it has entries outside of rows and columns 1 to {side}")
    places = values[:, :2].astype(np.int64) - 1
    ordered = np.sort(places, axis=1) if symmetric else places
    if len(np.unique(ordered, axis=0)) < len(ordered):
        raise ValueError(
            "it has an entry twice; expected each once, and one half of a symmetric matrix"
        )
    matrix = np.zeros((side, side))
    rows, columns = places.T
    matrix[rows, columns] = 1.0 if pattern else values[:, 2]
    if symmetric:
        matrix[columns, rows] = matrix[rows, columns]
    return matrix


def _from_columns(values: np.ndarray, side: int, symmetric: bool) -> np.ndarray:
    """Return the matrix of its columns; those of a symmetric one begin at the diagonal."""
    size = side * (side + 1) // 2 if symmetric else side**2
    if values.size != size:
        raise ValueError(f"it holds {values.size} numbers; expected {size}")
    if not symmetric:
        return values.reshape(side, side).T
    matrix = np.zeros((side, side))
    columns, rows = np.triu_indices(side)
    matrix[rows, columns] = matrix[columns, rows] = values
    return matrix


def digits_kernel() -> np.ndarray:
    """Return exp(−‖x − y‖²/(2s²)) over the 1797 digits, pixels in [0, 1], s the median distance."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = digits.data / 16.0
    squares = np.sum(images**2, axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * images @ images.T, 0)
    np.fill_diagonal(distances, 0)
    width = np.median(distances[np.triu_indices_from(distances, 1)])
    return np.exp(-distances / (2 * width))


if __name__ == "__main__":
    buffer = io.BytesIO()
    np.save(buffer, digits_kernel())
    write_atomically(Path(sys.argv[1]), buffer.getvalue())
