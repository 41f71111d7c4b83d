"""Reading a user's own matrix, and the committed example: an RBF kernel of scikit-learn's digits.

python experiments/_matrix.py digits.npy     # writes the example
"""

from __future__ import annotations

import gzip
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from _record import write_atomically

# A dense matrix of this side takes 3 GB, and its eigenvalues hours.
MAX_SIDE = 20_000
MAX_TEXT = 2**32  # bytes of an unpacked .mtx file


def load(path: Path) -> np.ndarray:
    """Return the square real matrix of a .npy, .npz (its only or its `a` array) or .mtx(.gz) file.

    The size that a file announces is looked at before memory is taken for it.

    Raises:
        ValueError: if the file is missing, cannot be read, or does not hold one square matrix of
            at most `MAX_SIDE` rows.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; wanted a matrix as .npy, .npz or .mtx")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                matrix = _array(file)
        elif path.suffix == ".npz":
            matrix = _of_archive(path)
        elif path.name.endswith((".mtx", ".mtx.gz")):
            matrix = _matrix_market(path)
        else:
            raise ValueError(f"ends in {path.suffix!r}; wanted .npy, .npz or .mtx")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a matrix: {error}") from error
    return matrix.astype(np.float64)


def _require_square(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) != 2 or shape[0] != shape[1] or dtype.kind not in "fiu":
        got = f"shape {shape}, dtype {dtype}"
        raise ValueError(f"it holds {got}; wanted a square real matrix (m, m)")
    if shape[0] > MAX_SIDE:
        raise ValueError(f"it holds {shape[0]} rows; wanted at most {MAX_SIDE}")


def _array(file: Any) -> np.ndarray:
    """The array of an open .npy file, whose header comes first."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"it is in version {version} of the format; wanted 1.0 or 2.0")
    shape, fortran, dtype = readers[version](file)
    _require_square(shape, dtype)
    data = file.read(shape[0] * shape[1] * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _of_archive(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        name = "a" if "a" in names else names[0]
        if name != "a" and len(names) > 1:
            raise ValueError(f"it holds {names}; wanted one array, or one named 'a'")
        with archive.open(f"{name}.npy") as file:
            return _array(file)


def _matrix_market(path: Path) -> np.ndarray:
    import scipy.io

    size = _text_size(path)
    rows, columns, entries, form, _, _ = scipy.io.mminfo(path)
    _require_square((rows, columns), np.dtype(float))
    if form == "coordinate" and entries > size // 4:  # two numbers of a digit and what ends them
        raise ValueError(f"it announces {entries} entries in {size} bytes")
    matrix: Any = scipy.io.mmread(path)
    if form == "coordinate":
        places = matrix.row.astype(np.int64) * columns + matrix.col
        if len(np.unique(places)) < len(places):
            raise ValueError("it has an entry twice; wanted each once, of symmetric ones one half")
        matrix = matrix.toarray()
    matrix = np.asarray(matrix)
    _require_square(matrix.shape, matrix.dtype)
    return matrix


def _text_size(path: Path) -> int:
    """The length of a text, unpacked; SciPy's reader crashes on one with a NUL byte."""
    size = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while block := file.read(2**20):
            size += len(block)
            if b"\0" in block:
                raise ValueError("it has a NUL byte; wanted a text")
            if size > MAX_TEXT:
                raise ValueError(f"it is longer than {MAX_TEXT} bytes")
    return size


def digits_kernel() -> np.ndarray:
    """exp(−‖x − y‖²/(2s²)) over the 1797 digits, pixels in [0, 1], s the median distance."""
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
