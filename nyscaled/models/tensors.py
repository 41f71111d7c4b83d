"""Parameters from the tensors of a file, and back, one tensor at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from nyscaled.checkpoints.source import WeightSource
from nyscaled.models.names import Place

BLOCK = 2**26  # bytes of a tensor that are in the host's memory at a time


def read(
    source: WeightSource, place: Place, variable: Any, sharding: NamedSharding | None
) -> Array:
    """Return a parameter; each tensor goes to its place on the device before the next is read.

    Beside the parameter itself, memory holds a block of a tensor's rows on the host and on the
    device; with a sharding the tensor and its shards.

    Args:
        source: the open file.
        place: the parameter's tensors in the file.
        variable: abstract variable with the parameter's shape and dtype.
        sharding: the parameter's sharding; None for the default device.

    Raises:
        ValueError: on a tensor that is not floating, or has finite entries that the parameter's
            dtype does not hold.
    """
    if sharding is None and not place.stacked and math.prod(place.shape) * 4 <= BLOCK:
        return _read_small(source, place, variable.ndim, variable.dtype)
    value = jnp.zeros(variable.shape, variable.dtype, device=sharding)
    axes = value.ndim - place.stacked  # of a tensor, but for a window of one pixel
    for i, name in enumerate(place.names):
        pieces = source.blocks(name, BLOCK)
        if sharding is not None:
            pieces = [(None, source.read(name))]
        for row, piece in pieces:
            _require_held(f"{source.path} has {name}", piece, value.dtype)
            piece = piece.reshape(piece.shape[:axes])
            if sharding is not None:
                piece = _split(piece, place, sharding)
            layer = i if place.stacked else None
            value = _put(value, piece, layer, row, transposed=place.transposed)
            value.block_until_ready()  # otherwise pieces that wait for the device would pile up
    return value


def _read_small(source: WeightSource, place: Place, axes: int, dtype: DTypeLike) -> Array:
    """Return a parameter of one tensor, which the host lays out: no program is compiled."""
    tensor = source.read(place.names[0])
    _require_held(f"{source.path} has {place.names[0]}", tensor, dtype)
    tensor = tensor.reshape(tensor.shape[:axes])
    tensor = np.moveaxis(tensor, (0, 1), (-1, -2)) if place.transposed else tensor
    return jax.device_put(tensor.astype(dtype))  # `jnp.array` of an array compiles a copy of it


def _require_held(what: str, piece: np.ndarray, dtype: DTypeLike) -> None:
    """Require floating entries that are finite in a dtype if they are finite."""
    if not jnp.issubdtype(piece.dtype, jnp.floating):
        raise ValueError(f"{what} in {piece.dtype}; expected floating weights")
    limit = float(jnp.finfo(dtype).max)
    # bfloat16 holds what float32 does, except for the largest numbers.
    if float(jnp.finfo(piece.dtype).max) > 1.01 * limit:
        beyond = np.isfinite(piece) & (np.abs(piece) > limit)
        if beyond.any():
            raise ValueError(
                f"{what} with {piece[beyond][0]} in it, which {dtype} does not hold; expected "
                "another dtype of load, or smaller weights"
            )


def _split(tensor: np.ndarray, place: Place, sharding: NamedSharding) -> Array:
    """Return a tensor on the mesh, split as it will be in the parameter."""
    spec = sharding.spec[1:] if place.stacked else sharding.spec
    axes = tuple(spec)
    own = PartitionSpec(*(axes[:-3:-1] + axes[:-2] if place.transposed else axes))
    layout = NamedSharding(sharding.mesh, own)
    return jax.make_array_from_callback(tensor.shape, layout, tensor.__getitem__)


def tensors(value: Array, place: Place) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameter's tensors by name, gathered from their devices when they are asked for.

    Args:
        value: the parameter.
        place: its tensors in a file.
    """
    for i, name in enumerate(place.names):
        if place.stacked:
            yield name, np.asarray(jax.device_get(_take(value, i, transposed=place.transposed)))
            continue
        tensor = np.asarray(jax.device_get(value))
        tensor = np.moveaxis(tensor, (-1, -2), (0, 1)) if place.transposed else tensor
        yield name, np.ascontiguousarray(tensor).reshape(place.shape)


@functools.partial(jax.jit, static_argnames="transposed", donate_argnames="value")
def _put(value: Array, piece: Array, layer: Any, row: Any, *, transposed: bool) -> Array:
    """Return the parameter with a tensor, or some of its rows, written into it.

    Args:
        value: the parameter.
        piece: the tensor, or some of its rows.
        layer: position of the tensor in a stacked parameter; None if it is not stacked.
        row: number of the piece's first row in the tensor; None if the piece is all of it.
        transposed: whether the tensor's rows are the parameter's columns.
    """
    new = (jnp.moveaxis(piece, (0, 1), (-1, -2)) if transposed else piece).astype(value.dtype)
    start = [0] * new.ndim
    if row is not None and start:
        start[-1 if transposed else 0] = row
    if layer is not None:
        new, start = new[None], [layer, *start]
    return jax.lax.dynamic_update_slice(value, new, [jnp.asarray(i, jnp.int32) for i in start])


@functools.partial(jax.jit, static_argnames="transposed")
def _take(value: Array, index: Any, *, transposed: bool) -> Array:
    """Return the tensor of a stack that `_put` would write."""
    tensor = value[index]
    return jnp.moveaxis(tensor, (-1, -2), (0, 1)) if transposed else tensor
