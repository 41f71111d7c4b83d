"""Losses of a model on a batch, as a sum and a count, and the scores that they come from."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nyscaled.finetune.batches import Batch
from nyscaled.models import BertClassifier
from nyscaled.models.causal import CausalLM

Objective = Callable[..., tuple[Float[Array, ""], Float[Array, ""]]]
"""(model, batch) -> the sum of the losses, and how many there are."""


def answer_logits(model: CausalLM, batch: Batch) -> Float[Array, "rows answers vocab"]:
    """Return the logits at the positions of a batch, in float32; the head sees no others.

    Args:
        model: a causal model.
        batch: a batch with positions.
    """
    hidden = model.hidden(batch.tokens, batch.mask)[0]
    chosen = jnp.take_along_axis(hidden, jnp.asarray(batch.positions)[..., None], axis=1)
    return model.logits(chosen).astype(jnp.float32)


def token_losses(model: CausalLM, batch: Batch) -> Float[Array, "rows answers"]:
    """Return −log p of each target, 0 at padding.

    Args:
        model: a causal model.
        batch: a batch with targets.
    """
    logits = answer_logits(model, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.targets))
    return losses * jnp.asarray(batch.weights)


def tokens_loss(model: CausalLM, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of −log p over the targets, and their number.

    Args:
        model: a causal model.
        batch: a batch with targets.
    """
    return _token_sum(token_losses(model, batch), batch)


def choice_scores(model: CausalLM, batch: Batch) -> Float[Array, "examples choices"]:
    """Return the score of each candidate: the mean of log p over its tokens.

    Candidates of one token are compared by their logits after the prompt, which are their log p up
    to a number that they share.

    Args:
        model: a causal model.
        batch: a batch of candidates.
    """
    if batch.candidates is not None:
        return answer_logits(model, batch)[:, 0, batch.candidates]
    count = jnp.sum(jnp.asarray(batch.weights), axis=1)
    means = -jnp.sum(token_losses(model, batch), axis=1) / jnp.maximum(count, 1)
    # An example that has fewer candidates than others has rows without a token.
    scores = jnp.where(count > 0, means, -jnp.inf).reshape(batch.valid.shape[0], -1)
    return jnp.where(batch.valid[:, None], scores, 0.0)


def choice_loss(model: CausalLM, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of the cross-entropies of the candidates' scores, and the examples' number.

    This is the loss of MeZO (Malladi et al., 2023) for tasks with label words.

    Args:
        model: a causal model.
        batch: a batch of candidates.
    """
    return _cross_entropy(choice_scores(model, batch), batch)


def class_scores(model: BertClassifier, batch: Batch) -> Float[Array, "examples labels"]:
    """Return the logits of a classifier, in float32.

    Args:
        model: an encoder with a head.
        batch: a batch with labels.
    """
    return model(batch.tokens, batch.mask, batch.types).astype(jnp.float32)


def class_loss(model: BertClassifier, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of the cross-entropies of a classifier, and the number of examples.

    Args:
        model: an encoder with a head.
        batch: a batch with labels.
    """
    return _cross_entropy(class_scores(model, batch), batch)


def _token_sum(
    losses: Float[Array, "rows answers"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return jnp.sum(losses), jnp.sum(jnp.asarray(batch.weights))


def _cross_entropy(
    scores: Float[Array, "examples choices"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    log_p = jax.nn.log_softmax(scores)
    right = jnp.take_along_axis(log_p, jnp.asarray(batch.labels)[:, None], axis=1)[:, 0]
    valid = jnp.asarray(batch.valid)
    return -jnp.sum(right, where=valid), jnp.sum(valid.astype(jnp.float32))


OBJECTIVES: dict[str, Objective] = {
    "tokens": tokens_loss,
    "choice": choice_loss,
    "class": class_loss,
}
"""The losses by name."""

SCORES: dict[str, Callable[..., Array]] = {
    "tokens": token_losses,
    "choice": choice_scores,
    "class": class_scores,
}
"""What each loss is computed from; of candidates and classes, the largest is the answer."""

SUMS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "tokens": _token_sum,
    "choice": _cross_entropy,
    "class": _cross_entropy,
}
"""(scores, batch) -> the sum of the losses, and how many there are."""
