"""LLaMA 1 to 3, and models of the same architecture such as SmolLM2."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nyscaled.checkpoints.files import JsonObject
from nyscaled.models.family import Family, register
from nyscaled.models.gated import GGUF, GatedConfig, GatedDecoder, with_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(GatedConfig):
    """See `GatedConfig`.

    Attributes:
        attention_bias: whether the four layers of attention have biases.
        mlp_bias: whether the three layers of the MLP have biases.

    Examples:
        >>> config = LlamaConfig.from_json(
        ...     {
        ...         "vocab_size": 32000,
        ...         "hidden_size": 4096,
        ...         "intermediate_size": 11008,
        ...         "num_hidden_layers": 32,
        ...         "num_attention_heads": 32,
        ...     }
        ... )
        >>> config.head_dim, config.num_key_value_heads, config.rope_theta
        (128, 32, 10000.0)
    """

    model_type = "llama"
    fixed: ClassVar = {
        "hidden_act": ("silu",),
        "is_causal": (True,),
    }

    attention_bias: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    mlp_bias: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def settings(cls, config: JsonObject) -> JsonObject:
        """Return the fields, where null stands for the default, as in transformers."""
        settings = super().settings(config)
        fields = {k: v for k, v in settings.items() if v is not None or k.endswith("_token_id")}
        return with_heads(dict.fromkeys(("num_key_value_heads", "head_dim")) | fields)


@register
class Llama(GatedDecoder):
    """Pre-norm decoder with rotary positions, SwiGLU and grouped queries (Touvron et al., 2023).

    Built and called as `GatedDecoder` is.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> config = LlamaConfig(**sizes, **heads)
        >>> model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        >>> model.layers.self_attn.k_proj.kernel.shape
        (3, 8, 4)
        >>> call = lambda tokens: Llama(config, rngs=nnx.Rngs(0))(tokens)
        >>> jax.eval_shape(call, jnp.zeros((2, 5), int)).shape
        (2, 5, 16)
    """

    family = Family(
        config=LlamaConfig,
        architecture="LlamaForCausalLM",
        gguf=GGUF._replace(interleaved=True),
    )
