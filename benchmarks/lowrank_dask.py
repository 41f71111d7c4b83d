"""`nys.factorize` against dask's `svd_compressed` on a matrix that lies in a file.

    python benchmarks/lowrank_dask.py            # 20,000 × 10,000 float32, 800 MB; needs dask
    python benchmarks/lowrank_dask.py --quick    # small, to see that it runs

Each runs twice in a process of its own: the first call compiles, the ratio is of the second. The
peak of the memory is VmHWM (Linux only; pages of the file that are mapped count in both). Errors
are measured afterwards. Our passes are the fewest whose error is at most dask's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RANK = 20


def write(path: Path, m: int, n: int) -> None:
    """A matrix of 100 terms whose sizes fall as 1/k, and noise of 1 % of the first."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((m, 100), np.float32) / np.arange(1, 101, dtype=np.float32)
    right = rng.standard_normal((100, n), np.float32)
    a = np.lib.format.open_memmap(path, "w+", np.float32, (m, n))
    for i in range(0, m, 1000):
        rows = slice(i, min(i + 1000, m))
        noise = np.float32(0.01) * rng.standard_normal((rows.stop - i, n), np.float32)
        a[rows] = left[rows] @ right + noise
    a.flush()


def peak() -> float:
    """Peak memory of this process in MB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def run(tool: str, path: Path, passes: int, out: Path) -> None:
    """Two factorizations alike; the factors are written to a file, and what was measured."""
    a = np.load(path, mmap_mode="r")
    seconds: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        u, s, vt = dask(a, passes) if tool == "dask" else nyscaled(a, passes)
        seconds.append(time.perf_counter() - start)
        np.savez(out, u=u, s=s, vt=vt)
    print(json.dumps([*seconds, peak()]))


def dask(a: np.ndarray, power: int) -> Sequence[np.ndarray]:
    import dask.array

    da: Any = dask.array  # it has no types for these
    blocks = da.from_array(a, chunks=(2000, a.shape[1]))
    return da.compute(*da.linalg.svd_compressed(blocks, RANK, n_power_iter=power, seed=0))


def nyscaled(a: np.ndarray, passes: int) -> Sequence[np.ndarray]:
    import nyscaled as nys

    f = nys.factorize(nys.lowrank.RowBlocks(a), RANK, passes=passes)
    return [np.asarray(x) for x in (f.left, f.singular_values, f.right.T)]


def error(path: Path, factors: Path) -> float:
    """‖A − Â‖_F / ‖A‖_F, by blocks of rows."""
    a = np.load(path, mmap_mode="r")
    with np.load(factors) as file:
        u, s, vt = file["u"], file["s"], file["vt"]
    left_out = whole = 0.0
    for i in range(0, len(a), 1000):
        rows = np.asarray(a[i : i + 1000])
        rest = rows - (u[i : i + 1000] * s) @ vt
        left_out += float(np.vdot(rest, rest))
        whole += float(np.vdot(rows, rows))
    return (left_out / whole) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small matrix")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        tool, path, passes, out = options.run
        return run(tool, Path(path), int(passes), Path(out))
    m, n = (2000, 1000) if options.quick else (20_000, 10_000)
    print(f"{m} × {n} float32 in a file, k = {RANK}\n")
    print("| tool | passes | first, s | second, s | peak memory, MB | error / ‖A‖ | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "a.npy", Path(folder) / "factors.npz"
        write(path, m, n)

        def measured(tool: str, passes: int) -> list[float]:
            """Seconds of the first call and the second one, peak memory, and the error."""
            command = [sys.executable, __file__, "--run", tool, str(path), str(passes), str(out)]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            return [*json.loads(lines.splitlines()[-1]), error(path, out)]

        def show(name: str, passes: str, result: Sequence[float], ratio: str) -> None:
            first, second, memory, relative = result
            print(
                f"| {name} | {passes} | {first:.2f} | {second:.2f} | {memory:.0f} | "
                f"{relative:.5f} | {ratio} |",
                flush=True,
            )

        for power in (0, 2):
            theirs = measured("dask", power)
            show(f"dask svd_compressed(n_power_iter={power})", "", theirs, "")
            for passes in range(2, 9):
                ours = measured("nyscaled", passes)
                if ours[-1] <= theirs[-1] * (1 + 1e-6):
                    show("nys.factorize", str(passes), ours, f"{theirs[1] / ours[1]:.2f}")
                    break
    return None


if __name__ == "__main__":
    main()
