"""The configuration of a U-Net, and which of them are supported."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nyscaled.diffusion.settings import Settings

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
CROSS_MID = "UNetMidBlock2DCrossAttn"
ABSENT = (None,)
OFF = (False, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(Settings):
    """Sizes of a U-Net, by their names in `config.json`; the defaults are those of diffusers.

    Attributes:
        sample_size: side of the latents that the model was trained with, or both sides.
        in_channels: number of channels of latents.
        out_channels: number of channels of predictions, the same.
        block_out_channels: number of channels at each level.
        down_block_types: kind of each block on the way down: with attention or without.
        mid_block_type: kind of the block between, None if there is none.
        up_block_types: kind of each block on the way up.
        layers_per_block: number of residual blocks at each level.
        attention_head_dim: number of heads (not their width), at each level or at all.
        cross_attention_dim: width of the text's rows.
        use_linear_projection: whether files hold `proj_in` and `proj_out` as matrices, and not as
            convolutions.
        upcast_attention: whether diffusers computes logits in float32. Here they always are.
        norm_num_groups: number of groups of the norms.
        norm_eps: what norms outside of the transformers add to variances.

    Examples:
        >>> UNetConfig(cross_attention_dim=768).heads  # Stable Diffusion 1
        (8, 8, 8, 8)
    """

    class_name = "UNet2DConditionModel"
    fixed: ClassVar = {
        "center_input_sample": OFF,
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "only_cross_attention": OFF,
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0,),
        "act_fn": ("silu",),
        "transformer_layers_per_block": (1,),
        "reverse_transformer_layers_per_block": ABSENT,
        "encoder_hid_dim": ABSENT,
        "encoder_hid_dim_type": ABSENT,
        "num_attention_heads": ABSENT,
        "dual_cross_attention": OFF,
        "class_embed_type": ABSENT,
        "addition_embed_type": ABSENT,
        "addition_time_embed_dim": ABSENT,
        "num_class_embeds": ABSENT,
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": OFF,
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": ABSENT,
        "time_embedding_act_fn": ABSENT,
        "timestep_post_act": ABSENT,
        "time_cond_proj_dim": ABSENT,
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "projection_class_embeddings_input_dim": ABSENT,
        "attention_type": ("default",),
        "class_embeddings_concat": OFF,
        "mid_block_only_cross_attention": OFF,
        "cross_attention_norm": ABSENT,
        "addition_embed_type_num_heads": (64,),
    }
    reasons: ClassVar = {
        "addition_embed_type": "SDXL",
        "addition_time_embed_dim": "SDXL",
        "transformer_layers_per_block": "SDXL",
        "projection_class_embeddings_input_dim": "SDXL",
        "num_class_embeds": "a class or a noise level as condition",
        "class_embed_type": "a class or a noise level as condition",
        "time_cond_proj_dim": "a latent consistency model",
        "attention_type": "GLIGEN",
    }

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN)
    mid_block_type: str | None = CROSS_MID
    up_block_types: tuple[str, ...] = (UP, CROSS_UP, CROSS_UP, CROSS_UP)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        levels, widths = len(self.block_out_channels), self.block_out_channels
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ValueError(f"sample_size is {self.sample_size}; expected a side, or two")
        self._require_kinds("down_block_types", self.down_block_types, CROSS_DOWN, DOWN)
        self._require_kinds("up_block_types", self.up_block_types, CROSS_UP, UP)
        if self.mid_block_type not in (CROSS_MID, None):
            raise ValueError(
                f"mid_block_type is {self.mid_block_type!r:.80}; expected {CROSS_MID!r} or None"
            )
        if self.in_channels != self.out_channels:
            raise ValueError(
                f"in_channels is {self.in_channels} and out_channels {self.out_channels}; expected "
                "the same (inpainting, upscaling and depth models are not supported)"
            )
        if len(self.heads) != levels:
            raise ValueError(
                f"attention_head_dim is {self.attention_head_dim}; expected a number, or one for "
                f"each of {levels} levels"
            )
        for width, heads in zip(widths, self.heads, strict=True):
            if width % self.norm_num_groups or width % heads or width % 2:
                raise ValueError(
                    f"block_out_channels has {width}; expected even multiples of norm_num_groups, "
                    f"{self.norm_num_groups}, and of the number of heads, {heads}"
                )

    @property
    def layers(self) -> int:
        """The number of residual blocks on the way down."""
        return len(self.block_out_channels) * self.layers_per_block

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of heads at each level."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

    def _require_kinds(self, name: str, kinds: tuple[str, ...], *known: str) -> None:
        if len(kinds) != len(self.block_out_channels) or not set(kinds) <= set(known):
            raise ValueError(
                f"{name} is {kinds!r:.200}; expected {' or '.join(known)} for each of "
                f"{len(self.block_out_channels)} levels"
            )
