"""Steps to full accuracy: ScaledGD against accelerated polar iterations and the direct factor.

    python experiments/fastest.py                     # figures/fastest.png, .pdf, .csv, .json
    python experiments/fastest.py --quick --out /tmp  # smaller matrices, fewer of them

Symmetric problems with r = r_A, eigenvalues geometric from 1 to 1/κ, Nyström starts AΩ. (a), (b):
steps to ‖XXᵀ − A‖_F ≤ 1e-12 ‖A‖_F in float64, one product with A each, medians and ranges over the
seeds. The direct factor is one product more than the start, so it counts as one step; rescaling
costs one product too, which is not counted. (c): the error after all steps in float32, for each
method also in its textbook form. The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from tqdm import tqdm

import nyscaled as nys
from experiments.lib import sweep
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.style import COLOURS, draw

STEPS = 40
TOLERANCE = 1e-12
SCALE, KAPPA = 0.1, 1e4  # ξ in (a) and (c), κ in (b)
KAPPAS = tuple(10.0**k for k in range(1, 13))
SCALES = tuple(10.0**k for k in range(-3, 4))
KAPPAS_FLOAT32 = tuple(10.0 ** (k / 2) for k in range(2, 12))


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Steps against κ and ξ, and the floor of float32.

    --quick: m = 60, r = 6, every fourth κ and third ξ, fewer methods.
    """

    trials: int = 5
    """The number of random problems per point."""
    m: int = 300
    """Side of A."""
    rank: int = 20
    """Columns of X, and the rank of A."""


def steps_of(build: Callable[[Any], Any], rescale: bool = False) -> Callable[..., Any]:
    """Return a function to the iterates of a step, X_0 … X_STEPS.

    Args:
        build: makes the step of a problem.
        rescale: whether the start is rescaled first.
    """

    def iterates(problem: Any, key: Any, x0: Any) -> Any:
        start = nys.initializers.rescaled(x0, problem.a) if rescale else x0
        return nys.solvers.run(build(problem), start, STEPS, lambda x: x).history

    return iterates


def constant(x0: Any, x: Any) -> Any:
    """Return X_0, then X in all further steps."""
    return jnp.concatenate([x0[None], jnp.broadcast_to(x, (STEPS, *x.shape))])


def direct(problem: Any, key: Any, x0: Any) -> Any:
    """Return the Nyström approximation, through an orthonormal basis of range(AΩ)."""
    return constant(x0, nys.initializers.nystrom_approximation(key, problem.a, x0.shape[1]))


def direct_textbook(problem: Any, key: Any, x0: Any) -> Any:
    """Return AΩ L⁻ᵀ with LLᵀ = ΩᵀAΩ, X_0 = AΩ."""
    omega = nys.initializers.random_sketch(
        key, x0.shape[0], x0.shape[1], SCALE, "gaussian", x0.dtype
    )
    return constant(x0, x0 @ nys.lapack.inverse_cholesky(omega.T @ x0))


def scaled_textbook(problem: Any, key: Any, x0: Any) -> Any:
    """Return the iterates of (2) at η = 1/2 with the inverse of the Gram matrix."""

    def body(x: Any, _: None) -> tuple[Any, Any]:
        return (x + problem.a @ x @ nys.lapack.inverse(x.T @ x)) / 2, x

    return jnp.concatenate(lax.scan(body, x0, length=STEPS + 1)[1:])


def qdwh_textbook(problem: Any, key: Any, x0: Any) -> Any:
    """Return the iterates of X(aC + bI)(C + cI)⁻¹, only on X and with inverses of Gram matrices."""
    bounds = nys.solvers.qdwh_step(problem).init(x0)
    eye = jnp.eye(x0.shape[1], dtype=x0.dtype)

    def body(carry: Any, _: None) -> tuple[Any, Any]:
        x, low = carry
        d = jnp.cbrt(4 * (1 - low**2) / low**4)
        root = jnp.sqrt(1 + d)
        a = root + jnp.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        dual = x @ nys.lapack.inverse(x.T @ x)
        gram = dual.T @ (problem.a @ dual)
        new = x @ (a * gram + b * eye) @ nys.lapack.inverse(gram + c * eye)
        return (new, jnp.minimum(low * (a + b * low**2) / (1 + c * low**2), 1)), x

    start = (x0 / bounds.high, bounds.low / bounds.high)
    return lax.scan(body, start, length=STEPS + 1)[1]


PLAIN, DIRECT = "ScaledGD, η = 1/2", "direct factor (Nyström approximation)"
METHODS: dict[str, Callable[..., Any]] = {
    PLAIN: steps_of(lambda p: nys.solvers.scaled_step(p, 0.5)),
    "ScaledGD, rescaled start": steps_of(lambda p: nys.solvers.scaled_step(p, 0.5), True),
    "scaled Newton, Frobenius": steps_of(lambda p: nys.solvers.scaled_newton_step(p, "frobenius")),
    "scaled Newton, Byers–Xu": steps_of(nys.solvers.scaled_newton_step),
    "scaled Newton, optimal": steps_of(lambda p: nys.solvers.scaled_newton_step(p, "optimal")),
    "QDWH": steps_of(nys.solvers.qdwh_step),
    DIRECT: direct,
}
FLOORS = (PLAIN, "scaled Newton, Byers–Xu", "QDWH", DIRECT)
TEXTBOOK: dict[str, Callable[..., Any]] = {
    PLAIN: scaled_textbook,
    "QDWH": qdwh_textbook,
    DIRECT: direct_textbook,
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def errors(
    iterates: Callable[..., Any], m: int, dtype: Any, keys: Any, spectra: Any, scales: Any
) -> Any:
    """Return ‖X_tX_tᵀ − A‖_F/‖A‖_F, (point, trial, t); each trial has one A and one Ω.

    Args:
        iterates: the method.
        m: the side of A.
        dtype: of the iteration.
        keys: one per trial.
        spectra: diag(Σ) of each point.
        scales: ξ of each point.
    """

    def one(key: Any, spectrum: Any, scale: Any) -> Any:
        a, basis = nys.spectra.psd(key, m, spectrum)
        rank, sketch = spectrum.shape[0], jax.random.fold_in(key, 1)
        problem = nys.problems.Symmetric(a.astype(dtype))
        x0 = nys.initializers.nystrom(sketch, problem.a, rank, scale.astype(dtype))
        xs = iterates(problem, sketch, x0).astype(a.dtype)

        def error(x: Any) -> Any:
            return nys.optimality.residual_in_basis(x, basis, spectrum)

        return lax.map(error, xs) / jnp.linalg.norm(spectrum)

    return sweep.over(one, (None, 0, 0), (0, None, None))(keys, spectra, scales)


def steps_to_tolerance(values: Any) -> np.ndarray:
    """Return the first t with an error below the tolerance, (point, trial); NaN for none."""
    reached = np.asarray(values) <= TOLERANCE
    return np.where(reached.any(axis=-1), np.argmax(reached, axis=-1), np.nan)


def summaries(panel: str, x: Any, label: str, values: np.ndarray) -> dict[str, dict[str, Curve]]:
    """Return median, least and largest over the trials, by panel and series.

    Args:
        panel: the name of the panel.
        x: abscissas.
        label: the name of the series.
        values: (point, trial); a value that is not finite is the worst.
    """
    values = np.nan_to_num(values, nan=np.inf, posinf=np.inf)
    return {
        panel + suffix: {label: Curve(x, curve)}
        for suffix, curve in sweep.spread(values, axis=-1).items()
    }


def main(config: Config) -> None:
    """Run the three panels and draw them."""
    jax.config.update("jax_enable_x64", True)
    m, rank, strides = (60, 6, (4, 3)) if config.quick else (config.m, config.rank, (1, 1))
    kappas, scales = KAPPAS[:: strides[0]], SCALES[:: strides[1]]
    keys = jax.random.split(jax.random.key(config.seed), config.trials)

    def spectra(values: Any) -> Any:
        return jnp.asarray([np.geomspace(1, 1 / k, rank) for k in values])

    panels: dict[str, dict[str, Curve]] = {}

    def add(panel: str, x: Any, label: str, values: np.ndarray) -> None:
        for name, series in summaries(panel, x, label, values).items():
            panels.setdefault(name, {}).update(series)

    methods = {k: v for k, v in METHODS.items() if k in FLOORS or not config.quick}
    floors = {label: METHODS[label] for label in (FLOORS[2:] if config.quick else FLOORS)}
    floors |= {f"{k}, textbook": v for k, v in TEXTBOOK.items() if k in floors}
    total = 2 * len(methods) + len(floors)
    with tqdm(total=total, desc="fastest", unit="series", file=sys.stderr) as bar:
        for label, iterates in methods.items():
            same = np.full(len(kappas), SCALE)
            curves = errors(iterates, m, "float64", keys, spectra(kappas), same)
            add("a", kappas, label, steps_to_tolerance(curves))
            bar.update()
            same = spectra(np.full(len(scales), KAPPA))
            curves = errors(iterates, m, "float64", keys, same, np.asarray(scales))
            add("b", scales, label, steps_to_tolerance(curves))
            bar.update()
        lows = KAPPAS_FLOAT32[:: strides[0]]
        for label, iterates in floors.items():
            same = np.full(len(lows), SCALE)
            curves = errors(iterates, m, "float32", keys, spectra(lows), same)
            add("c", lows, label, np.asarray(curves)[..., -1])
            bar.update()
    axes = {"a": ["kappa", "steps"], "b": ["xi", "steps"], "c": ["kappa", "relative error"]}
    notes: dict[str, Any] = {
        "axes": axes,
        "tolerance": TOLERANCE,
        "steps": STEPS,
        "xi": SCALE,
        "kappa": KAPPA,
    }
    figure = picture(panels, rank)
    save(config.out, "fastest", figure, panels, config, columns=("x", "y"), **notes)


def picture(panels: Any, rank: int) -> Any:
    """Draw steps against κ and ξ on one scale, and the floors of float32."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
    for ax, panel in zip(axes, "abc", strict=True):
        for index, (label, curve) in enumerate(panels[panel].items()):
            textbook = label.endswith(", textbook")
            method = label.removesuffix(", textbook")
            index = list(METHODS).index(method)
            style: dict[str, Any] = {"ls": ":", "mfc": "white"} if textbook else {}
            if "Byers" in method:  # may be under the curve of the optimal scaling
                style |= {"mfc": "white", "markersize": 8}
            low, high = panels[panel + " low"][label].y, panels[panel + " high"][label].y
            ax.fill_between(curve.x, low, high, color=COLOURS[index], alpha=0.12, lw=0)
            shown = Curve(curve.x, np.where(np.isfinite(curve.y), curve.y, np.nan))
            draw(ax, shown, index, None if textbook else label, markevery=1, **style)
    for ax in axes[:2]:
        ax.set(xscale="log", ylim=(0, 34))
    axes[0].set(ylabel=f"steps to a relative error of {TOLERANCE:g}", xlabel="κ")
    axes[0].set_title(f"(a) float64, ξ = {SCALE}, r = {rank}")
    axes[1].set(xlabel="ξ", title="(b) float64, κ = 1e4")
    axes[0].plot([], [], color="0.4", ls=":", marker="o", mfc="white", label="(c) as in textbooks")
    axes[2].set(xscale="log", yscale="log", xlabel="κ", title="(c) float32, error at the end")
    axes[2].set_ylabel(r"$\|XX^\top - A\|_F\,/\,\|A\|_F$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    command_line(main, Config)
