"""Gemma 1."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array

from nyscaled.models.config import TokenId
from nyscaled.models.family import Family, register
from nyscaled.models.gated import GGUF, GatedConfig, GatedDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(GatedConfig):
    """See `GatedConfig`; the width of a head is given, and the head is the embedding.

    Attributes:
        attention_bias: whether the four layers of attention have biases.
    """

    model_type = "gemma"
    # The first releases say "gelu" and mean its approximation by tanh.
    fixed: ClassVar = {
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
        "use_bidirectional_attention": (None, False),
        "is_causal": (True,),
    }

    max_position_embeddings: int = 8192
    bos_token_id: TokenId = 2
    eos_token_id: TokenId = 1
    pad_token_id: TokenId = 0
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]


@register
class Gemma(GatedDecoder):
    """Decoder with norms scaled by 1 + w, GeGLU and scaled embeddings (Mesnard et al., 2024).

    Built and called as `GatedDecoder` is.

    Examples:
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=6)
        >>> config = GemmaConfig(**sizes, **heads)
        >>> model = nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))
        >>> model.layers.self_attn.q_proj.kernel.shape
        (3, 8, 12)
    """

    family = Family(
        config=GemmaConfig,
        architecture="GemmaForCausalLM",
        gguf=GGUF._replace(norm_offset=1.0),  # files have 1 + w
    )
    norm_offset = 1.0
    scaled_embedding = True

    @staticmethod
    def activation(x: Array) -> Array:
        """GELU, with tanh for erf."""
        return jax.nn.gelu(x, approximate=True)
