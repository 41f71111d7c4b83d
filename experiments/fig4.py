"""Figure 4: the over-parametrized problem, r = 60 columns for a matrix of rank 20.

    python experiments/fig4.py                       # figures/fig4.png, .pdf, .csv, .json
    python experiments/fig4.py --quick --out /tmp    # a small version

Matrix and step sizes are the paper's (its Appendix E.1): GD with η = 0.01, ScaledGD-λ with η = 0.5,
λ = 0.01 from a small start, ScaledGD with † and η = 0.5 from Nyström. ξ, ζ and ξ_n are those of
`fig1.py`. The perturbed starts have full column rank, so that † is the inverse for them.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import jax
import matplotlib.pyplot as plt
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.panels import draw_comparison, draw_sensitivity
from experiments.lib.record import save
from experiments.lib.series import Panels, comparison, compiled, residual, sensitivity

SCALE = 0.1
STEPS = 60
GD_STEPS = 2000
RANK = 60


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Figure 4 of the paper. --quick: m = 200 instead of 1000."""

    precision: Literal["float32", "float64"] = "float64"
    """Floating-point type of the whole computation."""


def main(config: Config) -> None:
    """Run the experiment in the precision of the options."""
    jax.config.update("jax_enable_x64", config.precision == "float64")
    m = 200 if config.quick else 1000
    key = jax.random.key(config.seed)
    a, basis = nys.spectra.paper("fig4a", key, m)
    spectrum = jax.numpy.asarray(nys.spectra.paper_spectrum("fig4a"), a.dtype)
    record = residual(basis, spectrum)
    start_key = jax.random.fold_in(key, 1)

    def over(problem: Any) -> Panels:
        curves = comparison(problem, record, RANK, start_key, SCALE, STEPS, GD_STEPS, True)
        return curves | sensitivity(problem, record, basis, spectrum, RANK, start_key, SCALE, STEPS)

    with tqdm(total=2, desc="fig4", unit="panel", file=sys.stderr) as bar:
        curves = compiled(over, nys.problems.Symmetric(a))
        bar.update(2)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    floor = 1e-16 if config.precision == "float64" else 1e-8
    draw_comparison(axes[0], curves["a"], curves["b exact"][f"Nyström, ξ = {SCALE:g}"], floor)
    axes[0].set(title="(a) over-parametrized, rank 20, r = 60", ylabel=r"$\|XX^\top - A\|_F$")
    draw_sensitivity(axes[1], curves["b"], curves["b exact"], floor, top=1e12)
    axes[1].set(title="(b) scale and perturbation of the start", ylabel=r"$\|XX^\top - A\|_F$")
    save(config.out, "fig4", figure, curves, config)


if __name__ == "__main__":
    command_line(main, Config)
