"""Runs of teaching a map of heights to the U-Net of terrain, many of them in one program.

The crops, σ and noises of a step depend on the number of the run and the step only, so that methods
are compared on the same ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import cbook

from experiments.lib.subject_methods import Row
from experiments.lib.subject_runs import Job, Outcome, models, optimizer
from experiments.lib.terrain_unet import DATA, TerrainUNet, denoise

TARGETS = r".*\.(qkv|proj_out)"
DIFFICULTY = 0.5
MEAN, DEVIATION = -1.2, 1.2
"""Of ln σ in training, as in EDM (Karras et al., 2022)."""
PLUS = "nora+"
OPTIMIZERS = (Row("lora"), Row(PLUS))
"""Rows with the optimizers of all, which one program has, because it takes long to compile."""
CHUNK = 25
"""Steps in one call of the program."""
ROWS_OF_CROPS, COLUMNS_OF_CROPS = 3, 2
"""Crops of a region in which the error is measured."""


class Terrain(NamedTuple):
    """A map in two parts that have no pixel in common, with heights in [−1, 1].

    Attributes:
        trained: the part whose crops are trained on.
        held_out: the part whose crops are not.
    """

    trained: jax.Array
    held_out: jax.Array


class Plan(NamedTuple):
    """Sizes of runs.

    Attributes:
        steps: number of steps.
        batch_size: crops in a step.
        side: side of a crop.
        levels: values of σ at which the error is measured.
    """

    steps: int
    batch_size: int
    side: int
    levels: int


def jacksboro() -> Terrain:
    """Return the elevation map at Jacksboro, Tennessee, that matplotlib ships."""
    file: Any = cbook.get_sample_data("jacksboro_fault_dem.npz")
    heights = file["elevation"].astype(np.float32)
    low, high = heights.min(), heights.max()
    heights = 2 * (heights - low) / (high - low) - 1
    middle = heights.shape[1] // 2
    return Terrain(jnp.asarray(heights[:, :middle]), jnp.asarray(heights[:, middle:]))


def loss(unet: TerrainUNet, clean: Any, noise: Any, sigma: Any) -> Any:
    """Return the mean squared error of the clean image, weighted as in EDM, of each image.

    Args:
        unet: the model.
        clean: images, (batch, height, width, 1).
        noise: standard normal numbers of the same shape.
        sigma: size of the noise in each image.
    """
    noisy = clean + sigma[:, None, None, None] * noise
    difference = denoise(unet, noisy, sigma, jnp.full_like(sigma, DIFFICULTY)) - clean
    weight = (sigma**2 + DATA**2) / (sigma * DATA) ** 2
    return weight * jnp.mean(difference**2, axis=(1, 2, 3))


def drawn(heights: Any, key: Any, plan: Plan) -> tuple[Any, Any, Any]:
    """Return the crops, noises and σ of a step.

    Args:
        heights: the part of the map.
        key: PRNG key of the step.
        plan: sizes.
    """
    keys = jax.random.split(key, 4)
    size, side = (plan.batch_size,), plan.side
    starts = [
        jax.random.randint(k, size, 0, n - side + 1)
        for k, n in zip(keys, heights.shape, strict=False)
    ]

    def crop(row: Any, column: Any) -> Any:
        return jax.lax.dynamic_slice(heights, (row, column), (side, side))

    clean = jax.vmap(crop)(*starts)[..., None]
    sigma = jnp.exp(MEAN + DEVIATION * jax.random.normal(keys[3], size))
    return clean, jax.random.normal(keys[2], clean.shape), sigma


def grid(heights: Any, plan: Plan) -> tuple[Any, Any, Any]:
    """Return crops, noises and σ by which the error is measured, the same for all runs.

    σ are at the middles of equal shares of their distribution in training.

    Args:
        heights: a part of the map.
        plan: sizes.
    """
    free = [n - plan.side for n in heights.shape]
    rows = np.linspace(0, free[0], ROWS_OF_CROPS).round().astype(int)
    columns = np.linspace(0, free[1], COLUMNS_OF_CROPS).round().astype(int)
    crops = [heights[i : i + plan.side, j : j + plan.side] for i in rows for j in columns]
    clean = jnp.stack(crops)[..., None]
    shares = (jnp.arange(plan.levels) + 0.5) / plan.levels
    sigma = jnp.exp(MEAN + DEVIATION * jax.scipy.stats.norm.ppf(shares))
    noise = jax.random.normal(jax.random.key(0), (plan.levels, *clean.shape))
    return clean, noise, sigma


def train(
    unet: TerrainUNet, terrain: Terrain, jobs: Sequence[Job], plan: Plan, *, before: bool
) -> Outcome:
    """Return what runs with one method gave: losses, and errors by part of the map.

    Args:
        unet: the base without adapters.
        terrain: the map.
        jobs: the runs.
        plan: sizes.
        before: whether the errors of the base are measured too.
    """
    made = models(unet, jobs, TARGETS, alike=True)
    params, kept, frozen = made.params, made.kept, made.frozen

    def run(i: int) -> Any:
        return jax.tree.map(lambda x: x[i], params)

    def stacked(row: Row) -> Any:
        states = [optimizer(row, job.number).init(run(i)) for i, job in enumerate(jobs)]
        state: Any = jax.tree.map(lambda *x: jnp.stack(x), *states)
        rates = jnp.asarray([job.rate for job in jobs], jnp.float32)
        return state._replace(hyperparams=state.hyperparams | {"learning_rate": rates})

    state = tuple(stacked(each) for each in OPTIMIZERS)
    which = int(jobs[0].row.method == PLUS)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(j.seed), j.subject) for j in jobs])

    def errors(params: Any) -> dict[str, np.ndarray]:
        parts = (("instance", terrain.trained), ("held_out", terrain.held_out))
        measured = {
            name: _errors(params, kept, frozen, grid(heights, plan), made.graphdef)
            for name, heights in parts
        }
        return {name: np.asarray(values, float) for name, values in measured.items()}

    first = errors(params) if before else {}
    losses: list[Any] = []
    chunk = math.gcd(CHUNK, plan.steps)
    for step in range(0, plan.steps, chunk):
        params, state, values = _steps(
            params,
            state,
            kept,
            frozen,
            terrain.trained,
            keys,
            step,
            which,
            graphdef=made.graphdef,
            plan=plan,
            count=chunk,
        )
        losses.append(values)
    return Outcome(np.concatenate(losses).T, first, errors(params), params)


@functools.partial(jax.jit, static_argnames=("graphdef", "plan", "count"))
def _steps(
    params: Any,
    state: Any,
    kept: Any,
    frozen: Any,
    heights: Any,
    keys: Any,
    first: Any,
    which: Any,
    *,
    graphdef: Any,
    plan: Plan,
    count: int,
) -> Any:
    def updated(gradient: Any, states: Any, params: Any, i: int) -> Any:
        updates, state = optimizer(OPTIMIZERS[i]).update(gradient, states[i], params)
        return updates, (*states[:i], state, *states[i + 1 :])

    branches: Any = [functools.partial(updated, i=i) for i in range(len(OPTIMIZERS))]

    def one(params: Any, state: Any, kept: Any, key: Any, number: Any) -> Any:
        batch = drawn(heights, jax.random.fold_in(key, number), plan)

        def mean(params: Any) -> Any:
            return jnp.mean(loss(nnx.merge(graphdef, params, kept, frozen), *batch))

        value, gradient = jax.value_and_grad(mean)(params)
        updates, state = jax.lax.switch(which, branches, gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def step(carry: Any, number: Any) -> Any:
        run = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
        params, state = carry
        params, state, values = run(params, state, kept, keys, number)
        return (params, state), values

    (params, state), values = jax.lax.scan(step, (params, state), first + jnp.arange(count))
    return params, state, values


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _errors(params: Any, kept: Any, frozen: Any, cells: Any, graphdef: Any) -> Any:
    """The mean error of each run over crops and σ."""
    clean, noise, sigma = cells

    def at_level(each: Any) -> Any:
        noise, sigma = each

        def one(params: Any, kept: Any) -> Any:
            unet = nnx.merge(graphdef, params, kept, frozen)
            return jnp.mean(loss(unet, clean, noise, jnp.full(len(clean), sigma)))

        return jax.vmap(one)(params, kept)

    return jnp.mean(jax.lax.map(at_level, (noise, sigma)), axis=0)
