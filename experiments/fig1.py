"""Figure 1: ScaledGD from Nyström starts, exactly (a, b) and under-parametrized (c).

    python experiments/fig1.py                       # figures/fig1.png, .pdf, .csv, .json
    python experiments/fig1.py --quick --out /tmp    # a small version
    python experiments/fig1.py --matrix kernel.npy --rank 20   # panel (a) for your PSD matrix

The matrices and step sizes are the paper's (its Appendix E.1). Where it gives no number: ξ = 0.1 in
(a), ξ over 1e-3 … 10 in (b), ζ = 1e-3, ξ_n over 1e-2, 1e-4, 1e-6 added to ξ = 0.1, η over 0.5, 0.1,
0.01 in (c).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.matrix import load
from experiments.lib.panels import draw_comparison, draw_learning_rates, draw_sensitivity
from experiments.lib.record import save
from experiments.lib.series import (
    Panels,
    comparison,
    compiled,
    learning_rates,
    residual,
    sensitivity,
    weak,
)


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Figure 1 of the paper, or its panel (a) for your matrix.

    --quick: m = 200 instead of 1000, and fewer steps in (c).
    """

    precision: Literal["float32", "float64"] = "float64"
    """Floating-point type of the whole computation."""
    matrix: Path | None = None
    """A PSD matrix (.npy, .npz, .mtx), for which the comparison of panel (a) is drawn instead."""
    rank: int = 20
    """Columns of X, with --matrix."""


SCALE = 0.1
STEPS = 60
GD_STEPS = 2000


def synthetic(config: Config) -> None:
    """Draw the three panels."""
    m = 200 if config.quick else 1000
    under_steps = 400 if config.quick else 2000
    key = jax.random.key(config.seed)
    bar = tqdm(total=3, desc="fig1", unit="panel", file=sys.stderr)

    def data(name: str) -> tuple[nys.problems.Symmetric, jax.Array, jax.Array]:
        a, basis = nys.spectra.paper(name, key, m)
        spectrum = jnp.asarray(nys.spectra.paper_spectrum(name), a.dtype)
        return nys.problems.Symmetric(a), basis, spectrum

    start_key = jax.random.fold_in(key, 1)
    problem, basis, spectrum = data("fig1ab")
    record = residual(basis, spectrum)

    def exactly(problem: Any) -> Panels:
        curves = comparison(problem, record, 20, start_key, SCALE, STEPS, GD_STEPS, False)
        return curves | sensitivity(problem, record, basis, spectrum, 20, start_key, SCALE, STEPS)

    curves = compiled(exactly, problem)
    bar.update(2)
    problem, basis, spectrum = data("fig1c")
    weak_record = weak(basis, spectrum)

    def under(problem: Any) -> Panels:
        return learning_rates(problem, weak_record, spectrum, 20, start_key, SCALE, under_steps)

    curves |= compiled(under, problem)
    bar.update()
    bar.close()

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    floor = 1e-16 if config.precision == "float64" else 1e-8
    draw_comparison(axes[0], curves["a"], curves["b exact"][f"Nyström, ξ = {SCALE:g}"], floor)
    axes[0].set(title="(a) exactly parametrized, r = 20, κ = 100", ylabel=r"$\|XX^\top - A\|_F$")
    draw_sensitivity(axes[1], curves["b"], curves["b exact"], floor)
    axes[1].set(title="(b) scale and perturbation of the start", ylabel=r"$\|XX^\top - A\|_F$")
    draw_learning_rates(axes[2], curves["c"], curves["c predicted decay"], floor)
    axes[2].set(
        title="(c) under-parametrized, rank 40, r = 20", ylabel=r"$\|X^\top A^\dagger X - I\|_F$"
    )
    save(config.out, "fig1", figure, curves, config)


def spectral(path: Path, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a user's matrix scaled to ‖A‖ = 1, its eigenvectors, and its eigenvalues, descending.

    Args:
        path: the file of the matrix.
        rank: the columns of X.

    Raises:
        ValueError: if the matrix is not PSD, or its rank is not larger than `rank`.
    """
    matrix = load(path)
    nys.problems.Symmetric(jnp.asarray(matrix))  # checks shape, symmetry and values
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    if values[-1] < -1e-8 * values[0] or values[0] <= 0:
        raise ValueError(
            f"{path} has eigenvalues from {values[-1]:.3g} to {values[0]:.3g}; "
            "expected a PSD matrix"
        )
    if not 1 <= rank < np.sum(values > 1e-12 * values[0]):
        top = np.sum(values > 1e-12 * values[0]) - 1
        raise ValueError(f"rank is {rank}; expected 1 ≤ rank ≤ {top}, below the rank of {path}")
    return matrix / values[0], vectors, np.maximum(values / values[0], 0)


def excess(rank: int, basis: jax.Array, spectrum: jax.Array, x: jax.Array) -> jax.Array:
    """Return (‖XXᵀ − A‖² − ‖A_r − A‖²)/‖A‖², as ‖XXᵀ − A_r‖² − 2⟨XXᵀ, A − A_r⟩.

    Args:
        rank: r.
        basis: the eigenvectors of A.
        spectrum: the eigenvalues of A.
        x: X.
    """
    phi = basis.T @ x
    top = jnp.where(jnp.arange(spectrum.size) < rank, spectrum, 0)
    head = phi[:rank] @ phi[:rank].T - jnp.diag(top[:rank])
    tail = phi[rank:]
    beyond = 2 * jnp.sum((tail @ phi[:rank].T) ** 2) + jnp.sum((tail.T @ tail) ** 2)
    cross = jnp.sum((spectrum - top)[:, None] * phi**2)
    return (jnp.sum(head**2) + beyond - 2 * cross) / jnp.sum(spectrum**2)


def own_matrix(config: Config, path: Path) -> None:
    """Draw panel (a) for a user's matrix; the error is the excess over the best rank r.

    Args:
        config: the options.
        path: the file of the matrix.
    """
    rank = config.rank
    matrix, *eigen = spectral(path, rank)
    a, basis, spectrum = (jnp.asarray(value) for value in (matrix, *eigen))
    record = jax.tree_util.Partial(functools.partial(excess, rank), basis, spectrum)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    steps, gd_steps = (100, 200) if config.quick else (400, GD_STEPS)

    def panel(problem: Any) -> Panels:
        return comparison(problem, record, rank, key, SCALE, steps, gd_steps, False)

    with tqdm(total=1, desc=path.name, unit="panel", file=sys.stderr) as bar:
        curves = compiled(panel, nys.problems.Symmetric((a + a.T) / 2))
        bar.update()
    rate = float(nys.dynamics.subspace_rate(spectrum, rank, 0.5)) ** 2
    nystrom = np.asarray(curves["a"]["ScaledGD, Nyström"])
    middle, iterations = steps // 2, np.arange(steps // 8, steps + 1)
    slope = np.full(steps + 1, np.nan)
    slope[iterations] = nystrom[middle] * rate ** (iterations - middle)
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    label = f"rate that the gap predicts, ρ² = {rate:.4f}"
    draw_comparison(axes, curves["a"], slope, 1e-16, label, "lower left")
    axes.set_ylabel(r"$(\|XX^\top - A\|_F^2 - \|A_r - A\|_F^2)\,/\,\|A\|_F^2$")
    # The name of the file is not a formula, even if it contains dollar signs.
    stem = "".join(c if c.isprintable() else "?" for c in path.stem)
    size = f"{matrix.shape[0]} × {matrix.shape[0]}"
    axes.set_title(f"{stem}, {size}, r = {rank}", parse_math=False)
    save(config.out, f"fig1_{path.stem}", figure, curves, config, predicted_rate=rate)


def main(config: Config) -> None:
    """Run the experiment in the precision of the options."""
    jax.config.update("jax_enable_x64", config.precision == "float64")
    if config.matrix is None:
        synthetic(config)
    else:
        own_matrix(config, config.matrix)


if __name__ == "__main__":
    command_line(main, Config)
