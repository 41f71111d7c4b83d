"""Test matrices of `nys.factorize`, Gaussian and sparse-sign: errors and times.

    python benchmarks/lowrank_sketches.py            # a minute
    python benchmarks/lowrank_sketches.py --quick    # small sizes, to see that it runs

A sparse-sign matrix has 8 random signs in each row and zeros elsewhere. Errors are those of the
best approximation of rank 10 in a Krylov space of blocks of 16 columns, over the best error of that
rank: medians and the largest of eight keys. The matrices are 600 × 400 in double precision. Their
spectra are those of the tests, with random singular vectors, and once with those of a diagonal
matrix. Times are medians, of the shorter side of a sparse matrix.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from timing import interleaved

from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.krylov import project, sketch
from nyscaled.lowrank.products import products_of, random_block

RANK, WIDTH, SIGNS, KEYS = 10, 16, 8, 8
SPECTRA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1/i": lambda i: 1 / i,
    "2^-i": lambda i: 0.5**i,
    "flat": lambda i: 1 - 0.2 * i / i.max(),
    "gap": lambda i: np.where(i <= 10, 1.0, 1e-3),
    "noise": lambda i: np.where(i <= 5, 1.0, 0.05 * (1 - 0.5 * i / i.max())),
    "1/sqrt(i)": lambda i: i**-0.5,
}


def gaussian(seed: int, rows: int, dtype: type = np.float64) -> jax.Array:
    return random_block(jax.random.key(seed), rows, WIDTH, dtype)


def sparse_sign(seed: int, rows: int, dtype: type = np.float64) -> jax.Array:
    return jnp.asarray(as_csr(seed, rows, dtype).toarray())


def as_csr(seed: int, rows: int, dtype: type) -> scipy.sparse.csr_array:
    """The sparse-sign matrix as it is stored."""
    rng = np.random.default_rng(seed)
    columns = np.argpartition(rng.random((rows, WIDTH), np.float32), SIGNS)[:, :SIGNS]
    signs = 1 - 2 * rng.integers(0, 2, rows * SIGNS, np.int8)
    ends = np.arange(0, rows * SIGNS + 1, SIGNS)
    return scipy.sparse.csr_array((signs.astype(dtype), columns.ravel(), ends), (rows, WIDTH))


SKETCHES = {"Gaussian": gaussian, "sparse-sign": sparse_sign}


def excess(a: jax.Array, start: jax.Array, blocks: int, best: float) -> float:
    """The error of rank k in the Krylov space, over the best error."""
    products = products_of(a)
    first = sketch(products, start, jnp.zeros((a.shape[1], 0)))
    values = np.asarray(core_svd(project(products, first, blocks * WIDTH).core)[1])
    return float(jnp.sum(a**2) - np.sum(values[:RANK] ** 2)) ** 0.5 / best - 1


def errors(m: int, n: int) -> None:
    print(f"\n{m} × {n}, k = {RANK}: the error over the best, median (largest) of {KEYS} keys\n")
    print("| spectrum | vectors | passes |" + "".join(f" {name} |" for name in SKETCHES))
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for name, spectrum in SPECTRA.items():
        values = spectrum(np.arange(1.0, n + 1))
        best = float(np.linalg.norm(values[RANK:]))
        frames = [np.linalg.qr(rng.standard_normal((side, n)))[0] for side in (m, n)]
        matrices = {
            "random": (frames[0] * values) @ frames[1].T,
            "diagonal": np.eye(m, n) * values,
        }
        for vectors, matrix in matrices.items():
            a = jnp.asarray(matrix)
            for blocks in (1, 3):
                print(f"| {name} | {vectors} | {2 * blocks} |", end="")
                for draw in SKETCHES.values():
                    found = [excess(a, draw(seed, n), blocks, best) for seed in range(KEYS)]
                    print(f" {np.median(found):.2g} ({max(found):.2g}) |", end="", flush=True)
                print()


def times(rows: int, columns: int, entries: int) -> None:
    """The draw, and the first product, of a sparse matrix of SciPy."""
    rng = np.random.default_rng(0)
    i, j = ((size * rng.random(entries) ** 3).astype(np.int32) for size in (rows, columns))
    a = scipy.sparse.csr_array((rng.random(entries, np.float32), (i, j)), shape=(rows, columns))
    dense, stored = np.asarray(gaussian(0, columns, np.float32)), as_csr(0, columns, np.float32)
    jitted = jax.jit(gaussian, static_argnums=(1, 2))
    seconds = interleaved(
        {
            "Gaussian, drawn": lambda: jitted(0, columns, np.float32),
            "sparse-sign, drawn": lambda: as_csr(0, columns, np.float32),
            "Gaussian, multiplied": lambda: a @ dense,
            "sparse-sign, multiplied": lambda: a @ stored,
        },
        rounds=7,
    )
    print(f"\nSciPy CSR, {rows} × {columns}, {a.nnz} entries, {WIDTH} columns, float32\n")
    print("| step | ms |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {1e3 * float(np.median(values)):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    part = 10 if options.quick else 1
    errors(600 // part, 400 // part)
    times(300_000 // part, 150_000 // part, 3_000_000 // part)


if __name__ == "__main__":
    main()
