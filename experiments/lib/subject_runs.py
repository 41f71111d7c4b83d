"""Runs of teaching a subject to a base, many of them in one program.

A run has its own adapters, learning rate, images and draws; all share the base. The draws of image,
crop, time and noise depend on the seed, the subject and the step only, so that methods are
compared on the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nyscaled as nys
from experiments.lib.adapter_runs import adapters, restart
from experiments.lib.subject_methods import Row
from nyscaled.diffusion import Schedule, UNet
from nyscaled.lora.adapter import AdapterState

RANK = 4
TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0)"
DECAY, CLIP = 1e-2, 1.0


class Part(NamedTuple):
    """Images of which the error is measured, in the moments of their latents.

    Attributes:
        mean: means, (images, crops, height, width, channels).
        deviation: standard deviations; zeros where an image has one latent.
        context: what the U-Net reads of the prompt, (images, length, features).
    """

    mean: Any
    deviation: Any
    context: Any


class Subject(NamedTuple):
    """What a run is about: images to train on, and images that are held out."""

    instance: Part
    held_out: Part
    others: Part


class Job(NamedTuple):
    """A run.

    Attributes:
        row: the method.
        rate: the learning rate.
        number: the second number of the method.
        subject: number of the subject.
        seed: seed of the draws and of the images.
        start: seed of the start.
    """

    row: Row
    rate: float
    number: float | None
    subject: int
    seed: int
    start: int


class Outcome(NamedTuple):
    """What runs gave, with an axis of runs in front.

    Attributes:
        losses: loss of each step, (runs, steps).
        before: mean squared error of the base by part, if it was measured.
        errors: mean squared error after the last step by part.
        params: the trained factors.
    """

    losses: np.ndarray
    before: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    params: Any


class Models(NamedTuple):
    """The models of runs, as functions of their adapters.

    Attributes:
        graphdef: structure of the U-Net with adapters.
        params: factors of each run, stacked.
        kept: what else adapters hold, stacked.
        frozen: the base.
    """

    graphdef: Any
    params: Any
    kept: Any
    frozen: Any


def models(
    unet: nnx.Module, jobs: Sequence[Job], targets: str = TARGETS, *, alike: bool = False
) -> Models:
    """Return the models of runs with one method.

    Args:
        unet: the base without adapters.
        jobs: the runs.
        targets: pattern of the layers that get adapters.
        alike: whether starts of zeros are subtracted where a method subtracts none, so that all
            methods share a program.
    """
    starts: dict[tuple[float | None, int], Any] = {}
    for job in jobs:
        if (job.number, job.start) not in starts:
            starts[job.number, job.start] = _start(unet, job, targets, alike)
    split = [starts[job.number, job.start] for job in jobs]
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    params, kept = (stack(*(parts[i] for parts in split)) for i in (1, 2))
    return Models(split[0][0], params, kept, split[0][3])


def _start(unet: nnx.Module, job: Job, targets: str, alike: bool) -> Any:
    model = nnx.clone(unet)
    method = nys.finetune.method(job.row.method)
    options: dict[str, Any] = dict(job.row.options)
    if job.row.number is not None and job.row.number in method.options:
        options[job.row.number] = job.number
    key = jax.random.key(job.start)
    method.prepare(model, rank=RANK, alpha=RANK, targets=targets, key=key, **options)
    if job.row.start in ("gaussian", "rotated"):
        restart(model, job.row.start, job.start)  # pyright: ignore[reportArgumentType]
    for adapter in adapters(model).values():  # so that starts share a program
        adapter.init = ("", ())
        if alike and adapter.start is None:
            factors = {"a": adapter.lora_a[...], "b": adapter.lora_b[...]}
            zeros = {side: AdapterState(jnp.zeros_like(x)) for side, x in factors.items()}
            adapter.start = nnx.Dict(zeros)
    return nnx.split(model, nnx.LoRAParam, AdapterState, ...)


def optimizer(row: Row, number: float | None = None) -> optax.GradientTransformation:
    """Return the optimizer of a method, whose numbers are arrays in its state.

    Args:
        row: the method.
        number: its second number.
    """
    method = nys.finetune.method(row.method)

    def inner(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        adam = optax.adamw(learning_rate, weight_decay=DECAY)
        return optax.chain(optax.clip_by_global_norm(CLIP), adam)

    own: dict[str, float] = {}
    if number is not None and row.number is not None and row.number in method.hyperparameters:
        own[row.number] = number
    return method.optimizer(0.0, inner, **own)


def train(
    unet: UNet,
    schedule: Schedule,
    jobs: Sequence[Job],
    subjects: Sequence[Subject],
    *,
    steps: int,
    parts: Sequence[str],
    before: bool,
    times: int,
    chunk: int = 50,
) -> Outcome:
    """Return what runs with one method gave.

    Args:
        unet: the base without adapters.
        schedule: its noise.
        jobs: the runs.
        subjects: the images of each run.
        steps: number of steps.
        parts: parts of the subjects whose errors are measured after the last step.
        before: whether the errors of the base are measured too.
        times: number of times at which they are.
        chunk: steps in one call of the program, a divisor of `steps`.
    """
    made = models(unet, jobs)
    row, data = jobs[0].row, _stacked(list(subjects))
    states = [optimizer(row, job.number).init(_run(made.params, i)) for i, job in enumerate(jobs)]
    state = _stacked(states)
    rates = jnp.asarray([job.rate for job in jobs], jnp.float32)
    state = state._replace(hyperparams=state.hyperparams | {"learning_rate": rates})
    keys = jnp.stack([jax.random.fold_in(jax.random.key(j.seed), j.subject) for j in jobs])

    def errors(params: Any) -> dict[str, np.ndarray]:
        kept, frozen = made.kept, made.frozen
        return {
            name: np.asarray(
                _errors(params, kept, frozen, getattr(data, name), made.graphdef, schedule, times),
                float,
            )
            for name in parts
        }

    first = errors(made.params) if before else {}
    params, losses = made.params, []
    plain = Row(row.method, number=row.number)  # what the program depends on
    for step in range(0, steps, chunk):
        params, state, values = _steps(
            params,
            state,
            made.kept,
            made.frozen,
            data.instance,
            keys,
            step,
            graphdef=made.graphdef,
            schedule=schedule,
            row=plain,
            count=chunk,
        )
        losses.append(values)
    return Outcome(np.concatenate(losses).T, first, errors(params), params)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _run(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def drawn(part: Part, key: Any, schedule: Schedule) -> tuple[Any, ...]:
    """Return the latents, prompt, noise and time of a step.

    Args:
        part: the images.
        key: PRNG key of the step.
        schedule: the noise.
    """
    keys = jax.random.split(key, 5)
    image = jax.random.randint(keys[0], (), 0, part.mean.shape[0])
    crop = jax.random.randint(keys[1], (), 0, part.mean.shape[1])
    mean, deviation = part.mean[image, crop], part.deviation[image, crop]
    latents = mean + deviation * jax.random.normal(keys[2], mean.shape)
    noise = jax.random.normal(keys[3], mean.shape)
    time = jax.random.randint(keys[4], (), 0, schedule.num_train_timesteps)
    return latents[None], part.context[image][None], noise[None], time[None]


@functools.partial(jax.jit, static_argnames=("graphdef", "schedule", "row", "count"))
def _steps(
    params: Any,
    state: Any,
    kept: Any,
    frozen: Any,
    data: Part,
    keys: Any,
    first: Any,
    *,
    graphdef: Any,
    schedule: Schedule,
    row: Row,
    count: int,
) -> Any:
    tx = optimizer(row)

    def one(params: Any, state: Any, kept: Any, part: Part, key: Any, number: Any) -> Any:
        latents, context, noise, time = drawn(part, jax.random.fold_in(key, number), schedule)

        def loss(params: Any) -> Any:
            unet = nnx.merge(graphdef, params, kept, frozen)
            return nys.diffusion.denoising_loss(unet, schedule, latents, context, noise, time)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def step(carry: Any, number: Any) -> Any:
        run = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None))
        params, state = carry
        params, state, values = run(params, state, kept, data, keys, number)
        return (params, state), values

    (params, state), values = jax.lax.scan(step, (params, state), first + jnp.arange(count))
    return params, state, values


@functools.partial(jax.jit, static_argnames=("graphdef", "schedule", "times"))
def _errors(
    params: Any, kept: Any, frozen: Any, part: Part, graphdef: Any, schedule: Schedule, times: int
) -> Any:
    """The error of each run on a grid of images, times and noises, which is the same for all."""
    count = schedule.num_train_timesteps
    grid = (jnp.arange(times) * 2 + 1) * count // (2 * times)
    centre = part.mean.shape[2] // 2

    def of_image(index: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), index)
        noise = jax.random.normal(key, (times, *part.mean.shape[3:]))

        def one(params: Any, kept: Any, mean: Any, context: Any, noise: Any, time: Any) -> Any:
            unet = nnx.merge(graphdef, params, kept, frozen)
            latents, text = mean[index, centre][None], context[index][None]
            return nys.diffusion.denoising_loss(unet, schedule, latents, text, noise, time)

        def at_time(each: Any) -> Any:
            run = jax.vmap(one, in_axes=(0, 0, 0, 0, None, None))
            noise, time = each
            return run(params, kept, part.mean, part.context, noise, time)

        # Batches that stay in the caches of a CPU.
        return jnp.mean(jax.lax.map(at_time, (noise[:, None], grid[:, None])), axis=0)

    return jnp.mean(jax.lax.map(of_image, jnp.arange(part.mean.shape[1])), axis=0)
