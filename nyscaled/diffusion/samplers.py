"""Latents from noise: DDIM, PLMS, Euler's method and DDPM as one compiled loop.

A step of each is linear in the latents x and in predictions p of the model,

    x' = a x + b (w_0 p_0 + w_1 p_1 + w_2 p_2 + w_3 p_3) + c ε,

where p_0 is the prediction now and p_k that of k steps ago. So a sampler is a table of numbers, and
one loop runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from nyscaled.diffusion.schedule import EPSILON, Latents, Schedule
from nyscaled.matrices import as_array
from nyscaled.validation import require_count, require_key

Predict = Callable[[Latents, Array], Latents]
Numbers = Float[np.ndarray, " steps"]

# The weights of Adams and Bashforth for as many predictions as there are.
ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class Table(NamedTuple):
    """The numbers of a sampler, with a row for each call of the model.

    Attributes:
        start: standard deviation of the noise that the loop begins with, the same in all rows.
        time: time that the model is called with.
        scale: what latents are multiplied by for the model.
        a: factor of the latents.
        b: factor of the predictions.
        c: factor of new noise.
        weights: factors of this prediction and of three before it.
        again: whether the latents are those before the last step, and this prediction is not kept.
    """

    start: Numbers
    time: Numbers
    scale: Numbers
    a: Numbers
    b: Numbers
    c: Numbers
    weights: Float[np.ndarray, "steps four"]
    again: np.ndarray


def table(schedule: Schedule, sampler: str, steps: int) -> Table:
    """Return the numbers of a sampler.

    Args:
        schedule: the noise that the model was trained with.
        sampler: as in `sample`.
        steps: number of steps.

    Raises:
        ValueError: on another sampler, or a number of steps that there are not times for.
    """
    require_count("steps", steps, 1)
    if steps > schedule.num_train_timesteps:
        raise ValueError(f"steps is {steps}; expected at most {schedule.num_train_timesteps}")
    makers = {"ddim": _ddim, "plms": _plms, "euler": _euler, "ddpm": _ddpm}
    if not isinstance(sampler, str) or sampler not in makers:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(makers)}")
    return makers[sampler](schedule, steps)


def sample(
    predict: Predict,
    schedule: Schedule,
    noise: Latents,
    *,
    steps: int = 50,
    sampler: str = "ddim",
    key: Key[Array, ""] | None = None,
) -> Latents:
    """Return latents that a model makes of noise, by one loop.

    Call it inside of `jax.jit`: each call outside compiles the model again.

    Args:
        predict: function of latents (batch, height, width, channels) and a time that returns the
            model's prediction; it may contain guidance.
        schedule: the noise that the model was trained with.
        noise: numbers from the normal distribution, (batch, height, width, channels).
        steps: number of steps. PLMS calls the model once more.
        sampler: "ddim" (Song et al., 2021, with η = 0), "plms" (Liu et al., 2022), "euler" (Karras
            et al., 2022) or "ddpm" (Ho et al., 2020).
        key: PRNG key of the noise that "ddpm" adds.

    Raises:
        ValueError: on another sampler, on a number of steps that there are not times for, on
            "ddpm" without a key, and on predictions of another shape than the latents'.

    Examples:
        >>> noise = jnp.ones((1, 2, 2, 1))
        >>> predict = lambda latents, time: latents  # noise, and nothing else
        >>> sample(predict, Schedule(), noise, steps=5, sampler="euler").shape
        (1, 2, 2, 1)
    """
    return _run(predict, noise, table(schedule, sampler, steps), key, keep=False)[0]


def trajectory(
    predict: Predict,
    schedule: Schedule,
    noise: Latents,
    *,
    steps: int = 50,
    sampler: str = "ddim",
    key: Key[Array, ""] | None = None,
) -> Float[Array, "calls batch height width channels"]:
    """Return the latents after each call of the model; the last are those of `sample`.

    Args:
        predict: as in `sample`.
        schedule: as in `sample`.
        noise: as in `sample`.
        steps: as in `sample`.
        sampler: as in `sample`.
        key: as in `sample`.

    Raises:
        ValueError: as `sample` does.

    Examples:
        >>> noise = jnp.ones((1, 2, 2, 1))
        >>> predict = lambda latents, time: latents
        >>> trajectory(predict, Schedule(), noise, steps=5, sampler="plms").shape
        (6, 1, 2, 2, 1)
    """
    latents = _run(predict, noise, table(schedule, sampler, steps), key, keep=True)[1]
    assert latents is not None
    return latents


def _run(
    predict: Predict, noise: Latents, numbers: Table, key: Key[Array, ""] | None, *, keep: bool
) -> tuple[Array, Array | None]:
    """Return the last latents, and those after each call of the model if they are kept."""
    if key is None and numbers.c.any():
        raise ValueError("key is None; expected a PRNG key, as 'ddpm' adds noise")
    if key is not None:
        key = require_key("key", key)
    noise = as_array("noise", noise)
    if noise.ndim != 4 or not jnp.issubdtype(noise.dtype, jnp.floating):
        raise ValueError(
            f"noise is {noise.dtype} of shape {noise.shape}; expected floats (batch, height, "
            "width, channels)"
        )
    dtype, calls = noise.dtype, len(numbers.time)

    def step(
        carry: tuple[Array, Array, Array], each: tuple[Array, Table]
    ) -> tuple[tuple[Array, Array, Array], Array | None]:
        x, before, earlier = carry
        i, row = each
        scaled = jnp.multiply(row.scale, x).astype(dtype)
        prediction = as_array("the prediction", predict(scaled, jnp.asarray(row.time)))
        if prediction.shape != x.shape:
            raise ValueError(f"predict returned shape {prediction.shape}; expected {x.shape}")
        prediction = prediction.astype(jnp.float32)
        predictions = jnp.concatenate([prediction[None], earlier])
        # Not a matrix product, which accelerators round.
        weights = jnp.reshape(row.weights, (-1, 1, 1, 1, 1))
        mean = jnp.sum(weights * predictions, axis=0)
        after = jnp.multiply(row.a, jnp.where(row.again, before, x)) + row.b * mean
        if key is not None:
            fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            after = after + row.c * fresh
        earlier = jnp.where(row.again, earlier, predictions[:-1])
        return (after, x, earlier), after if keep else None

    x = numbers.start[0] * noise.astype(jnp.float32)
    earlier = jnp.zeros((numbers.weights.shape[1] - 1, *x.shape), jnp.float32)
    rows = jax.tree.map(jnp.asarray, numbers)
    (x, _, _), latents = jax.lax.scan(step, (x, x, earlier), (jnp.arange(calls), rows))
    return x, latents


def _times(schedule: Schedule, steps: int, spacing: str) -> np.ndarray:
    """The times of steps, the last of the diffusion first."""
    spacing = schedule.timestep_spacing or spacing
    count = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1]
    if spacing == "trailing":
        return np.round(np.arange(count, 0, -count / steps))[:steps] - 1.0
    times = np.arange(steps)[::-1] * float(count // steps) + schedule.steps_offset
    if times[0] >= count:
        raise ValueError(
            f"steps is {steps}, and the first would be at time {times[0]:g}; expected fewer steps, "
            f"as times end at {count - 1}"
        )
    return times


def _whole_times(schedule: Schedule, steps: int) -> np.ndarray:
    return np.round(_times(schedule, steps, "leading")).astype(int)


def _before(schedule: Schedule, steps: int, times: np.ndarray, last: float) -> np.ndarray:
    """ᾱ one step earlier than each time, `last` where that is before the first."""
    earlier = times - schedule.num_train_timesteps // steps
    return np.where(earlier >= 0, schedule.exact_alphas[np.maximum(earlier, 0)], last)


def _final_alpha(schedule: Schedule, default: bool) -> float:
    to_one = default if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 1.0 if to_one else float(schedule.exact_alphas[0])


def _in_noise(
    schedule: Schedule, alphas: np.ndarray, of_x: np.ndarray, of_noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The factors of latents and prediction in of_x·x + of_noise·ε."""
    if schedule.prediction_type == EPSILON:
        return of_x, of_noise
    # ε = √ᾱ v + √(1 − ᾱ) x
    return of_x + np.sqrt(1 - alphas) * of_noise, np.sqrt(alphas) * of_noise


def _plain(time: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> Table:
    """The table of a sampler of which a step reads one prediction."""
    ones, zeros = np.ones(len(time)), np.zeros(len(time))
    weights = np.concatenate([ones[:, None], np.zeros((len(time), 3))], axis=1)
    columns = (ones, time, ones, a, b, zeros if c is None else c, weights)
    return Table(*(x.astype(np.float32) for x in columns), again=zeros.astype(bool))


def _ddim(schedule: Schedule, steps: int) -> Table:
    times = _whole_times(schedule, steps)
    alphas = schedule.exact_alphas[times]
    earlier = _before(schedule, steps, times, _final_alpha(schedule, default=True))
    ratio = np.sqrt(earlier / alphas)
    of_noise = np.sqrt(1 - earlier) - ratio * np.sqrt(1 - alphas)
    return _plain(times, *_in_noise(schedule, alphas, ratio, of_noise))


def _ddpm(schedule: Schedule, steps: int) -> Table:
    times = _whole_times(schedule, steps)
    alphas = schedule.exact_alphas[times]
    earlier = np.append(alphas[1:], 1.0)
    alpha = alphas / earlier
    of_clean = np.sqrt(earlier) * (1 - alpha) / (1 - alphas)
    of_x = np.sqrt(alpha) * (1 - earlier) / (1 - alphas) + of_clean / np.sqrt(alphas)
    of_noise = -of_clean * np.sqrt((1 - alphas) / alphas)
    variance = (1 - earlier) / (1 - alphas) * (1 - alpha)
    return _plain(times, *_in_noise(schedule, alphas, of_x, of_noise), np.sqrt(variance))


def _plms(schedule: Schedule, steps: int) -> Table:
    times = _whole_times(schedule, steps)
    stride = schedule.num_train_timesteps // steps
    again = np.zeros(steps + (steps > 1), bool)
    if steps > 1:  # the first step is made twice, with the mean of the noises at its ends
        times, again[1] = np.insert(times, 1, times[1]), True
    start = np.where(again, times + stride, times)
    alphas = schedule.exact_alphas[start]
    earlier = _before(schedule, steps, start, _final_alpha(schedule, default=False))
    ratio = np.sqrt(earlier / alphas)
    of_noise = (alphas - earlier) / (
        alphas * np.sqrt(1 - earlier) + np.sqrt(alphas * (1 - alphas) * earlier)
    )
    numbers = _plain(times, *_in_noise(schedule, alphas, ratio, of_noise))
    for i, row in enumerate(numbers.weights):
        kept = i if i < 2 else i - 1
        own = (0.5, 0.5) if again[i] else ADAMS[min(kept, len(ADAMS) - 1)]
        row[:] = 0
        row[: len(own)] = own
    return numbers._replace(again=again)


def _euler(schedule: Schedule, steps: int) -> Table:
    spacing = schedule.timestep_spacing or "linspace"
    times = _times(schedule, steps, spacing)
    alphas = schedule.exact_alphas
    sigmas = np.sqrt((1 - alphas) / alphas)
    sigma = np.interp(times, np.arange(len(sigmas)), sigmas)
    change = np.append(sigma[1:], 0) - sigma
    scale = 1 / np.sqrt(sigma**2 + 1)
    a, b = np.ones(steps), change
    if schedule.prediction_type != EPSILON:
        a, b = 1 + change * sigma * scale**2, change * scale
    numbers = _plain(times, a, b)
    start = np.full(steps, np.sqrt(sigma[0] ** 2 + (spacing == "leading")), np.float32)
    return numbers._replace(start=start, scale=scale.astype(np.float32))
