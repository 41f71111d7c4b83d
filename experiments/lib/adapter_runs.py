"""One run of fine-tuning a model with adapters, as experiments compare many of them.

The model is an encoder with a new head, or a causal language model whose candidates are compared. A
seed decides the examples, their order, the new head and the key of the start, for all methods
alike. Batches have few lengths and the learning rate is an argument of the step, so that methods
with one optimizer share its programs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nyscaled as nys
from experiments.lib.adapter_data import EVALUATED, Setting, fresh, read
from nyscaled.finetune import training
from nyscaled.finetune.batches import Batch, Batches
from nyscaled.finetune.methods import METHODS, Method
from nyscaled.finetune.objectives import OBJECTIVES
from nyscaled.finetune.schedules import schedule

START_BATCHES = 8
"""Batches for starts from gradients and from inputs."""

Start = Literal["own", "rule", "gaussian", "rotated"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method of the library, and where its start comes from.

    Attributes:
        method: name of the method.
        start: "own"; "rule", with scale="auto"; "gaussian", random of the size of the method's in
            each layer; "rotated", the method's times a random orthogonal matrix.
        number: name of the second number that is tuned; "size" multiplies `a`.
    """

    method: str
    start: Start = "own"
    number: str | None = None


class Scores(NamedTuple):
    """The mean of −log p of the right classes, and which examples are answered rightly."""

    loss: float
    right: np.ndarray


class Outcome(NamedTuple):
    """What a run gave.

    Attributes:
        losses: loss of each step's batch.
        validation: scores of the examples for validation.
        test: scores of the test examples, None if they were left out.
        updates: factors of W − W₀ by layer, s·a·b = left @ right.
        seconds: time of the run, compilation and evaluation included.
    """

    losses: np.ndarray
    validation: Scores
    test: Scores | None
    updates: dict[str, tuple[np.ndarray, np.ndarray]]
    seconds: float


def adapters(model: nnx.Module) -> dict[str, Any]:
    """Return the adapter of each layer that has one."""
    layers = nys.lora.adapted_layers(model)
    return {path: next(iter(layer.adapters.values())) for path, layer in layers.items()}


def restart(model: nnx.Module, start: Start, seed: int) -> None:
    """Replace the first factors of adapters whose second ones are zero, in place.

    Args:
        model: the model, with adapters.
        start: "gaussian" or "rotated", as in `Variant`.
        seed: seed of random directions.
    """
    for index, adapter in enumerate(adapters(model).values()):
        a = np.asarray(adapter.lora_a[...], np.float64)
        rng = np.random.default_rng([seed, index])
        size = np.linalg.norm(a, axis=(-2, -1), keepdims=True)
        if start == "gaussian":
            other = rng.normal(size=a.shape)
            a = other * (size / np.linalg.norm(other, axis=(-2, -1), keepdims=True))
        elif start == "rotated":
            a = haar(rng, (*a.shape[:-2], a.shape[-2], a.shape[-2])) @ a
        adapter.lora_a[...] = jnp.asarray(a, adapter.lora_a.dtype)


def haar(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return matrices with orthonormal columns, uniformly distributed.

    Args:
        rng: source of random numbers.
        shape: (…, rows, columns).
    """
    q, r = np.linalg.qr(rng.normal(size=shape))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def numbers_of(variant: Variant, number: float | None) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the options of a start and the hyperparameters of a transform.

    Args:
        variant: names the second number.
        number: its value.
    """
    method, name = METHODS[variant.method], variant.number
    if variant.start == "rule":
        return {"scale": "auto"}, {}
    if number is None or name is None or name == "size":
        return {}, {}
    return ({name: number}, {}) if name in method.options else ({}, {name: number})


def run(
    setting: Setting,
    variant: Variant,
    seed: int,
    *,
    rate: float,
    number: float | None,
    steps: int,
    start_seed: int | None = None,
    shuffled: bool = False,
    tested: bool = True,
) -> Outcome:
    """Fine-tune a model, and score it after the last step.

    The learning rate falls linearly from its first value to zero, as in Table 2.

    Args:
        setting: what all runs have in common.
        variant: the method.
        seed: decides examples, order, head and start.
        rate: the learning rate.
        number: the second number of the method; None for its default.
        steps: number of steps.
        start_seed: seed of the start, if it is to be another one.
        shuffled: whether the labels to train on are permuted.
        tested: whether the test examples are scored.
    """
    began = time.perf_counter()
    data = read(setting, seed, shuffled)
    method = METHODS[variant.method]
    options, hyperparameters = numbers_of(variant, number)
    model, head = fresh(setting, data, seed)
    start_seed = seed if start_seed is None else start_seed

    def loss(model: nnx.Module, batch: Batch) -> jax.Array:
        total, count = OBJECTIVES[data.objective](model, batch)
        return total / count

    def some() -> Iterator[Batch]:
        return (data.train.batch(data.order.rows(step)) for step in range(START_BATCHES))

    from_batches = method.needs in ("gradient", "inputs")
    trained = method.prepare(
        model,
        rank=setting.rank,
        alpha=setting.alpha,
        targets=setting.targets,
        key=jax.random.key(start_seed),
        head=head,
        loss=loss if from_batches else None,
        batches=some() if from_batches else (),
        **options,
    )
    if variant.start in ("gaussian", "rotated"):
        restart(model, variant.start, start_seed)
    if variant.number == "size" and number is not None:
        for adapter in adapters(model).values():
            adapter.lora_a[...] = adapter.lora_a[...] * number
    parts = training.split(model, trained)
    program = training.program_of(parts, data.objective, method, clip=1.0)
    state = training.initial(program, jax.tree.map(jnp.copy, parts.params), **hyperparameters)
    falling = schedule("linear", rate, steps, warmup=0)
    losses: list[jax.Array] = []
    for step in range(steps):
        batch = training.micro_batches(data.train.batch(data.order.rows(step)), 1)
        state, measured = training.train_step(
            state, parts.counts, parts.frozen, batch, falling(step), program=program
        )
        losses.append(measured.loss)
    training.update(model, state.params)
    updates = {path: update_of(adapter) for path, adapter in adapters(model).items()}
    validation = score(state.params, parts, program, data.validation)
    test = score(state.params, parts, program, data.test) if tested else None
    values = np.asarray(jax.device_get(losses), np.float64)
    return Outcome(values, validation, test, updates, time.perf_counter() - began)


def update_of(adapter: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of the update of a layer, less that of the start where it is subtracted.

    Args:
        adapter: the adapter.
    """
    pairs: list[Mapping[str, Any]] = [{"a": adapter.lora_a, "b": adapter.lora_b}]
    if adapter.start is not None:
        pairs.append(adapter.start)
    signs = (1.0, -1.0)
    left = np.concatenate([np.asarray(p["a"][...]) for p in pairs], axis=-1)
    right = [s * np.asarray(p["b"][...]) for s, p in zip(signs, pairs, strict=False)]
    return left, adapter.scaling * np.concatenate(right, axis=-2)


def score(
    params: training.Tree, parts: training.Parts, program: training.Program, examples: Batches
) -> Scores:
    """Return the scores of a model.

    Args:
        params: the trained variables.
        parts: the parts of the model.
        program: the program of training.
        examples: batches of the examples.
    """
    plain: Method = dataclasses.replace(METHODS["lora"], reference="")  # one program for all
    evaluating = dataclasses.replace(program, graphdef=parts.evaluating, method=plain)
    losses, right = np.zeros(len(examples)), np.zeros(len(examples), bool)
    for rows, batch in examples.sorted(EVALUATED):
        scores = training.evaluate_step(
            params, parts.counts, parts.frozen, batch, program=evaluating
        )[2]
        valid = np.asarray(batch.valid)
        logits = np.asarray(scores, np.float64)[valid]
        labels = np.asarray(batch.labels)[valid]
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses[rows[valid]] = log_sum - logits[np.arange(len(labels)), labels]
        right[rows[valid]] = logits.argmax(axis=1) == labels
    return Scores(float(losses.mean()), right)
