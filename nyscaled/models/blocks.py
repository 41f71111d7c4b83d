"""What transformers are made of: norms, attention, stacks of layers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nyscaled.models.sharding import split_batch

# NumPy's too, as tokenizers return them. Masks of 0 and 1 mean the same as those of bools.
Tokens = Int[Array | np.ndarray, "batch length"]
Mask = Bool[Array | np.ndarray, "batch length"] | Tokens


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model stores and computes.

    Norms, rotations and the softmax of attention are computed in float32 for every dtype. Products
    of float32 are full float32 on accelerators too; where that is too slow, use bfloat16.

    Attributes:
        dtype: dtype of the parameters.
        compute_dtype: dtype of activations and products; `dtype` if None.
        remat: whether the backward pass computes each layer again from its input. Otherwise its
            products are kept, and only what lies between them is computed again.

    Raises:
        ValueError: on a dtype that is not floating, or float64 without JAX's 64-bit mode.
    """

    dtype: DTypeLike = jnp.float32
    compute_dtype: DTypeLike | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        for name, dtype in (("dtype", self.dtype), ("compute_dtype", self.compute_dtype)):
            if dtype is None and name == "compute_dtype":
                continue
            try:
                parsed = jnp.dtype(dtype)
            except TypeError:
                parsed = None
            if (
                not parsed
                or not jnp.issubdtype(parsed, jnp.floating)
                or jax.dtypes.canonicalize_dtype(parsed) != parsed
            ):
                raise ValueError(
                    f"{name} is {dtype!r}; expected a floating dtype, float64 only with "
                    "jax_enable_x64"
                )

    @property
    def dtypes(self) -> dict[str, Any]:
        """The dtypes as keyword arguments of Flax's layers."""
        return {"param_dtype": self.dtype, "dtype": self.compute_dtype or self.dtype}


FLOAT32 = Numerics()

KEPT, INPUT = "kept", "input"  # what the backward pass of a layer reads
UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, as what padding sees then is too


def kept(x: Array, name: str = KEPT) -> Array:
    """Return x, which the backward pass of a layer reads and does not compute again.

    Of a layer only products are kept, and what they are summed to. Whatever lies between is
    elementwise or a norm, and costs less to compute again than to write, and to read.

    Args:
        x: what is kept.
        name: name of the kind, by which `scan` chooses.
    """
    if not _is_narrow(x):
        return checkpoint_name(x, name)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return _from_bits(checkpoint_name(bits, name), x)


# XLA has no loops over bfloat16 on CPUs: of a stack of which it reads or writes a layer, it makes
# one of float32 before the loop. It lets integers be, and what depends on the layer's index.
@jax.custom_jvp
def _from_bits(bits: Array, x: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_from_bits.defjvp
def _from_bits_jvp(
    primals: tuple[Array, Array], tangents: tuple[object, Array]
) -> tuple[Array, Array]:
    return _from_bits(*primals), tangents[1]


@jax.custom_jvp
def _layer_of(layer: Array, stack: Array, index: Array) -> Array:
    def read(layer: Array, stack: Array, index: Array) -> Array:
        stack, index = jax.lax.optimization_barrier((stack, index))
        return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)

    return jax.lax.platform_dependent(
        layer, stack, index, cpu=read, default=lambda layer, *_: layer
    )


@_layer_of.defjvp
def _layer_of_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, object, object]
) -> tuple[Array, Array]:
    return _layer_of(*primals), tangents[0]


def _is_narrow(x: Array) -> bool:
    return x.dtype in (jnp.bfloat16, jnp.float16)


def prepare(
    tokens: Any, mask: Any, count: int, longest: int | None = None
) -> tuple[Array, Array | None]:
    """Return tokens in int32 and the mask in bool.

    Ids outside of the table become one beyond its end, whose row is NaN; negative ids would count
    from the end. At padding they become 0, as NaN there would reach tokens.

    Args:
        tokens: ids, (batch, length).
        mask: where there are tokens, or None.
        count: number of rows of the table that the ids choose from.
        longest: most tokens in a row, where positions are a table too.

    Raises:
        ValueError: unless tokens are integers (batch, length) and not too long, and the mask has
            their shape.
    """
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or 0 in tokens.shape:
        raise ValueError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}; expected integers (batch, length)"
        )
    if isinstance(tokens, np.ndarray):
        # 2³² + 5 is not the token 5, which JAX would make of it.
        tokens = jnp.asarray(np.clip(tokens, -1, np.iinfo(np.int32).max).astype(np.int32))
    if longest is not None and tokens.shape[1] > longest:
        raise ValueError(
            f"tokens have length {tokens.shape[1]}; expected at most {longest}, the positions that "
            "the model knows"
        )
    tokens = tokens.astype(jnp.int32)
    outside = (tokens < 0) | (tokens >= count)
    if mask is None:
        return jnp.where(outside, count, tokens), None
    mask = jnp.asarray(mask).astype(bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}; expected {tokens.shape}, that of tokens")
    return jnp.where(outside, jnp.where(mask, count, 0), tokens), mask


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
    """Return a layer norm whose variance does not cancel where the mean is large.

    E x² − (E x)² would.
    """
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs, **numerics.dtypes)


def split_heads(
    x: Float[Array, "batch length width"], head_dim: int
) -> Float[Array, "batch length heads head_dim"]:
    """Return x with an axis for the heads."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads head_dim"],
    mask: Bool[Array, "... slots"] | None,
    *,
    causal: bool,
) -> Float[Array, "batch length width"]:
    """Return attention to what `mask` marks, with the heads joined.

    If `causal`, no token sees a later one. Where there are fewer key than query heads, each serves
    a group (Ainslie et al., 2023). Rows of padding are finite and have no meaning.
    """
    dtype = query.dtype
    if dtype == jnp.float16:  # its products with sums in float32 exist only on GPUs
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    (rows, length, _, width), (slots, groups) = query.shape, key.shape[1:3]
    # The queries of a group are rows of one product with its keys.
    query = query.reshape(rows, length, groups, -1, width).transpose(0, 2, 3, 1, 4)
    grouped = query.shape
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    logits = jnp.einsum(
        "bkqd,bksd->bkqs",
        query.reshape(rows, groups, -1, width),
        key,
        precision="BF16_BF16_F32" if dtype == jnp.bfloat16 else None,  # of the derivative too
        preferred_element_type=jnp.promote_types(query.dtype, jnp.float32),
    )
    logits = (width**-0.5 * logits).astype(jnp.float32).reshape(*grouped[:-1], slots)
    if causal:
        earlier = jnp.arange(slots) <= jnp.arange(length)[:, None]
        mask = earlier if mask is None else earlier & mask
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask[:, :, None]
        logits = jnp.where(mask, logits, UNSEEN)
    weights = softmax(logits).astype(value.dtype).reshape(rows, groups, -1, slots)
    out = jnp.einsum("bkqs,bksd->bkqd", weights, value).reshape(grouped)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, -1).astype(dtype)


@jax.custom_jvp
def softmax(x: Float[Array, "*rows slots"]) -> Float[Array, "*rows slots"]:
    """Return exp(x) over its sum along the last axis, with the derivative y(dx − Σy·dx).

    Args:
        x: finite numbers.
    """
    powers = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = softmax(*primals)
    change = y * tangents[0]
    return y, change - y * jnp.sum(change, axis=-1, keepdims=True)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x·Φ(x), with Φ by erf of float32; `jax.nn.gelu` computes erfc, at twice the cost.

    Args:
        x: what a layer of an MLP returned.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """Return `count` layers as one module, whose parameters have an additional first axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def scan(
    step: Callable[..., tuple[Array, Any]],
    x: Array,
    layers: Any,
    inputs: Any,
    *shared: Any,
    remat: bool,
) -> tuple[Array, Any]:
    """Run `x, output = step(x, layer, input, *shared)` through a stack, compiled for any depth.

    Args:
        step: function of a module, not one made for the call, so that calls outside of `jit` find
            the program of the last one.
        x: what goes from layer to layer.
        layers: the stack. Counters of random streams in it, as dropout has them, advance.
        inputs: arrays whose first axis is that of the layers, or None. Outputs have the same form.
        *shared: arguments that are the same for all layers.
        remat: whether the backward pass computes each layer again.
    """
    graphdef, random, rest = nnx.split(layers, nnx.RngState, ...)
    state = nnx.as_pure(random), nnx.as_pure(rest)
    x, (outputs, random) = _scan(step, graphdef, remat, x, *state, inputs, shared)
    nnx.update(layers, random)
    return x, outputs


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scan(
    step: Any,
    graphdef: Any,
    remat: bool,
    x: Array,
    random: Any,
    rest: Any,
    inputs: Any,
    shared: Any,
) -> tuple[Array, Any]:
    stacks = jax.lax.stop_gradient((rest, inputs))

    def body(x: Array, each: Any) -> tuple[Array, Any]:
        index, random, sliced = each
        rest, layer_input = jax.tree.map(
            lambda a, stack: _layer_of(a, stack, index) if _is_narrow(a) else a, sliced, stacks
        )
        layer = nnx.merge(graphdef, random, rest, copy=True)
        x, output = step(split_batch(kept(x, INPUT)), layer, layer_input, *shared)
        return split_batch(x), (output, nnx.as_pure(nnx.state(layer, nnx.RngState)))

    saved = jax.checkpoint_policies.save_only_these_names(INPUT, *(() if remat else (KEPT,)))
    # The two passes are loops of their own, between which the compiler shares nothing anyway.
    body = jax.checkpoint(body, policy=saved, prevent_cse=False)
    indices = jnp.arange(len(jax.tree.leaves(rest)[0]))
    return jax.lax.scan(body, x, (indices, random, (rest, inputs)))


def run(layers: Any, x: Array, *shared: Any, remat: bool) -> Array:
    """Run `x = layer(x, *shared)` through a stack."""
    return scan(_plain, x, layers, None, *shared, remat=remat)[0]


def _plain(x: Array, layer: Any, _: None, *shared: Any) -> tuple[Array, None]:
    return layer(x, *shared), None
