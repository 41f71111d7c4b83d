"""Examples as ids and a tiny model with adapters, for the tests of training."""

import functools

import jax
import model_cases
import numpy as np
from flax import nnx

import nyscaled as nys
from nyscaled.finetune import batches, training
from nyscaled.finetune.examples import Encoded

WORDS = ((7,), (8,))
PHRASES = ((7,), (8, 9), (10, 11, 12))


def examples(count=21, answers=WORDS, seed=0, longest=30):
    """Examples of random ids, whose answer is told by the first one."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        prompt = rng.integers(13, 32, rng.integers(3, longest)).tolist()
        label = prompt[0] % len(answers)
        rows.append(Encoded((1, *prompt), answers, label, source=f"train.tsv:{i + 1}"))
    return rows


@functools.cache
def adapted(method="nora", dropout=0.0, key=0, **options):
    """The parts of the tiny LLaMA with adapters, and the model."""
    model = model_cases.load("llama")
    trained = nys.finetune.method(method).prepare(
        model, rank=2, targets=r".*[qv]_proj", key=jax.random.key(key), dropout=dropout, **options
    )
    return training.split(model, trained), model


def program(parts, objective="tokens", method="nora", **options):
    """The program of a step on these parts."""
    return training.program_of(parts, objective, nys.finetune.method(method), **options)


def one_step(parts, program, batch, count=1, state=None, rate=1e-2):
    """The state after a step on a batch, and what was measured."""
    if state is None:
        state = training.initial(program, jax.tree.map(jax.numpy.copy, parts.params))
    split = training.micro_batches(batch, count)
    return training.train_step(
        state, parts.counts, parts.frozen, split, np.float32(rate), program=program
    )


def model_of(parts):
    """The model of these parts."""
    return nnx.merge(parts.evaluating, parts.params, parts.counts, parts.frozen, copy=True)


@functools.cache
def made(objective="tokens", answers=WORDS, **options):
    """Batches of eight of the examples."""
    return batches.make(examples(answers=answers), objective, batch_size=8, programs=1, **options)
