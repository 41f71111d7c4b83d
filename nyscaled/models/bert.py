"""BERT: an encoder of sentences and pairs of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nyscaled.checkpoints.files import JsonObject
from nyscaled.models import blocks
from nyscaled.models.blocks import FLOAT32, Mask, Numerics, Tokens
from nyscaled.models.config import Config, TokenId
from nyscaled.models.family import Family, LanguageModel, register
from nyscaled.models.prefix import PrefixedAttention
from nyscaled.numerics import full_precision

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": blocks.gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
}
STDDEV = 0.02  # of every weight in the original, and of a new head here
MOST_LABELS = 2**16  # that may have no names


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """Sizes, by their names in `config.json`.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_hidden_layers: depth.
        num_attention_heads: number of heads; a divisor of `hidden_size`.
        hidden_act: "gelu" (by erf) or "gelu_new" (by tanh).
        max_position_embeddings: longest input.
        type_vocab_size: number of token types.
        layer_norm_eps: number added to the variance.
        labels: names of the classes of a classifier, in the order of its logits; `id2label` in the
            file, or as many as its `num_labels`.

    Examples:
        >>> sizes = dict(vocab_size=30522, hidden_size=768, num_hidden_layers=12)
        >>> config = BertConfig.from_json(
        ...     sizes | {"intermediate_size": 3072, "num_attention_heads": 12}
        ... )
        >>> config.layer_norm_eps, config.labels
        (1e-12, ('LABEL_0', 'LABEL_1'))
    """

    model_type = "bert"
    fixed: ClassVar = {
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    pad_token_id: TokenId = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} with {self.num_attention_heads} heads; "
                "expected a multiple of num_attention_heads"
            )
        if self.hidden_act not in list(ACTIVATIONS):  # a list has == for what cannot be hashed
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def settings(cls, config: JsonObject) -> JsonObject:
        """Return the fields, with the labels from transformers' form.

        Args:
            config: what `config.json` holds.
        """
        settings = {k: v for k, v in super().settings(config).items() if k != "labels"}
        if config.get("id2label") is not None:
            settings["labels"] = _labels(config["id2label"])
        elif config.get("num_labels") is not None:
            settings["labels"] = _unnamed(config["num_labels"])
        return settings

    def to_json(self) -> JsonObject:
        """Return `config.json`, with the labels in transformers' form."""
        config = super().to_json()
        labels = config.pop("labels")
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        return {**config, "label2id": {label: i for i, label in enumerate(labels)}}


def _labels(id2label: Any) -> tuple[str, ...]:
    """Return the labels of `{"0": "first", …}` in order."""
    labels = id2label if isinstance(id2label, Mapping) else {}
    ids = list(map(str, range(len(labels))))
    named = all(isinstance(label, str) for label in labels.values())
    if not labels or labels.keys() != set(ids) or not named:
        raise ValueError(f"id2label is {id2label!r}; expected a label for each of '0', '1', …")
    return tuple(labels[i] for i in ids)


def _unnamed(count: Any) -> tuple[str, ...]:
    """Return the labels that transformers gives to classes without names."""
    if type(count) is not int or not 0 < count <= MOST_LABELS:
        raise ValueError(
            f"num_labels is {count!r:.80}; expected an integer from 1 to {MOST_LABELS}"
        )
    return tuple(f"LABEL_{i}" for i in range(count))


def starts(mask: Bool[Array, "batch length"]) -> Int[Array, " batch"]:
    """Return the column of each row's first token; 0 where there is none.

    Args:
        mask: True where there is a token.
    """
    return jnp.argmax(mask, axis=1)


class Dense(nnx.Module):
    """f(x W + b)."""

    def __init__(
        self, sizes: tuple[int, int], f: Callable[[Array], Array], rngs: nnx.Rngs, **options: Any
    ) -> None:
        self.dense = nnx.Linear(*sizes, rngs=rngs, **options)
        self.f = f

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return self.f(blocks.kept(self.dense(x)))


class Residual(nnx.Module):
    """norm(residual + x W + b)."""

    def __init__(self, inner: int, config: BertConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.dense = nnx.Linear(inner, width, rngs=rngs, **numerics.dtypes)
        self.LayerNorm = blocks.layer_norm(width, config.layer_norm_eps, numerics, rngs)

    def __call__(
        self, x: Float[Array, "... inner"], residual: Float[Array, "... width"]
    ) -> Float[Array, "... width"]:
        return self.LayerNorm(blocks.kept(residual + self.dense(x)))


class SelfAttention(PrefixedAttention):
    """Each token sees all others except padding."""

    def __init__(self, config: BertConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        options: dict[str, Any] = {"rngs": rngs, **numerics.dtypes}
        self.query = nnx.Linear(width, width, **options)
        self.key = nnx.Linear(width, width, **options)
        self.value = nnx.Linear(width, width, **options)
        self.head_dim = width // config.num_attention_heads

    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"] | None
    ) -> Float[Array, "batch length width"]:
        layers = self.query, self.key, self.value
        query, key, value = (
            blocks.kept(blocks.split_heads(layer(x), self.head_dim)) for layer in layers
        )
        visible = None if mask is None else mask[:, None, None, :]
        if self.prefix is not None:
            key, value, visible = self.prefix.before(key, value, visible)
        return blocks.attend(query, key, value, visible, causal=False)


class Attention(nnx.Module):
    """Attention beside the residual stream, and the norm after both."""

    def __init__(self, config: BertConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.self = SelfAttention(config, numerics, rngs)
        self.output = Residual(config.hidden_size, config, numerics, rngs)

    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"] | None
    ) -> Float[Array, "batch length width"]:
        return self.output(self.self(x, mask), x)


class Layer(nnx.Module):
    """Attention and MLP, each with a norm after it."""

    def __init__(self, config: BertConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, numerics, rngs)
        self.intermediate = Dense(
            (width, inner), ACTIVATIONS[config.hidden_act], rngs, **numerics.dtypes
        )
        self.output = Residual(inner, config, numerics, rngs)

    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"] | None
    ) -> Float[Array, "batch length width"]:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Embeddings(nnx.Module):
    """The norm of the sum of a token's, its position's and its type's embeddings."""

    def __init__(self, config: BertConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        options: dict[str, Any] = {"rngs": rngs, **numerics.dtypes}
        self.word_embeddings = nnx.Embed(config.vocab_size, width, **options)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, **options)
        self.token_type_embeddings = nnx.Embed(config.type_vocab_size, width, **options)
        self.LayerNorm = blocks.layer_norm(width, config.layer_norm_eps, numerics, rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        types: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None,
    ) -> Float[Array, "batch length width"]:
        positions = jnp.arange(tokens.shape[1])
        if mask is not None:  # counted from the first token, on whichever side the padding is
            positions = jnp.maximum(positions - starts(mask)[:, None], 0)
        words = self.word_embeddings(tokens) + self.token_type_embeddings(types)
        return self.LayerNorm(words + self.position_embeddings(positions))


class Encoder(nnx.Module):
    """The stack of layers, called `layer` in transformers."""

    def __init__(self, config: BertConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.layer = blocks.stack(
            lambda rngs: Layer(config, numerics, rngs), config.num_hidden_layers, rngs
        )


@register
class Bert(LanguageModel):
    """The encoder of Devlin et al., 2019.

    Module paths are those of transformers, with the layers stacked:
    `encoder.layer.attention.self.query` has a kernel (layers, in, out). There is no dropout.

    Args:
        config: sizes and constants.
        pooler: whether there is a layer for `pool`.
        numerics: dtypes, and whether the backward pass computes layers again.
        rngs: source of random parameters, which `nys.models.load` reads from a file instead.

    Examples:
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> config = BertConfig(**sizes, num_attention_heads=2)
        >>> model = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
        >>> model.encoder.layer.attention.self.query.kernel.shape
        (3, 8, 8)
        >>> call = lambda tokens: Bert(config, rngs=nnx.Rngs(0))(tokens)
        >>> jax.eval_shape(call, jnp.zeros((2, 5), int)).shape
        (2, 5, 8)
    """

    family = Family(
        config=BertConfig,
        architecture="BertModel",
        root="bert.",
        stack="encoder.layer",
        outside=("embeddings", "pooler"),
        head=None,
        split_inputs=("output.dense",),  # of attention and of the MLP
        # Its constants; the heads that it was trained with: masked words, the next sentence.
        ignored=(
            r"(bert\.)?embeddings\.(position_ids|token_type_ids)"
            r"|cls\.seq_relationship\.(weight|bias)|cls\.predictions\.(bias"
            r"|decoder\.(weight|bias)"
            r"|transform\.(dense\.(weight|bias)|LayerNorm\.(weight|bias|gamma|beta)))"
        ),
        generates=False,
    )

    @classmethod
    def build(cls, config: BertConfig, tensors: Sequence[str], **options: Any) -> Bert:
        """Return the model of a file, with a pooler if the file has one.

        Args:
            config: the configuration in the file.
            tensors: names of the tensors in the file.
            **options: `numerics` and `rngs`.
        """
        pooler = any(name.endswith("pooler.dense.weight") for name in tensors)
        return cls(config, pooler=pooler, **options)

    def __init__(
        self,
        config: BertConfig,
        *,
        pooler: bool = True,
        numerics: Numerics = FLOAT32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.numerics = config, numerics
        self.embeddings = Embeddings(config, numerics, rngs)
        self.encoder = Encoder(config, numerics, rngs)
        if pooler:
            self.pooler = new_pooler(config, numerics, rngs)

    @full_precision
    def __call__(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        types: Tokens | None = None,
    ) -> Float[Array, "batch length width"]:
        """Return the last hidden states, in the compute dtype.

        Args:
            tokens: ids below `vocab_size`, (batch, length). Other ids give NaN, except at padding.
                Positions are counted from the first token.
            mask: True (or 1) where there is a token and False where there is padding, on either
                side; None for no padding. Hidden states at padding have no meaning.
            types: 0 in the first sentence of a pair and 1 in the second; None for zeros.

        Raises:
            ValueError: unless tokens are integers (batch, length), no longer than the table of
                positions, and mask and types have their shape.
        """
        config = self.config
        tokens, mask = blocks.prepare(
            tokens, mask, config.vocab_size, longest=config.max_position_embeddings
        )
        types = jnp.zeros_like(tokens) if types is None else types
        types, _ = blocks.prepare(types, mask, config.type_vocab_size)
        if types.shape != tokens.shape:
            raise ValueError(f"types have shape {types.shape}; expected {tokens.shape}, as tokens")
        x = self.embeddings(tokens, types, mask)
        return blocks.run(self.encoder.layer, x, mask, remat=self.numerics.remat)

    @full_precision
    def pool(
        self, hidden: Float[Array, "batch length width"], mask: Mask | None = None
    ) -> Float[Array, "batch width"]:
        """Return tanh of a layer on the hidden state of the first token, which must be `[CLS]`.

        Args:
            hidden: hidden states that a call returned.
            mask: mask of the call, which says where the tokens begin; None for the first column.

        Raises:
            ValueError: if the model has no pooler.
        """
        if not hasattr(self, "pooler"):
            raise ValueError(
                "the model has no pooler; expected one in its file, or sentence_vectors"
            )
        if mask is None:
            return self.pooler(hidden[:, 0])
        columns = starts(jnp.asarray(mask) > 0)[:, None, None]
        return self.pooler(jnp.take_along_axis(hidden, columns, axis=1)[:, 0])


def head_options(numerics: Numerics) -> dict[str, Any]:
    """Return the options of a linear layer that no file has.

    Args:
        numerics: dtypes of the model.
    """
    return {"kernel_init": jax.nn.initializers.normal(STDDEV), **numerics.dtypes}


def new_pooler(config: BertConfig, numerics: Numerics, rngs: nnx.Rngs) -> Dense:
    """Return the layer of `Bert.pool`.

    Args:
        config: sizes of the model.
        numerics: dtypes of the model.
        rngs: source of its random parameters.
    """
    sizes = config.hidden_size, config.hidden_size
    return Dense(sizes, jnp.tanh, rngs, **head_options(numerics))
