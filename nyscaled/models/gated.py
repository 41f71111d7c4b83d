"""Decoders with rotary positions, RMS norms and gated MLPs: LLaMA and its relatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nyscaled.checkpoints.files import JsonObject
from nyscaled.checkpoints.gguf import GgufMap
from nyscaled.models import blocks, rope
from nyscaled.models.blocks import FLOAT32, Mask, Numerics, Tokens
from nyscaled.models.cache import Cache, Context, Kept, attend_causally, run_causal
from nyscaled.models.causal import CausalLM
from nyscaled.models.config import Config, TokenId
from nyscaled.models.prefix import PrefixedAttention
from nyscaled.models.rope import Rotation
from nyscaled.numerics import full_precision

# llama.cpp's names.
GGUF = GgufMap(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
        "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
        "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
        "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
        "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
        "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
        "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
        "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
        "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConfig(Config):
    """Sizes and constants, by their names in `config.json`.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_hidden_layers: depth.
        num_attention_heads: number of heads of the queries.
        num_key_value_heads: number of heads of keys and values; a divisor of
            `num_attention_heads`.
        head_dim: width of a head.
        rms_norm_eps: number added to the mean square.
        max_position_embeddings: longest text in training. Rotations continue beyond it, and
            dynamic scaling begins there.
        rope_theta: base of the rotations' frequencies.
        rope_scaling: how rotations are changed for longer texts, or None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    bos_token_id: TokenId = 1
    eos_token_id: TokenId = 2
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: rope.Scaling | None = None

    attention_bias: ClassVar[bool] = False
    mlp_bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, num_key_value_heads "
                f"{self.num_key_value_heads}, head_dim {self.head_dim}; expected a multiple of the "
                "second, and even heads"
            )
        if not isinstance(self.rope_scaling, rope.Scaling | None):
            raise ValueError(
                f"rope_scaling is {self.rope_scaling!r:.80}; expected None or a scaling, such as "
                "LinearScaling (from_json makes one of what a file has)"
            )
        if isinstance(self.rope_scaling, rope.DynamicScaling) and self.head_dim < 4:
            raise ValueError(
                f"head_dim is {self.head_dim}; expected at least 4 for dynamic scaling"
            )

    @classmethod
    def settings(cls, config: JsonObject) -> JsonObject:
        """Return the fields, with the rotations from either of transformers' forms.

        Args:
            config: what `config.json` holds.
        """
        settings = {k: v for k, v in super().settings(config).items() if k != "rope_scaling"}
        if settings.get("attention_bias", False) is None:
            del settings["attention_bias"]
        longest = settings.get("max_position_embeddings") or cls.max_position_embeddings
        settings["rope_theta"], settings["rope_scaling"] = rope.read_rope(config, longest)
        return settings

    @property
    def output_bias(self) -> bool:
        """Whether the last of the four layers of attention has a bias."""
        return self.attention_bias

    @property
    def windows(self) -> tuple[int, ...] | None:
        """Number of tokens that a token sees in each layer, None for all of the ones before."""
        return None

    def to_json(self) -> JsonObject:
        """Return `config.json`, with the rotations in the form of every version of transformers."""
        return super().to_json() | {"rope_scaling": rope.write_rope(self.rope_scaling)}


def with_heads(settings: JsonObject) -> JsonObject:
    """Return the settings with the number of key heads and the width of heads where these are None.

    transformers then has as many key heads as query heads, which share the hidden size.

    Args:
        settings: fields of a `GatedConfig`.
    """
    heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
    if type(heads) is not int or type(width) is not int or heads <= 0:
        return settings
    sizes = {"num_key_value_heads": heads, "head_dim": width // heads}
    return settings | {k: v for k, v in sizes.items() if settings.get(k, v) is None}


class Attention(PrefixedAttention):
    """Rotary attention with grouped queries."""

    def __init__(
        self, config: GatedConfig, model: type[GatedDecoder], numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        width, head = config.hidden_size, config.head_dim
        outer, inner = config.num_attention_heads * head, config.num_key_value_heads * head
        options: dict[str, Any] = {"rngs": rngs, **numerics.dtypes}
        self.q_proj = nnx.Linear(width, outer, use_bias=config.attention_bias, **options)
        self.k_proj = nnx.Linear(width, inner, use_bias=config.attention_bias, **options)
        self.v_proj = nnx.Linear(width, inner, use_bias=config.attention_bias, **options)
        self.o_proj = nnx.Linear(outer, width, use_bias=config.output_bias, **options)
        if model.head_norms:
            self.q_norm = blocks.RMSNorm(head, config.rms_norm_eps, numerics)
            self.k_norm = blocks.RMSNorm(head, config.rms_norm_eps, numerics)
        self.head_dim, self.head_norms = head, model.head_norms

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        context: Context,
        rotation: Rotation,
    ) -> tuple[Float[Array, "batch length width"], Kept | None]:
        layers = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (blocks.split_heads(layer(x), self.head_dim) for layer in layers)
        if self.head_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rope.rotate(query, rotation), rope.rotate(key, rotation)
        query, key, value = (blocks.kept(part) for part in (query, key, value))
        out, kept = attend_causally(query, key, value, context, self.prefix)
        return self.o_proj(out), kept


class GatedMLP(nnx.Module):
    """down(f(gate(x)) · up(x)) (Shazeer, 2020)."""

    def __init__(
        self,
        config: GatedConfig,
        activation: Callable[[Array], Array],
        numerics: Numerics,
        rngs: nnx.Rngs,
    ) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {
            "use_bias": config.mlp_bias,
            "rngs": rngs,
            **numerics.dtypes,
        }
        self.gate_proj = nnx.Linear(width, inner, **options)
        self.up_proj = nnx.Linear(width, inner, **options)
        self.down_proj = nnx.Linear(inner, width, **options)
        self.activation = activation

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        gate, up = blocks.kept(self.gate_proj(x)), blocks.kept(self.up_proj(x))
        return self.down_proj(self.activation(gate) * up)


class Layer(nnx.Module):
    """Attention and MLP, each after a norm and beside the residual stream."""

    def __init__(
        self, config: GatedConfig, model: type[GatedDecoder], numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        def norm() -> blocks.RMSNorm:
            return blocks.RMSNorm(
                config.hidden_size, config.rms_norm_eps, numerics, offset=model.norm_offset
            )

        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Attention(config, model, numerics, rngs)
        self.mlp = GatedMLP(config, model.activation, numerics, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        context: Context,
        rotation: Rotation,
    ) -> tuple[Float[Array, "batch length width"], Kept | None]:
        attended, kept = self.self_attn(self.input_layernorm(x), context, rotation)
        x = blocks.kept(x + attended)
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class GatedDecoder(CausalLM):
    """A causal language model; subclasses say what distinguishes their family.

    Module paths are those of transformers, with the layers stacked: `layers.self_attn.q_proj`
    has a kernel (layers, in, out). There is no dropout.

    Args:
        config: sizes and constants.
        numerics: dtypes, and whether the backward pass computes layers again.
        rngs: source of random parameters, which `nys.models.load` reads from a file instead.

    Attributes:
        norm_offset: number added to the weights of norms.
        scaled_embedding: whether embeddings are multiplied by the root of their width.
        head_norms: whether queries and keys have norms.
    """

    norm_offset: ClassVar[float] = 0.0
    scaled_embedding: ClassVar[bool] = False
    head_norms: ClassVar[bool] = False

    @staticmethod
    def activation(x: Array) -> Array:
        """Return f(x) of the MLP, by default x·σ(x)."""
        return jax.nn.silu(x)

    def __init__(
        self, config: GatedConfig, *, numerics: Numerics = FLOAT32, rngs: nnx.Rngs
    ) -> None:
        model, width = type(self), config.hidden_size
        self.config, self.numerics = config, numerics
        self.embed_tokens = nnx.Embed(config.vocab_size, width, rngs=rngs, **numerics.dtypes)
        self.layers = blocks.stack(
            lambda rngs: Layer(config, model, numerics, rngs), config.num_hidden_layers, rngs
        )
        self.norm = blocks.RMSNorm(width, config.rms_norm_eps, numerics, offset=model.norm_offset)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                width, config.vocab_size, use_bias=False, rngs=rngs, **numerics.dtypes
            )

    @full_precision
    def hidden(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length width"], Cache | None]:
        """See `CausalLM.hidden`.

        Args:
            tokens: as in `CausalLM.hidden`.
            mask: as in `CausalLM.hidden`.
            cache: as in `CausalLM.hidden`.
        """
        config = self.config
        tokens, mask = blocks.prepare(tokens, mask, self.config.vocab_size)
        x = self.embed_tokens(tokens)
        if self.scaled_embedding:
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        rotation = self._rotation(tokens.shape[1], mask, cache)
        windows = None if config.windows is None else jnp.asarray(config.windows, jnp.int32)
        x, cache = run_causal(
            self.layers, x, mask, cache, rotation, windows=windows, remat=self.numerics.remat
        )
        return self.norm(x), cache

    def _rotation(
        self, count: int, mask: Bool[Array, "batch length"] | None, cache: Cache | None
    ) -> Rotation:
        """Return the rotation of new tokens."""
        config, scaling = self.config, self.config.rope_scaling
        # Only differences of positions matter, so padding may be counted.
        positions = (0 if cache is None else cache.length) + jnp.arange(count)
        length = count
        dynamic = cache is not None and isinstance(scaling, rope.DynamicScaling)
        if dynamic or self.layers.self_attn.prefix is not None:
            # But not where a prefix has keys with rotations of its own.
            ends = jnp.cumsum(jnp.ones((1, count), bool) if mask is None else mask, axis=1)
            if cache is not None:
                ends = ends + jnp.sum(cache.mask, axis=1, keepdims=True)
            positions = ends - 1
            if dynamic:  # later tokens have other frequencies, which depend on the longest row
                length = jnp.max(ends)
        frequencies = rope.inverse_frequencies(config.head_dim, config.rope_theta, scaling, length)
        return rope.rotation(positions, frequencies, scaling.attention_factor if scaling else 1.0)

    @property
    def _cached_heads(self) -> tuple[int, int]:
        return self.config.num_key_value_heads, self.config.head_dim
