"""What transformers are made of: norms, rotary positions, attention, stacks of layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nyscaled.models.sharding import split_batch

# NumPy's too, as tokenizers give them.
Tokens = Int[Array | np.ndarray, "batch length"]
Mask = Bool[Array | np.ndarray, "batch length"]
Rotation = tuple[Float[Array, "length half"], Float[Array, "length half"]]


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model stores and computes.

    Attributes:
        dtype: of the parameters.
        compute_dtype: of activations and products; `dtype` if None. Norms, rotations and the
            softmax of attention are computed in float32 whatever it is.
        remat: whether the backward pass computes each layer anew instead of keeping its insides.
    """

    dtype: Any = jnp.float32
    compute_dtype: Any = None
    remat: bool = False

    @property
    def dtypes(self) -> dict[str, Any]:
        """As keyword arguments of Flax's layers."""
        return {"param_dtype": self.dtype, "dtype": self.compute_dtype or self.dtype}


FLOAT32 = Numerics()


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + scale) over the last axis (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float, numerics: Numerics, *, offset: float = 0.0) -> None:
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, numerics.dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.offset + self.scale[...].astype(jnp.float32)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


def layer_norm(width: int, eps: float, numerics: Numerics, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm whose variance does not cancel where the mean is large, as E x² − (E x)² does."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs, **numerics.dtypes)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's change of slow rotations, for contexts longer than trained on.

    Rotations that turn less than `low_freq_factor` times within
    `original_max_position_embeddings` become `factor` times slower, those that turn more than
    `high_freq_factor` times stay, and the ones between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """θ^(−2i/d) for each pair of coordinates, (head_dim / 2,), as float64 constants.

    Su et al., 2021; `scaling` as in Llama 3.

    Example:
        >>> inverse_frequencies(4, 100.0, None)
        array([1. , 0.1])
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotation(positions: Int[Array, " length"], frequencies: np.ndarray) -> Rotation:
    """Cosines and sines of the angles at some positions, float32."""
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"], by: Rotation
) -> Float[Array, "batch length heads head_dim"]:
    """Turns the pairs (x_i, x_{i + head_dim/2}), in float32."""
    cos, sin = (part[:, None] for part in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def split_heads(
    x: Float[Array, "batch length width"], head_dim: int
) -> Float[Array, "batch length heads head_dim"]:
    """The heads on an axis of their own."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    mask: Mask | None,
    *,
    causal: bool = True,
) -> Float[Array, "batch length width"]:
    """Attention over the tokens that `mask` marks, heads joined again.

    If `causal`, no token sees a later one. Fewer key than query heads are shared in groups
    (Ainslie et al., 2023). Rows of padding come out finite, without meaning.
    """
    keys = None if mask is None else mask[:, None, None, :]
    out = jax.nn.dot_product_attention(query, key, value, mask=keys, is_causal=causal)
    return out.reshape(*out.shape[:-2], -1)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """`count` layers as one module, whose parameters have an axis more in front."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def scan(
    step: Callable[..., tuple[Array, Any]],
    x: Array,
    layers: Any,
    inputs: Any,
    *shared: Any,
    remat: bool,
) -> tuple[Array, Any]:
    """`x, output = step(x, layer, input, *shared)` through a stack, compiled once whatever its depth.

    Inputs and outputs have the axis of the layers in front; None if there are none.
    """

    def constrained(x: Array, *args: Any) -> tuple[Array, Any]:
        x, output = step(split_batch(x), *args)
        return split_batch(x), output

    axes = (nnx.Carry, 0, 0, *(None for _ in shared))
    body = nnx.remat(constrained) if remat else constrained
    return nnx.scan(body, in_axes=axes, out_axes=(nnx.Carry, 0))(x, layers, inputs, *shared)


def run(layers: Any, x: Array, *shared: Any, remat: bool) -> Array:
    """`x = layer(x, *shared)` through a stack."""

    def step(x: Array, layer: Any, _: None, *shared: Any) -> tuple[Array, None]:
        return layer(x, *shared), None

    return scan(step, x, layers, None, *shared, remat=remat)[0]
