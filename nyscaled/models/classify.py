"""Vectors of sentences and a classifier, on the hidden states of BERT."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nyscaled.models.bert import Bert, BertConfig, head_options, new_pooler
from nyscaled.models.blocks import Mask, Tokens
from nyscaled.models.family import LanguageModel, register
from nyscaled.numerics import full_precision


def sentence_vectors(
    hidden: Float[Array, "batch length width"], mask: Mask | None = None
) -> Float[Array, "batch width"]:
    """Return the mean of the hidden states that `mask` marks, divided by its norm, in float32.

    This is what sentence-transformers computes with mean pooling and normalization (Reimers and
    Gurevych, 2019). Inner products of these vectors are cosine similarities. A row without tokens
    gives zeros.

    Args:
        hidden: hidden states of `Bert` (batch, length, width).
        mask: True at tokens, False at padding (batch, length).

    Examples:
        >>> hidden = jnp.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]])
        >>> sentence_vectors(hidden, jnp.array([[True, True, False]]))
        Array([[0.6, 0.8]], dtype=float32)
    """
    wide = hidden.astype(jnp.float32)
    marked = None if mask is None else jnp.asarray(mask)[..., None] > 0
    total = jnp.sum(wide, axis=1, where=marked)
    squares = jnp.sum(total * total, axis=-1, keepdims=True)
    return total * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


@register
class BertClassifier(LanguageModel):
    """A linear head on the pooler's output: transformers' `BertForSequenceClassification`.

    The head is new: normal weights of standard deviation 0.02 (the original's) and zero biases. An
    encoder without pooler gets one with weights of the same kind. `nys.models.load` reads both from
    a file instead.

    Args:
        encoder: encoder that becomes part of the model; it is not copied.
        labels: names of the classes.
        rngs: source of the head's random parameters.

    Raises:
        ValueError: if the encoder is not a `Bert`, or labels are not distinct names.

    Examples:
        >>> from nyscaled.models import BertConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> config = BertConfig(**sizes, num_attention_heads=2)
        >>> def make():
        ...     encoder = Bert(config, rngs=nnx.Rngs(0))
        ...     return BertClassifier(encoder, ["negative", "positive"], rngs=nnx.Rngs(1))
        >>> model = nnx.eval_shape(make)
        >>> model.classifier.kernel.shape, model.config.labels
        ((8, 2), ('negative', 'positive'))
    """

    family = dataclasses.replace(
        Bert.family, architecture="BertForSequenceClassification", head="classifier"
    )

    @classmethod
    def build(cls, config: BertConfig, tensors: Sequence[str], **options: Any) -> BertClassifier:
        """Return the model of a file.

        Args:
            config: the configuration in the file.
            tensors: names of the tensors in the file.
            **options: `numerics` and `rngs`.
        """
        return cls(Bert(config, **options), config.labels, rngs=options["rngs"])

    def __init__(self, encoder: Bert, labels: Sequence[str], *, rngs: nnx.Rngs) -> None:
        if not isinstance(encoder, Bert):
            raise ValueError(
                f"encoder is a {type(encoder).__name__}; expected a Bert (for a classifier, its "
                ".bert)"
            )
        several = isinstance(labels, Sequence) and not isinstance(labels, str)
        names = [x for x in labels if isinstance(x, str)] if several else []
        if not names or len(set(names)) < len(labels):
            raise ValueError(
                f"labels is {labels!r}; expected a list of distinct names, one per class"
            )
        self.config = dataclasses.replace(encoder.config, labels=tuple(labels))
        self.numerics = encoder.numerics
        if not hasattr(encoder, "pooler"):
            encoder.pooler = new_pooler(encoder.config, encoder.numerics, rngs)
        self.bert = encoder
        self.classifier = nnx.Linear(
            self.config.hidden_size, len(labels), rngs=rngs, **head_options(self.numerics)
        )

    @full_precision
    def __call__(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        types: Tokens | None = None,
    ) -> Float[Array, "batch labels"]:
        """Return the logits of the labels, from each row's first token, which must be `[CLS]`.

        Args:
            tokens: as in `Bert.__call__`.
            mask: as in `Bert.__call__`.
            types: as in `Bert.__call__`.

        Raises:
            ValueError: as `Bert.__call__` does.
        """
        return self.classifier(self.bert.pool(self.bert(tokens, mask, types), mask))
