"""The text encoder of CLIP, whose hidden states are what the U-Net reads of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float

from nyscaled.checkpoints.files import JsonObject
from nyscaled.diffusion.component import Component
from nyscaled.diffusion.layers import linear
from nyscaled.diffusion.settings import Settings
from nyscaled.diffusion.transformer import Rows
from nyscaled.models import blocks
from nyscaled.models.blocks import FLOAT32, Numerics
from nyscaled.numerics import full_precision

CLASS, TYPE = "CLIPTextModel", "clip_text_model"


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x·σ(1.702 x), which the first CLIP models have in place of gelu.

    Args:
        x: what a layer returned.
    """
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": blocks.gelu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(Settings):
    """Sizes of a text encoder, by their names in `config.json`; the defaults are transformers'.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the rows.
        intermediate_size: width inside the MLPs.
        projection_dim: width of a projection that Stable Diffusion does not have.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads, a divisor of `hidden_size`.
        max_position_embeddings: most tokens of a text.
        hidden_act: the function in the MLPs, "quick_gelu" or "gelu".
        layer_norm_eps: what norms add to variances.
        bos_token_id: token that begins a text.
        eos_token_id: token that ends a text; 2 in old files, where no one reads it.
        pad_token_id: token after the end.
    """

    class_name = CLASS
    fixed: ClassVar = {"use_attention_mask": (False, None)}

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r:.80}; expected {' or '.join(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} with {self.num_attention_heads} heads; "
                "expected a multiple of num_attention_heads"
            )

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.num_hidden_layers

    @classmethod
    def from_json(cls, config: JsonObject) -> TextEncoderConfig:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the configuration of a file of transformers.

        Args:
            config: what `config.json` holds.

        Raises:
            ValueError: on another type of model, and on an ill-typed or unsupported setting.
        """
        if config.get("model_type") != TYPE:
            raise ValueError(f"model_type is {config.get('model_type')!r:.80}; expected {TYPE!r}")
        # Other settings concern training, or models with other parts.
        known = {field.name for field in dataclasses.fields(cls)} | cls.fixed.keys()
        ours = {name: value for name, value in config.items() if name in known}
        return super().from_json({"_class_name": cls.class_name, **ours})

    def to_json(self) -> JsonObject:
        """Return what `config.json` is to hold, for transformers too."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"architectures": [CLASS], "model_type": TYPE, **fields}


class Embeddings(nnx.Module):
    """A row for each token, and one for each position."""

    def __init__(self, config: TextEncoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width, dtypes = config.hidden_size, numerics.dtypes
        self.token_embedding = nnx.Embed(config.vocab_size, width, rngs=rngs, **dtypes)
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, width, rngs=rngs, **dtypes
        )


class SelfAttention(nnx.Module):
    """Attention of tokens to those before them."""

    def __init__(self, config: TextEncoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.q_proj = linear(width, width, numerics, rngs)
        self.k_proj = linear(width, width, numerics, rngs)
        self.v_proj = linear(width, width, numerics, rngs)
        self.out_proj = linear(width, width, numerics, rngs)
        self.head_dim = width // config.num_attention_heads

    def __call__(self, x: Rows) -> Rows:
        query, key, value = (
            blocks.split_heads(layer(x), self.head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(blocks.attend(query, key, value, None, causal=True))


class Mlp(nnx.Module):
    """Two linear layers around a function of each entry."""

    def __init__(self, config: TextEncoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(config.hidden_size, config.intermediate_size, numerics, rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, numerics, rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Rows) -> Rows:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class Layer(nnx.Module):
    """Attention and MLP beside the rows, each after a norm."""

    def __init__(self, config: TextEncoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = blocks.layer_norm(width, eps, numerics, rngs)
        self.self_attn = SelfAttention(config, numerics, rngs)
        self.layer_norm2 = blocks.layer_norm(width, eps, numerics, rngs)
        self.mlp = Mlp(config, numerics, rngs)

    def __call__(self, x: Rows) -> Rows:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nnx.Module):
    """The layers in a list."""

    def __init__(self, config: TextEncoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        count = config.num_hidden_layers
        self.layers = nnx.List([Layer(config, numerics, rngs) for _ in range(count)])


class TextEncoder(Component[TextEncoderConfig]):
    """The text encoder of CLIP (Radford et al., 2021) and OpenCLIP.

    Module paths are those of transformers' `CLIPTextModel`, without `text_model.`, which files
    may have in front of them.

    Args:
        config: sizes and constants.
        numerics: dtypes.
        rngs: source of random parameters, which `nys.diffusion.load` reads from a file.

    Examples:
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> config = TextEncoderConfig(**sizes, num_attention_heads=2)
        >>> model = nnx.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))
        >>> model.encoder.layers[1].mlp.fc1.kernel.shape
        (8, 12)
    """

    config_class = TextEncoderConfig
    stem = "model"
    prefix = "text_model."
    ignored = r"(text_model\.)?embeddings\.position_ids"  # a constant of old files
    split_inputs = ("out_proj", "fc2")

    def __init__(
        self, config: TextEncoderConfig, *, numerics: Numerics = FLOAT32, rngs: nnx.Rngs
    ) -> None:
        self.config, self.numerics = config, numerics
        self.embeddings = Embeddings(config, numerics, rngs)
        self.encoder = Layers(config, numerics, rngs)
        self.final_layer_norm = blocks.layer_norm(
            config.hidden_size, config.layer_norm_eps, numerics, rngs
        )

    @full_precision
    def __call__(self, tokens: ArrayLike) -> Float[Array, "batch length width"]:
        """Return a row for each token, which the tokens before it are part of.

        Args:
            tokens: ids below `vocab_size`, (batch, length). Other ids give NaN.

        Raises:
            ValueError: unless they are integers of this shape, and not too many.
        """
        config = self.config
        tokens, _ = blocks.prepare(tokens, None, config.vocab_size, config.max_position_embeddings)
        positions = jax.numpy.arange(tokens.shape[1])
        x = self.embeddings.token_embedding(tokens)
        x = x + self.embeddings.position_embedding(positions)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)
