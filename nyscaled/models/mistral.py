"""Mistral: LLaMA's layers with attention in a sliding window."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nyscaled.checkpoints.files import JsonObject
from nyscaled.models.family import Family, register
from nyscaled.models.gated import GatedConfig, GatedDecoder, with_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(GatedConfig):
    """See `GatedConfig`.

    Attributes:
        sliding_window: number of tokens that a token sees in each layer, itself and the ones
            before it; None for all.
    """

    model_type = "mistral"
    fixed: ClassVar = {
        "hidden_act": ("silu",),
        "is_causal": (True,),
    }

    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    @classmethod
    def settings(cls, config: JsonObject) -> JsonObject:
        """Return the fields, and the sizes of heads that follow from others."""
        if config.get("layer_types") is not None:
            raise ValueError(
                f"layer_types is {config['layer_types']!r:.80}; for mistral only null is supported"
            )
        return with_heads({"head_dim": None} | super().settings(config))

    @property
    def windows(self) -> tuple[int, ...] | None:
        """Number of tokens that a token sees in each layer, None for all of the ones before."""
        if self.sliding_window is None:
            return None
        return (self.sliding_window,) * self.num_hidden_layers


@register
class Mistral(GatedDecoder):
    """Decoder of LLaMA's kind with a sliding window (Jiang et al., 2023).

    Built and called as `GatedDecoder` is. GGUF files of Mistral have the architecture `llama` and
    are read as `Llama`.

    Examples:
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> config = MistralConfig(**sizes, **heads, sliding_window=4)
        >>> config.windows
        (4, 4, 4)
        >>> model = nnx.eval_shape(lambda: Mistral(config, rngs=nnx.Rngs(0)))
        >>> model.layers.self_attn.k_proj.kernel.shape
        (3, 8, 4)
    """

    family = Family(config=MistralConfig, architecture="MistralForCausalLM")
