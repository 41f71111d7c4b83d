"""How the time of `nys.factorize` grows with the size of A, the rank and the tolerance.

    python benchmarks/lowrank_growth.py                     # docs/pages/assets/lowrank_growth.png
    python benchmarks/lowrank_growth.py --quick --out FILE  # small sizes, to see that it runs

Matrices have σ_i = 1/i, in float32. Beside each time stands that of the same number of plain
products of the same width. Medians of interleaved rounds in one process; nothing is asserted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from lowrank import harmonic, products
from timing import interleaved

import nyscaled as nys
from nyscaled.lowrank.adaptive import WIDTH

mpl.use("agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent.parent / "docs" / "pages" / "assets" / "lowrank_growth.png"


def width_of(rank: int) -> int:
    """Columns of a product for a rank, by default."""
    return rank + 4 + -(rank + 4) % 8


def seconds(a: jax.Array, rounds: int, **options: Any) -> tuple[float, float, nys.lowrank.LowRank]:
    """Seconds of a factorization and of its products alone, and its result."""
    f = nys.factorize(a, **options)
    width = width_of(options["rank"]) if "rank" in options else WIDTH
    thin = jax.random.normal(jax.random.key(1), (a.shape[1], width), a.dtype)
    passes = int(f.passes)
    calls: dict[str, Callable[[], jax.Array]] = {
        "ours": lambda: nys.factorize(a, **options).left,
        "products": lambda: products(a, thin, passes),
    }
    times = interleaved(calls, rounds, warm=True)
    return float(np.median(times["ours"])), float(np.median(times["products"])), f


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=OUT, help="the picture")
    options = parser.parse_args()
    rounds = 2 if options.quick else 7
    sizes = (100, 200, 300) if options.quick else (500, 1000, 1500, 2000, 3000, 4000)
    ranks = (5, 10, 20) if options.quick else (5, 10, 20, 40, 80, 160)
    tolerances = (0.5, 0.3) if options.quick else (0.5, 0.35, 0.25, 0.18, 0.12, 0.08)
    middle = jnp.asarray(harmonic(sizes[len(sizes) // 2]), jnp.float32)
    n = len(middle)
    panels: list[tuple[str, Sequence[float], Callable[[Any], Any], str]] = [
        (
            "entries of A (k = 20)",
            [size**2 for size in sizes],
            lambda m: (jnp.asarray(harmonic(int(m**0.5 + 0.5)), jnp.float32), {"rank": 20}),
            "log",
        ),
        (f"rank k ({n} × {n})", ranks, lambda k: (middle, {"rank": k}), "log"),
        (f"tolerance ({n} × {n})", tolerances, lambda t: (middle, {"tol": t}), "log"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), constrained_layout=True)
    print("| varied | value | ms | products alone, ms | passes | rank |")
    print("|---|---|---|---|---|---|")
    for ax, (label, values, case, scale) in zip(axes, panels, strict=True):
        ours: list[float] = []
        floor: list[float] = []
        for value in values:
            a, arguments = case(value)
            here, there, f = seconds(a, rounds, **arguments)
            ours.append(1e3 * here)
            floor.append(1e3 * there)
            print(
                f"| {label} | {value:g} | {ours[-1]:.1f} | {floor[-1]:.1f} | {int(f.passes)} | "
                f"{f.left.shape[1]} |",
                flush=True,
            )
        ax.plot(values, ours, "o-", color="#0072B2", label="nys.factorize")
        ax.plot(values, floor, "s--", color="#D55E00", label="its products alone")
        ax.set(xscale=scale, yscale="log", xlabel=label)
        ax.grid(alpha=0.3, which="both")
    axes[2].invert_xaxis()
    axes[2].set_xticks(tolerances, [f"{t:g}" for t in tolerances])
    axes[2].minorticks_off()
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
