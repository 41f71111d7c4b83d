"""Reading a user's own matrix, and the committed example: an RBF kernel of scikit-learn's digits.

python experiments/_matrix.py digits.npy     # writes the example
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _record import write_atomically


def load(path: Path) -> np.ndarray:
    """A square real matrix from .npy, .npz (its only or its `a` array) or Matrix Market .mtx.

    Raises:
        ValueError: if the file is missing, cannot be read, or does not hold one square matrix.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; wanted a matrix as .npy, .npz or .mtx")
    try:
        if path.suffix == ".npy":
            matrix: Any = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                name = "a" if "a" in archive.files else next(iter(archive.files))
                if name != "a" and len(archive.files) > 1:
                    raise ValueError(f"holds {archive.files}; wanted one array, or one named 'a'")
                matrix = archive[name]
        elif path.name.endswith((".mtx", ".mtx.gz")):
            import scipy.io

            matrix = scipy.io.mmread(path)
            matrix = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
        else:
            raise ValueError(f"ends in {path.suffix!r}; wanted .npy, .npz or .mtx")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a matrix: {error}") from error
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "fiu":
        got = f"shape {matrix.shape}, dtype {matrix.dtype}"
        raise ValueError(f"{path} holds {got}; wanted a square real matrix (m, m)")
    return matrix.astype(np.float64)


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
