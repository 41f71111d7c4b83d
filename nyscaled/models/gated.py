"""Decoders with rotary positions, RMS norms and gated MLPs: what LLaMA and Gemma share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nyscaled.linalg import full_precision
from nyscaled.models import blocks, rope
from nyscaled.models.blocks import FLOAT32, Mask, Numerics, Tokens
from nyscaled.models.cache import Cache, Kept, Past, attend_causally, run_causal
from nyscaled.models.config import Config, TokenId
from nyscaled.models.embeddings import WithHead
from nyscaled.models.rope import Rotation


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConfig(Config):
    """Sizes and constants, by their names in `config.json`.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_hidden_layers: depth.
        num_attention_heads: of the queries.
        num_key_value_heads: of keys and values; a divisor of `num_attention_heads`.
        head_dim: width of a head.
        rms_norm_eps: added to the mean square.
        max_position_embeddings: of training; rotations go on beyond it, and dynamic scaling
            begins there.
        rope_theta: base of the rotations' frequencies.
        rope_scaling: how rotations are changed for longer texts, or None.
        attention_bias: whether the four layers of attention have biases.
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
    attention_bias: bool = False

    mlp_bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, num_key_value_heads "
                f"{self.num_key_value_heads}, head_dim {self.head_dim}; expected a multiple of the "
                "second, and even heads"
            )
        if isinstance(self.rope_scaling, rope.DynamicScaling) and self.head_dim < 4:
            raise ValueError(f"head_dim is {self.head_dim}; dynamic scaling needs at least 4")

    @classmethod
    def settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Also the rotations, in either of transformers' forms."""
        settings = {k: v for k, v in super().settings(config).items() if k != "rope_scaling"}
        if settings.get("attention_bias") is None:
            settings["attention_bias"] = False
        longest = settings.get("max_position_embeddings") or cls.max_position_embeddings
        settings["rope_theta"], settings["rope_scaling"] = rope.read_rope(config, longest)
        return settings

    def to_json(self) -> dict[str, Any]:
        """With the rotations in the form that every version of transformers reads."""
        return super().to_json() | {"rope_scaling": rope.write_rope(self.rope_scaling)}


class Attention(nnx.Module):
    """Rotary attention with grouped queries."""

    def __init__(self, config: GatedConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width, head = config.hidden_size, config.head_dim
        outer, inner = config.num_attention_heads * head, config.num_key_value_heads * head
        options = {"use_bias": config.attention_bias, "rngs": rngs, **numerics.dtypes}
        self.q_proj = nnx.Linear(width, outer, **options)
        self.k_proj = nnx.Linear(width, inner, **options)
        self.v_proj = nnx.Linear(width, inner, **options)
        self.o_proj = nnx.Linear(outer, width, **options)
        self.head_dim = head

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch slots"] | None,
        past: Past | None,
        by: Rotation,
    ) -> tuple[Float[Array, "batch length width"], Kept | None]:
        layers = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (blocks.split_heads(layer(x), self.head_dim) for layer in layers)
        query, key = rope.rotate(query, by), rope.rotate(key, by)
        out, kept = attend_causally(query, key, value, mask, past)
        return self.o_proj(out), kept


class GatedMLP(nnx.Module):
    """down(f(gate(x)) · up(x)) (Shazeer, 2020)."""

    def __init__(
        self, config: GatedConfig, activation: Callable, numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        options = {"use_bias": config.mlp_bias, "rngs": rngs, **numerics.dtypes}
        self.gate_proj = nnx.Linear(width, inner, **options)
        self.up_proj = nnx.Linear(width, inner, **options)
        self.down_proj = nnx.Linear(inner, width, **options)
        self.activation = activation

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and MLP, each after a norm and beside the residual stream."""

    def __init__(
        self, config: GatedConfig, kind: type[GatedDecoder], numerics: Numerics, rngs: nnx.Rngs
    ) -> None:
        def norm() -> blocks.RMSNorm:
            return blocks.RMSNorm(
                config.hidden_size, config.rms_norm_eps, numerics, offset=kind.norm_offset
            )

        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Attention(config, numerics, rngs)
        self.mlp = GatedMLP(config, kind.activation, numerics, rngs)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch slots"] | None,
        past: Past | None,
        by: Rotation,
    ) -> tuple[Float[Array, "batch length width"], Kept | None]:
        attended, kept = self.self_attn(self.input_layernorm(x), mask, past, by)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class GatedDecoder(WithHead):
    """A causal language model; subclasses say what sets their family apart.

    Module paths are those of transformers, with the layers stacked: `layers.self_attn.q_proj`
    has a kernel (layers, in, out). There is no dropout.

    Args:
        config: sizes.
        numerics: dtypes, and whether layers are computed anew in the backward pass.
        rngs: for random parameters; `nys.models.load` reads them instead.
    """

    architecture: ClassVar[str]
    prefix: ClassVar[str] = "model."
    max_length: ClassVar[None] = None  # rotations have no end
    norm_offset: ClassVar[float]
    scaled_embedding: ClassVar[bool]
    activation: ClassVar[Callable[[Array], Array]]  # f of the MLP

    def __init__(
        self, config: GatedConfig, *, numerics: Numerics = FLOAT32, rngs: nnx.Rngs
    ) -> None:
        kind, width = type(self), config.hidden_size
        self.config, self.numerics = config, numerics
        self.embed_tokens = nnx.Embed(config.vocab_size, width, rngs=rngs, **numerics.dtypes)
        self.layers = blocks.stack(
            lambda rngs: Layer(config, kind, numerics, rngs), config.num_hidden_layers, rngs
        )
        self.norm = blocks.RMSNorm(width, config.rms_norm_eps, numerics, offset=kind.norm_offset)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                width, config.vocab_size, use_bias=False, rngs=rngs, **numerics.dtypes
            )

    def __call__(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits of the next token at each position, in the compute dtype.

        Args:
            tokens: ids, below `vocab_size` (others give NaN, at padding any will do).
            mask: True (or 1) where there is a token and False where there is padding, on either
                side; None for no padding. Logits at padding have no meaning.

        Raises:
            ValueError: unless tokens are integers (batch, length), and the mask of their shape.
        """
        return self.logits(self.hidden(tokens, mask)[0])

    @full_precision
    def hidden(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length width"], Cache | None]:
        """What the head reads, and the cache with these tokens.

        Args:
            tokens: as in a call; with a cache, those that follow the ones in it.
            mask: as in a call.
            cache: of `new_cache` or an earlier call, with room for the tokens (which is not
                checked where its length is traced).
        """
        config = self.config
        tokens, mask = blocks.prepare(tokens, mask, self.config.vocab_size)
        x = self.embed_tokens(tokens)
        if self.scaled_embedding:
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        by = self._rotation(tokens.shape[1], mask, cache)
        x, cache = run_causal(self.layers, x, mask, cache, by, remat=self.numerics.remat)
        return self.norm(x), cache

    def _rotation(
        self, count: int, mask: Bool[Array, "batch length"] | None, cache: Cache | None
    ) -> Rotation:
        """The rotation of new tokens."""
        config, scaling = self.config, self.config.rope_scaling
        # Only differences of positions matter, so that padding may be counted.
        positions = (0 if cache is None else cache.length) + jnp.arange(count)
        length = count
        if cache is not None and isinstance(scaling, rope.DynamicScaling):
            # Unless later tokens have other frequencies, which depend on the longest row.
            seen = jnp.ones((1, count), bool) if mask is None else mask
            before = jnp.sum(cache.mask, axis=1, keepdims=True)
            ends = before + jnp.cumsum(seen, axis=1)
            positions, length = ends - 1, jnp.max(ends)
        frequencies = rope.inverse_frequencies(config.head_dim, config.rope_theta, scaling, length)
        return rope.rotation(positions, frequencies, scaling.attention_factor if scaling else 1.0)

    @full_precision
    def logits(self, x: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        """The head."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.attend(x) if tied else self.lm_head(x)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens in each row, in the compute dtype."""
        config = self.config
        heads = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch, capacity, *heads)
        return Cache.empty(shape, self.numerics.dtypes["dtype"])
