"""`nys.factorize` against plain products and against other tools, at their errors.

    python benchmarks/lowrank.py            # needs the extra `peers`; minutes
    python benchmarks/lowrank.py --quick    # small sizes, to see that it runs

Of `passes` the smallest is taken whose error ‖A − Â‖_F is at most that of the other tool. All run
in one process, one after another in each round. Each timed call follows a tenth of a second of
calls of the same function that are not timed, because threads of a BLAS go on spinning after a
call. No environment variable is set. Ratios are medians over rounds of the other tool's time over
ours; for products, of ours over theirs.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from jax import lax
from sklearn.utils import extmath
from timing import interleaved, ratio

import nyscaled as nys
from nyscaled.lowrank.core_svd import core_svd
from nyscaled.matrices import transpose_times

KEY = jax.random.key(0)
MOST_PASSES = 24
randomized_svd: Any = extmath.randomized_svd
DTYPES = {"float32": np.float32, "float64": np.float64}


@functools.partial(jax.jit, static_argnames="passes")
def products(a: jax.Array, x: jax.Array, passes: int) -> jax.Array:
    """A x, Aᵀ(A x), … as plain products."""
    for i in range(passes):
        # The barrier keeps XLA from merging products.
        x = lax.optimization_barrier(transpose_times(a, x) if i % 2 else a @ x)
    return x


def factors(f: nys.lowrank.LowRank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, s, right = (np.asarray(x, np.float64) for x in (f.left, f.singular_values, f.right))
    return left, s, right.T


def harmonic(n: int) -> np.ndarray:
    """An n × n matrix with σ_i = 1/i."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return (left / np.arange(1, n + 1)) @ right.T


def passes_for(run: Callable[[int], nys.lowrank.LowRank], error: Any, target: float) -> int:
    """The smallest number of passes whose error is at most the target."""
    for passes in range(2, MOST_PASSES + 1):
        if error(*factors(run(passes))) <= target:
            return passes
    raise SystemExit(f"no number of passes up to {MOST_PASSES} reaches the error {target:.9g}")


def row(
    name: str,
    dtype: str,
    seconds: Any,
    ours: str,
    other: str,
    excess: float,
    passes: int,
    goal: str,
) -> None:
    here, there = (float(np.median(seconds[x])) * 1e3 for x in (ours, other))
    value = ratio(seconds, other, ours)
    print(
        f"| {name} | {dtype} | {there:.1f} | {here:.1f} | {passes} | {excess:.1e} | {value:.2f} | "
        f"{goal} |",
        flush=True,
    )


def dense(n: int, rank: int, rounds: int) -> None:
    a = harmonic(n)
    best = float(np.linalg.norm(1 / np.arange(rank + 1, n + 1)))

    def error(u: Any, s: Any, vt: Any) -> float:
        return float(np.linalg.norm(a - (np.asarray(u, np.float64) * s) @ vt))

    print(f"\n{n} × {n}, σ_i = 1/i, k = {rank}\n")
    print("| other tool | dtype | ms | ours, ms | passes | error over the best | ratio | goal |")
    print("|---|---|---|---|---|---|---|---|")
    for label, dtype in DTYPES.items():
        x, t, m = jnp.asarray(a, dtype), torch.tensor(a.astype(dtype)), a.astype(dtype)
        peers: dict[str, tuple[Callable[[], Any], str]] = {
            "torch.svd_lowrank(q=30, niter=2)": (lambda t=t: _torch(t, rank), "≥ 2"),
            "sklearn randomized_svd(n_iter=2)": (
                lambda m=m: randomized_svd(m, rank, n_iter=2, random_state=0),
                "≥ 5",
            ),
            "sklearn randomized_svd()": (
                lambda m=m: randomized_svd(m, rank, random_state=0),
                "≥ 5",
            ),
            "scipy svds(propack)": (lambda m=m: _svds(m, rank, "propack"), "≥ 3"),
            "scipy svds(arpack)": (lambda m=m: _svds(m, rank, "arpack"), "≥ 3"),
        }
        for name, (peer, goal) in peers.items():
            # Errors that only rounding tells apart are equal.
            target = max(error(*peer()), best * (1 + 1e-9 if dtype is np.float64 else 1 + 1e-6))
            run = functools.partial(nys.factorize, x, rank, key=KEY)
            passes = passes_for(lambda p, run=run: run(passes=p), error, target)
            calls = {"ours": lambda run=run, p=passes: run(passes=p).left, name: peer}
            excess = error(*factors(run(passes=passes))) / best - 1
            row(
                name,
                label,
                interleaved(calls, rounds, warm=True),
                "ours",
                name,
                excess,
                passes,
                goal,
            )
        full = {
            "ours": lambda x=x: nys.factorize(x, rank, key=KEY).left,
            "numpy": lambda m=m: np.linalg.svd(m, full_matrices=False),
        }
        excess = error(*factors(nys.factorize(x, rank, key=KEY))) / best - 1
        row(
            "numpy.linalg.svd",
            label,
            interleaved(full, 1, warm=True),
            "ours",
            "numpy",
            excess,
            6,
            "≥ 50",
        )


def _torch(t: Any, rank: int) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(t, q=rank + 10, niter=2)
    return u[:, :rank].numpy(), s[:rank].numpy(), v[:, :rank].numpy().T


def _svds(m: Any, rank: int, solver: str) -> Any:
    return scipy.sparse.linalg.svds(m, rank, solver=solver, rng=np.random.default_rng(0))


def floors(n: int, rank: int, rounds: int) -> None:
    """Against products of the same number and width, and one step on a matrix of exact rank."""
    rng = np.random.default_rng(1)
    print(f"\n{n} × {n}, k = {rank}, against plain products with A and Aᵀ\n")
    print("| factorization | dtype | products, ms | ours, ms | passes | error | ratio | goal |")
    print("|---|---|---|---|---|---|---|---|")
    whole = harmonic(n)
    left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for _ in range(2))
    exact = {
        f"rank {rank}, κ = {k:g}": (left * np.geomspace(1, 1 / k, rank)) @ right.T
        for k in (1.0, 1e4)
    }
    for name, a, passes in (("σ_i = 1/i", whole, 6), *((k, v, 2) for k, v in exact.items())):
        for label, dtype in DTYPES.items():
            x = jnp.asarray(a, dtype)
            f = nys.factorize(x, rank, key=KEY)
            assert int(f.passes) == passes
            u, s, vt = factors(f)
            error = float(np.linalg.norm(a - (u * s) @ vt) / np.linalg.norm(a))
            columns = rank + 4 + (0 if passes == 6 else 8)
            thin = jax.random.normal(KEY, (n, columns), dtype)
            calls = {
                "ours": lambda x=x: nys.factorize(x, rank, key=KEY).left,
                "products": lambda x=x, thin=thin, p=passes: products(x, thin, p),
            }
            seconds = interleaved(calls, rounds, warm=True)
            here, there = (float(np.median(seconds[c])) * 1e3 for c in calls)
            value = ratio(seconds, "ours", "products")
            print(
                f"| {name} | {label} | {there:.1f} | {here:.1f} | {passes} | {error:.1e} | "
                f"{value:.2f} | ≤ 1.4 |",
                flush=True,
            )


def errors(n: int, rank: int) -> None:
    """How the error falls with the number of products, in float32."""
    a, best = harmonic(n), float(np.linalg.norm(1 / np.arange(rank + 1, n + 1)))
    print(f"\n{n} × {n}, σ_i = 1/i, k = {rank}, float32: the error over the best\n")
    print("| passes | error over the best |")
    print("|---|---|")
    for passes in (2, 4, 6, 8):
        f = nys.factorize(jnp.asarray(a, jnp.float32), rank, key=KEY, passes=passes)
        u, s, vt = factors(f)
        excess = np.linalg.norm(a - (u * s) @ vt) / best - 1
        print(f"| {passes} | + {excess:.2g} |", flush=True)


def threads() -> None:
    """Processor time after a small factorization has returned, in threads that go on spinning."""
    rng = np.random.default_rng(0)
    functions: dict[str, Callable[[jax.Array], Any]] = {
        "jnp.linalg.eigh": jax.jit(jnp.linalg.eigh),
        "jnp.linalg.svd": jax.jit(jnp.linalg.svd),
        "core_svd": core_svd,
    }
    print("\nProcessor time in the 50 ms after a factorization returned, median of 20 calls\n")
    print("| side |" + "".join(f" {name}, ms |" for name in functions))
    print("|---|" + "---|" * len(functions))
    for side in (32, 62, 64, 96, 128, 192):
        x = jnp.asarray(rng.standard_normal((side, side)), jnp.float32)
        print(f"| {side} |", end="")
        for fn in functions.values():
            seconds: list[float] = []
            for _ in range(20):
                jax.block_until_ready(fn(x @ x.T))
                start = time.process_time()
                time.sleep(0.05)
                seconds.append(time.process_time() - start)
            print(f" {1e3 * float(np.median(seconds)):.1f} |", end="", flush=True)
        print(flush=True)


def sparse(rows: int, columns: int, entries: int, rank: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    # Rows and columns of a few thousand times the usual size, as in data of words and of ratings.
    i, j = ((size * rng.random(entries) ** 3).astype(np.int64) for size in (rows, columns))
    a = scipy.sparse.csr_array((rng.random(entries, np.float32), (i, j)), shape=(rows, columns))
    total = float(scipy.sparse.linalg.norm(a))

    def error(u: Any, s: Any, vt: Any) -> float:
        """‖A − Â‖_F for orthonormal factors, from ‖A‖² − 2⟨A, Â⟩ + ‖Â‖²."""
        inner = np.sum(np.asarray(u, np.float64) * (a @ np.asarray(vt.T, np.float64)) * s)
        return float((total**2 - 2 * inner + np.sum(np.asarray(s, np.float64) ** 2)) ** 0.5)

    print(f"\nSciPy CSR, {rows} × {columns}, {a.nnz} entries, k = {rank}, float32\n")
    print("| other tool | dtype | ms | ours, ms | passes | error / ‖A‖ | ratio | goal |")
    print("|---|---|---|---|---|---|---|---|")
    peers: dict[str, tuple[Callable[[], Any], str]] = {
        "sklearn randomized_svd(n_iter=2)": (
            lambda: randomized_svd(a, rank, n_iter=2, random_state=0),
            "≥ 1.5",
        ),
        "scipy svds(arpack)": (lambda: _svds(a, rank, "arpack"), "≥ 3"),
    }
    for name, (peer, goal) in peers.items():
        target = error(*peer()) * (1 + 1e-6)
        # A sparse product takes time by its columns, which need not be a multiple of 8.
        run = functools.partial(nys.factorize, a, rank, key=KEY, oversampling=2)
        # An odd number makes fewer blocks orthogonal, and takes less time than the one before.
        passes = passes_for(lambda p, run=run: run(passes=p), error, target) | 1
        calls = {"ours": lambda run=run, p=passes: run(passes=p).left, name: peer}
        relative = error(*factors(run(passes=passes))) / total
        row(
            name,
            "float32",
            interleaved(calls, rounds, warm=True),
            "ours",
            name,
            relative,
            passes,
            goal,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument(
        "--only", choices=("floors", "errors", "dense", "threads", "sparse"), help="one table"
    )
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    versions = f"jax {jax.__version__}, torch {torch.__version__}, {os.cpu_count()} cores"
    print(f"{versions}, load {os.getloadavg()[0]:.1f}")
    n, rounds = (300, 2) if options.quick else (3000, 5)
    tables: dict[str, Callable[[], None]] = {
        "floors": lambda: floors(n, 20, rounds),
        "errors": lambda: errors(n, 20),
        "dense": lambda: dense(n, 20, rounds),
        "threads": threads,
        "sparse": lambda: sparse(100 * n, 50 * n, 1000 * n, 10, max(rounds // 2, 2)),
    }
    for name, table in tables.items():
        if options.only in (None, name):
            table()


if __name__ == "__main__":
    main()
