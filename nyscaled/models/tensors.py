"""A parameter from the tensors of a file, and its tensors again, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from nyscaled.checkpoints.folder import Folder
from nyscaled.models.names import Place


def read(source: Folder, place: Place, variable: Any, sharding: NamedSharding | None) -> Array:
    """The parameter: each tensor goes into its layer's place on the device before the next is read.

    Beside the parameter itself, memory holds one tensor on the host, and on the devices that and
    its transpose.

    Args:
        source: of the tensors.
        place: theirs.
        variable: whose shape and dtype the parameter has; abstract.
        sharding: of the parameter; None for the default device.

    Raises:
        ValueError: on a tensor that is not floating.
    """
    value = jnp.zeros(variable.shape, variable.dtype, device=sharding)
    for i, name in enumerate(place.names):
        tensor: Any = source.read(name)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{source.path} has {name} in {tensor.dtype}; wanted floating weights")
        if sharding is not None:
            spec = sharding.spec[1:] if place.stacked else sharding.spec
            axes = spec[::-1] if place.transposed else spec
            there = NamedSharding(sharding.mesh, PartitionSpec(*axes))
            tensor = jax.make_array_from_callback(tensor.shape, there, tensor.__getitem__)
        value = _put(value, tensor, i if place.stacked else None, transposed=place.transposed)
        value.block_until_ready()  # otherwise tensors that wait for the device would pile up
    return value


def tensors(value: Array, place: Place) -> Iterator[tuple[str, np.ndarray]]:
    """The parameter's tensors by name, gathered from their devices as they are asked for."""
    for i, name in enumerate(place.names):
        tensor = _take(value, i if place.stacked else None, transposed=place.transposed)
        yield name, np.asarray(jax.device_get(tensor))


@functools.partial(jax.jit, static_argnames="transposed", donate_argnames="value")
def _put(value: Array, tensor: Array, index: Any, *, transposed: bool) -> Array:
    """The parameter with the tensor in it: all of it, or the layer at an index."""
    new = (tensor.T if transposed else tensor).astype(value.dtype)
    return value.at[... if index is None else index].set(new)


@functools.partial(jax.jit, static_argnames="transposed")
def _take(value: Array, index: Any, *, transposed: bool) -> Array:
    """The tensor that `_put` would put there."""
    taken = value if index is None else value[index]
    return taken.T if transposed else taken
