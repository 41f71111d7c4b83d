"""Memory and time of a factorization of a virtual matrix that no memory holds.

    python benchmarks/lowrank_stream.py                              # 2 GB in three passes
    python benchmarks/lowrank_stream.py --gigabytes 20 --passes 3    # within 1 GB of memory
    python benchmarks/lowrank_stream.py --passes 1                   # lowrank.one_pass

Rows are made when they are read: 50 terms whose sizes fall as 1/k. Peak memory is VmHWM of the
process, with its imports and the compiler (Linux only). Nothing is asserted.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import numpy as np

import nyscaled as nys

COLUMNS = 5000
TERMS = 50
RANK = 10


class Virtual:
    """Row i is Σ_k cos(ω_k i) vₖᵀ / k."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.shape, self.dtype = (rows, COLUMNS), np.dtype(np.float32)
        self._frequencies = rng.uniform(0, np.pi, TERMS)
        vectors = np.linalg.qr(rng.standard_normal((COLUMNS, TERMS)))[0]
        self._right = (vectors / np.arange(1, TERMS + 1)).T.astype(np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        i = np.arange(rows.start, rows.stop)[:, None]
        return np.cos(i * self._frequencies).astype(np.float32) @ self._right


def peak() -> float:
    """Peak memory of this process in MB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    source = Virtual(int(args.gigabytes * 1e9 / (4 * COLUMNS)))
    rows = source.shape[0]
    best = float(np.sqrt(rows / 2 * np.sum(1 / np.arange(RANK + 1.0, TERMS + 1) ** 2)))
    print(f"{rows} × {COLUMNS} float32, {args.gigabytes:g} GB; rank {RANK}; peak {peak():.0f} MB")

    a = nys.lowrank.RowBlocks(source, progress=args.progress)
    start = time.perf_counter()
    if args.passes == 1:
        f = nys.lowrank.one_pass(a, RANK)
    else:
        f = nys.factorize(a, RANK, passes=args.passes)
    error = float(f.error_estimate) / best
    seconds = time.perf_counter() - start
    print(
        f"{a.passes} passes, {seconds:.1f} s, {a.passes * args.gigabytes / seconds:.2f} GB/s, "
        f"estimated error {error:.3f} of about the best, peak {peak():.0f} MB"
    )


if __name__ == "__main__":
    main()
