"""What a step of training changes, and how a gradient changes it."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from nyscaled.numerics import tree_norm

Tree: TypeAlias = Any
"""Arrays, in a structure that flax and optax choose."""


class State(NamedTuple):
    """What training changes.

    Attributes:
        params: the trained variables, in float32 at least.
        optimizer: state of the optimizer.
        step: number of steps that were made.
        finite: False after a loss or gradient that was not finite; nothing changes any more then.
    """

    params: Tree
    optimizer: Tree
    step: Int[Array, ""]
    finite: Bool[Array, ""]


def initial(params: Tree, optimizer: optax.GradientTransformation) -> State:
    """Return the state before the first step.

    Args:
        params: the trained variables.
        optimizer: the optimizer.
    """
    made, finite = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    return State(params, optimizer.init(params), made, finite)


def updated(
    state: State,
    loss: Float[Array, ""],
    gradient: Tree,
    learning_rate: Float[Array, ""],
    optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[State, Float[Array, ""]]:
    """Return the state after a step, and the norm of the gradient.

    Args:
        state: the state before.
        loss: the loss.
        gradient: its gradient.
        learning_rate: the learning rate of the step.
        optimizer: an optimizer whose learning rate is in the `hyperparams` of its state.
    """
    norm = tree_norm(gradient)
    finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm)
    hyperparams = state.optimizer.hyperparams | {"learning_rate": learning_rate}
    updates, after = optimizer.update(
        gradient, state.optimizer._replace(hyperparams=hyperparams), state.params
    )
    new = State(optax.apply_updates(state.params, updates), after, state.step + 1, finite)
    new = jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, state)
    return new._replace(finite=finite), norm
