"""The compiled training step: sums of losses and counts over micro-batches, and one update.

Adapters, moments and updates are float32 for every dtype of the base. A step returns what it
measured as arrays on the device, so that the host does not wait for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.nnx.filterlib import Filter
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nyscaled import lora
from nyscaled.finetune import meshes, processes, updating
from nyscaled.finetune.batches import SPLIT, Batch
from nyscaled.finetune.methods import Method
from nyscaled.finetune.objectives import OBJECTIVES, SCORES, SUMS
from nyscaled.finetune.updating import State as State
from nyscaled.finetune.updating import Tree as Tree
from nyscaled.numerics import at_least_float32, full_precision
from nyscaled.validation import is_concrete


class Measured(NamedTuple):
    """What a step measured.

    Attributes:
        loss: mean over what the loss counts.
        gradient_norm: norm of the gradient, before clipping.
        tokens: number of tokens that were read.
        finite: False if the step was not made, since the loss or the gradient was not finite.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    tokens: Int[Array, ""]
    finite: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled step depends on beside the shapes of its arguments.

    Attributes:
        graphdef: structure of the model.
        dtypes: dtypes in which the model has the trained variables.
        objective: name of the loss.
        method: method, whose optimizer makes the updates.
        weight_decay: decay of AdamW.
        clip: largest norm of what the optimizer gets, None for no limit.
    """

    graphdef: nnx.GraphDef[nnx.Module]
    dtypes: tuple[jnp.dtype, ...]
    objective: str
    method: Method
    weight_decay: float = 0.0
    clip: float | None = None

    def optimizer(self, **hyperparameters: float) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer.

        Args:
            **hyperparameters: numbers of the method; they are arrays in its state.
        """

        def inner(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
            adam = optax.adamw(learning_rate, weight_decay=self.weight_decay)
            if self.clip is None:
                return adam
            return optax.chain(optax.clip_by_global_norm(self.clip), adam)

        # An optimizer of its own has these among its hyperparameters.
        settings = {
            "clip": math.inf if self.clip is None else self.clip,
            "weight_decay": self.weight_decay,
        }
        own = self.method.hyperparameters
        hyperparameters = {k: v for k, v in settings.items() if k in own} | hyperparameters
        return self.method.optimizer(0.0, inner, **hyperparameters)

    def merge(self, params: Tree, counts: Tree, frozen: Tree) -> nnx.Module:
        """Return the model, with the trained variables in its own dtypes."""
        leaves, treedef = jax.tree.flatten(params)
        cast = [x.astype(dtype) for x, dtype in zip(leaves, self.dtypes, strict=True)]
        return nnx.merge(self.graphdef, treedef.unflatten(cast), counts, frozen, copy=True)


class Parts(NamedTuple):
    """A model, split for training.

    Attributes:
        training: structure with dropout.
        evaluating: structure without dropout.
        params: the trained variables, in float32 at least.
        counts: counters of dropout.
        frozen: all other values.
        dtypes: dtypes in which the model has the trained variables.
    """

    training: nnx.GraphDef[nnx.Module]
    evaluating: nnx.GraphDef[nnx.Module]
    params: Tree
    counts: Tree
    frozen: Tree
    dtypes: tuple[jnp.dtype, ...]


def split(model: nnx.Module, trained: Filter) -> Parts:
    """Return the parts of a model.

    Args:
        model: the model.
        trained: filter of the trained variables.
    """
    adapters = [a for layer in lora.adapted_layers(model).values() for a in layer.adapters.values()]
    inits = [adapter.init for adapter in adapters]
    try:
        for adapter in adapters:  # so that models which differ in it share a program
            adapter.init = ("", ())
        model.eval()
        evaluating = nnx.split(model, trained, nnx.RngCount, ...)[0]
        model.train()
        graphdef, params, counts, frozen = nnx.split(model, trained, nnx.RngCount, ...)
    finally:
        for adapter, init in zip(adapters, inits, strict=True):
            adapter.init = init
    dtypes = tuple(x.dtype for x in jax.tree.leaves(params))
    wide = _widened(params) if is_concrete(params) else jax.eval_shape(_widened, params)
    return Parts(graphdef, evaluating, wide, counts, frozen, dtypes)


def program_of(
    parts: Parts,
    objective: str,
    method: Method,
    *,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> Program:
    """Return the program of training a model. Methods that only start differently share it.

    Args:
        parts: the parts of the model.
        objective: name of the loss.
        method: the method.
        weight_decay: decay of AdamW.
        clip: largest norm of what the optimizer gets, None for no limit.
    """
    updates = dataclasses.replace(
        method, reference="", init=None, warmup=None, rank_stabilized=False, learning_rate=0.0
    )
    return Program(parts.training, parts.dtypes, objective, updates, weight_decay, clip)


def _widened(params: Tree) -> Tree:
    return jax.tree.map(at_least_float32, params)


def update(model: nnx.Module, variables: Tree) -> None:
    """Write variables into a model, in its own dtypes.

    Args:
        model: the model.
        variables: the variables.
    """
    values = {path: v[...] for path, v in nnx.to_flat_state(variables)}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path in values:
            variable[...] = values[path].astype(variable.dtype)


def initial(program: Program, params: Tree, **hyperparameters: float) -> State:
    """Return the state before the first step.

    Args:
        program: the program.
        params: the trained variables.
        **hyperparameters: numbers of the method, such as `damping`.
    """
    return updating.initial(params, program.optimizer(**hyperparameters))


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
@full_precision
def train_step(
    state: State,
    counts: Tree,
    frozen: Tree,
    batch: Batch,
    learning_rate: Float[Array, ""],
    *,
    program: Program,
) -> tuple[State, Measured]:
    """Return the state after a step, and what was measured.

    The gradient is the sum of those of the micro-batches, divided by what all of them count. So it
    is that of one batch, although micro-batches hold different numbers of tokens.

    Args:
        state: the state; its memory is given to the new one.
        counts: counters of dropout.
        frozen: the values that are not trained.
        batch: a batch, whose arrays have an axis of micro-batches in front.
        learning_rate: the learning rate of the step.
        program: what the step computes.
    """
    (total, count), gradient = meshes.summed(
        functools.partial(_sums, program),
        (state.params, state.step, counts, frozen, batch),
        (*(PartitionSpec(),) * 4, SPLIT),
    )
    count = jnp.maximum(count, 1)
    loss, gradient = total / count, jax.tree.map(lambda g: g / count, gradient)
    new, norm = updating.updated(state, loss, gradient, learning_rate, program.optimizer())
    valid = jnp.asarray(batch.valid)
    of_examples = jnp.asarray(batch.mask).reshape(*valid.shape, -1)
    tokens = jnp.sum(of_examples, where=valid[..., None])
    return new, Measured(loss, norm, tokens, new.finite)


def _sums(
    program: Program, params: Tree, step: Int[Array, ""], counts: Tree, frozen: Tree, batch: Batch
) -> tuple[tuple[Array, Array], Tree]:
    """Sums over a batch: its losses and what they count, and the gradient of these losses."""
    micro_batches = batch.tokens.shape[0]

    def of_micro(params: Tree, index: Array, micro: Batch) -> tuple[Array, Array]:
        # A function of the step alone: a run that goes on draws the same numbers.
        number = meshes.numbered(step * micro_batches + index)
        here = jax.tree.map(lambda c: jnp.full_like(c, number), counts)
        return OBJECTIVES[program.objective](program.merge(params, here, frozen), micro)

    gradient_of = jax.value_and_grad(of_micro, has_aux=True)

    def accumulate(sums: Tree, each: tuple[Array, Batch]) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, sums, gradient_of(params, *each)), None

    if micro_batches == 1:
        only = jax.tree.map(lambda x: x[0], batch)
        return gradient_of(params, jnp.zeros((), jnp.int32), only)
    zero = jnp.zeros(())
    sums = (zero, zero), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(accumulate, sums, (jnp.arange(micro_batches), batch))[0]


@functools.partial(jax.jit, static_argnames="program")
@full_precision
def evaluate_step(
    params: Tree, counts: Tree, frozen: Tree, batch: Batch, *, program: Program
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "rows scores"]]:
    """Return the sum of the losses of a batch, what they count, and the scores behind them.

    Args:
        params: the trained variables.
        counts: counters of dropout.
        frozen: the values that are not trained.
        batch: a batch without an axis of micro-batches.
        program: what is computed, with the structure without dropout.
    """
    scores = SCORES[program.objective](program.merge(params, counts, frozen), batch)
    total, count = SUMS[program.objective](scores, batch)
    return total, count, scores


class Validation(NamedTuple):
    """What a pass over examples measured.

    Attributes:
        loss: mean over what the loss counts.
        accuracy: share of examples whose answer has the highest score; None without candidates.
    """

    loss: float
    accuracy: float | None


def validate(params: Tree, parts: Parts, batches: Iterable[Batch], program: Program) -> Validation:
    """Return the mean loss and the accuracy over the batches of all processes.

    Args:
        params: the trained variables.
        parts: the parts of the model.
        batches: the batches of this process.
        program: the program of training.
    """
    evaluating = dataclasses.replace(program, graphdef=parts.evaluating)
    totals, counts, right, examples = [], [], 0, 0
    for batch in batches:
        total, count, scores = jax.device_get(
            evaluate_step(params, parts.counts, parts.frozen, batch, program=evaluating)
        )
        totals.append(float(total))
        counts.append(float(count))
        if program.objective != "tokens":
            right += int(np.sum((np.argmax(scores, axis=1) == batch.labels) & batch.valid))
            examples += int(np.sum(batch.valid))
    own = [math.fsum(totals), math.fsum(counts), right, examples]
    total, count, right, examples = map(math.fsum, zip(*processes.gathered(own), strict=True))
    return Validation(total / max(count, 1.0), right / examples if examples else None)


def micro_batches(batch: Batch, count: int) -> Batch:
    """Return a batch whose arrays have an axis of micro-batches in front.

    Args:
        batch: the batch.
        count: number of micro-batches.
    """
    ids = batch.candidates
    shared = None if ids is None else np.broadcast_to(ids, (count, *ids.shape))
    split = jax.tree.map(
        lambda x: x.reshape(count, -1, *x.shape[1:]), batch._replace(candidates=None)
    )
    return split._replace(candidates=shared)
