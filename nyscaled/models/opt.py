"""OPT: learned positions, layer norms with biases, ReLU."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nyscaled.checkpoints.files import JsonObject
from nyscaled.models import blocks
from nyscaled.models.blocks import FLOAT32, Mask, Numerics, Tokens
from nyscaled.models.cache import Cache, Context, Kept, attend_causally, run_causal
from nyscaled.models.causal import CausalLM
from nyscaled.models.config import Config, TokenId
from nyscaled.models.family import Family, register
from nyscaled.models.prefix import PrefixedAttention
from nyscaled.numerics import full_precision

EPS = 1e-5
# The first rows of the table of positions belong to padding.
OFFSET = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptConfig(Config):
    """Sizes, by their names in `config.json`.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        ffn_dim: width inside the MLP.
        num_hidden_layers: depth.
        num_attention_heads: number of heads; a divisor of `hidden_size`.
        word_embed_proj_dim: width of the embedding, which is projected if it is not `hidden_size`.
        max_position_embeddings: longest input.
        do_layer_norm_before: whether norms come before attention and MLP, or (350m) after.
    """

    model_type = "opt"
    fixed: ClassVar = {
        "activation_function": ("relu",),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
        "_remove_final_layer_norm": (False,),
        "is_causal": (True,),
    }

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    word_embed_proj_dim: int
    max_position_embeddings: int = 2048
    bos_token_id: TokenId = 2
    eos_token_id: TokenId = 2
    pad_token_id: TokenId = 1
    do_layer_norm_before: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} with {self.num_attention_heads} heads; "
                "expected a multiple of num_attention_heads"
            )

    @classmethod
    def settings(cls, config: JsonObject) -> JsonObject:
        """Return the fields; the embedding is as wide as the model by default.

        Args:
            config: what `config.json` holds.
        """
        settings = super().settings(config)
        if settings.get("word_embed_proj_dim") is None and "hidden_size" in settings:
            settings["word_embed_proj_dim"] = settings["hidden_size"]
        return settings


class Attention(PrefixedAttention):
    """Attention with as many key as query heads, and biases."""

    def __init__(self, config: OptConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        options: dict[str, Any] = {"rngs": rngs, **numerics.dtypes}
        self.q_proj = nnx.Linear(width, width, **options)
        self.k_proj = nnx.Linear(width, width, **options)
        self.v_proj = nnx.Linear(width, width, **options)
        self.out_proj = nnx.Linear(width, width, **options)
        self.head_dim = config.hidden_size // config.num_attention_heads

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        context: Context,
    ) -> tuple[Float[Array, "batch length width"], Kept | None]:
        layers = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (
            blocks.kept(blocks.split_heads(layer(x), self.head_dim)) for layer in layers
        )
        out, kept = attend_causally(query, key, value, context, self.prefix)
        return self.out_proj(out), kept


class Layer(nnx.Module):
    """Attention and MLP beside the residual stream, with norms before or after each."""

    def __init__(self, config: OptConfig, numerics: Numerics, rngs: nnx.Rngs) -> None:
        self.self_attn = Attention(config, numerics, rngs)
        self.self_attn_layer_norm = blocks.layer_norm(config.hidden_size, EPS, numerics, rngs)
        self.fc1 = nnx.Linear(config.hidden_size, config.ffn_dim, rngs=rngs, **numerics.dtypes)
        self.fc2 = nnx.Linear(config.ffn_dim, config.hidden_size, rngs=rngs, **numerics.dtypes)
        self.final_layer_norm = blocks.layer_norm(config.hidden_size, EPS, numerics, rngs)
        self.norm_first = config.do_layer_norm_before

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        context: Context,
    ) -> tuple[Float[Array, "batch length width"], Kept | None]:
        before = self.self_attn_layer_norm(x) if self.norm_first else x
        attended, kept = self.self_attn(before, context)
        x = blocks.kept(x + attended)
        if self.norm_first:
            return x + self._mlp(self.final_layer_norm(x)), kept
        x = self.self_attn_layer_norm(x)
        return self.final_layer_norm(blocks.kept(x + self._mlp(x))), kept

    def _mlp(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return self.fc2(jax.nn.relu(blocks.kept(self.fc1(x))))


@register
class Opt(CausalLM):
    """The causal language model of Zhang et al., 2022; its head is the embedding, if tied.

    Module paths are those of transformers, with the layers stacked: `layers.fc1` has a kernel
    (layers, in, out). There is no dropout.

    Args:
        config: sizes and constants.
        numerics: dtypes, and whether the backward pass computes layers again.
        rngs: source of random parameters, which `nys.models.load` reads from a file instead.

    Examples:
        >>> sizes = dict(vocab_size=16, hidden_size=8, ffn_dim=12, num_hidden_layers=3)
        >>> config = OptConfig(**sizes, num_attention_heads=2, word_embed_proj_dim=6)
        >>> model = nnx.eval_shape(lambda: Opt(config, rngs=nnx.Rngs(0)))
        >>> model.project_in.kernel.shape, model.layers.fc1.kernel.shape
        ((6, 8), (3, 8, 12))
    """

    family = Family(
        config=OptConfig,
        architecture="OPTForCausalLM",
        stack="decoder.layers",
        outside=tuple(
            f"decoder.{name}"
            for name in (
                *("embed_tokens", "embed_positions", "project_in", "project_out"),
                "final_layer_norm",
            )
        ),
        split_inputs=("out_proj", "fc2"),
        ignored=r"(model\.)?decoder\.version",  # of fairseq's files
    )

    def __init__(self, config: OptConfig, *, numerics: Numerics = FLOAT32, rngs: nnx.Rngs) -> None:
        self.config, self.numerics = config, numerics
        width, narrow, dtypes = config.hidden_size, config.word_embed_proj_dim, numerics.dtypes
        rows = config.max_position_embeddings + OFFSET
        self.embed_tokens = nnx.Embed(config.vocab_size, narrow, rngs=rngs, **dtypes)
        self.embed_positions = nnx.Embed(rows, width, rngs=rngs, **dtypes)
        if narrow != width:
            self.project_in = nnx.Linear(narrow, width, use_bias=False, rngs=rngs, **dtypes)
            self.project_out = nnx.Linear(width, narrow, use_bias=False, rngs=rngs, **dtypes)
        self.layers = blocks.stack(
            lambda rngs: Layer(config, numerics, rngs), config.num_hidden_layers, rngs
        )
        if config.do_layer_norm_before:
            self.final_layer_norm = blocks.layer_norm(config.hidden_size, EPS, numerics, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                narrow, config.vocab_size, use_bias=False, rngs=rngs, **dtypes
            )

    @full_precision
    def hidden(
        self,
        tokens: Tokens,
        mask: Mask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length width"], Cache | None]:
        """See `CausalLM.hidden`. Tokens beyond the table of positions give NaN with a cache.

        Args:
            tokens: as in `CausalLM.hidden`.
            mask: as in `CausalLM.hidden`.
            cache: as in `CausalLM.hidden`.
        """
        config = self.config
        longest = self.max_length if cache is None else None
        tokens, mask = blocks.prepare(tokens, mask, config.vocab_size, longest)
        present = jnp.ones_like(tokens) if mask is None else mask.astype(tokens.dtype)
        count = jnp.cumsum(present, axis=1)
        if cache is not None:
            count = count + jnp.sum(cache.mask, axis=1, keepdims=True, dtype=tokens.dtype)
        x = self.embed_tokens(tokens)
        if self._projected:
            x = self.project_in(x)
        x = x + self.embed_positions(count * present - 1 + OFFSET)
        x, cache = run_causal(self.layers, x, mask, cache, remat=self.numerics.remat)
        if config.do_layer_norm_before:
            x = self.final_layer_norm(x)
        return x, cache

    @full_precision
    def logits(self, x: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        """Return the logits of hidden states.

        Args:
            x: hidden states.
        """
        return super().logits(self.project_out(x) if self._projected else x)

    @property
    def _cached_heads(self) -> tuple[int, int]:
        heads = self.config.num_attention_heads
        return heads, self.config.hidden_size // heads

    @property
    def max_length(self) -> int:
        """Most tokens in a row."""
        return self.config.max_position_embeddings

    @property
    def _projected(self) -> bool:
        return self.config.word_embed_proj_dim != self.config.hidden_size
