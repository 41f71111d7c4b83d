"""Qwen 3, without its mixtures of experts."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nyscaled.models.family import Family, register
from nyscaled.models.gated import GGUF, GatedDecoder
from nyscaled.models.qwen2 import Qwen2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """See `Qwen2Config`.

    Attributes:
        attention_bias: whether the four layers of attention have biases.
    """

    model_type = "qwen3"
    derived: ClassVar = {}

    head_dim: int = 128
    attention_bias: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def output_bias(self) -> bool:
        """Whether the last of the four layers of attention has a bias."""
        return self.attention_bias


@register
class Qwen3(GatedDecoder):
    """Decoder of LLaMA's kind with norms of queries and keys (Qwen team, 2025).

    Built and called as `GatedDecoder` is.

    Examples:
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=6)
        >>> config = Qwen3Config(**sizes, **heads)
        >>> model = nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
        >>> model.layers.self_attn.q_norm.scale.shape
        (3, 6)
    """

    family = Family(
        config=Qwen3Config,
        architecture="Qwen3ForCausalLM",
        gguf=GGUF._replace(
            layers={
                **GGUF.layers,
                "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
                "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
            }
        ),
    )
    head_norms = True
