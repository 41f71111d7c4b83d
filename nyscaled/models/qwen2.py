"""Qwen 2 and 2.5."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nyscaled.checkpoints.files import JsonObject
from nyscaled.models.config import LARGEST, TokenId
from nyscaled.models.family import Family, register
from nyscaled.models.gated import GGUF, GatedConfig, GatedDecoder, with_heads

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(GatedConfig):
    """See `GatedConfig`.

    Attributes:
        use_sliding_window: whether there is a window; if not, `sliding_window` becomes None.
        sliding_window: number of tokens that a token sees in a layer with a window, itself and the
            ones before it.
        max_window_layers: number of first layers without a window, where `layer_types` is None.
        layer_types: "full_attention" or "sliding_attention" for each layer; None without windows.

    Examples:
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> windows = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=4)
        >>> Qwen2Config(**sizes, **heads, **windows).windows
        (2147483647, 4, 4)
    """

    model_type = "qwen2"
    fixed: ClassVar = {
        "hidden_act": ("silu",),
        "is_causal": (True,),
    }

    num_key_value_heads: int = 32
    bos_token_id: TokenId = None
    eos_token_id: TokenId = None
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    attention_bias: ClassVar[bool] = True
    # Fields that `with_heads` computes where a file lacks them.
    derived: ClassVar[JsonObject] = {"head_dim": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.sliding_window if self.use_sliding_window else None
        object.__setattr__(self, "sliding_window", window)
        types = self.layer_types
        if types is None:
            return
        known = isinstance(types, tuple) and all(name in [FULL, SLIDING] for name in types)
        if not known or len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types is {types!r:.80}; expected a tuple of {FULL!r} or {SLIDING!r} for "
                f"each of {self.num_hidden_layers} layers"
            )
        if SLIDING in types and self.sliding_window is None:
            raise ValueError(
                f"layer_types has {SLIDING!r}; expected use_sliding_window and a sliding_window"
            )
        object.__setattr__(self, "layer_types", None if window is None else types)

    @classmethod
    def settings(cls, config: JsonObject) -> JsonObject:
        """Return the fields, and those that follow from others."""
        settings = with_heads(cls.derived | super().settings(config))
        if isinstance(types := settings.get("layer_types"), list):
            settings["layer_types"] = tuple(types)
        return settings

    @property
    def output_bias(self) -> bool:
        """Only queries, keys and values have biases."""
        return False

    @property
    def windows(self) -> tuple[int, ...] | None:
        """Number of tokens that a token sees in each layer, None for all of the ones before."""
        if self.sliding_window is None:
            return None
        types = self.layer_types or tuple(
            SLIDING if i >= self.max_window_layers else FULL for i in range(self.num_hidden_layers)
        )
        return tuple(self.sliding_window if name == SLIDING else LARGEST for name in types)


@register
class Qwen2(GatedDecoder):
    """Decoder of LLaMA's kind with biases of queries, keys and values (Yang et al., 2024).

    Built and called as `GatedDecoder` is. Its first layers may attend to all tokens and the others
    to those in a window.

    Examples:
        >>> from flax import nnx
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> config = Qwen2Config(**sizes, **heads)
        >>> model = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
        >>> model.layers.self_attn.k_proj.bias.shape, model.layers.self_attn.o_proj.bias
        ((3, 4), None)
    """

    family = Family(config=Qwen2Config, architecture="Qwen2ForCausalLM", gguf=GGUF)
