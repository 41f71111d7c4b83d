"""A run over several devices of one process: the mesh, and what lies on all of its devices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nyscaled.models.sharding import FSDP, TENSOR

T = TypeVar("T")


def sizes_of(text: str) -> dict[str, int]:
    """Return the sizes of a mesh's axes.

    Args:
        text: axes and sizes, such as "fsdp=4,tensor=2".

    Raises:
        ValueError: on another form.

    Examples:
        >>> sizes_of("fsdp=4,tensor=2")
        {'fsdp': 4, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in (FSDP, TENSOR) or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh is {text!r}; expected sizes of the axes {FSDP} and {TENSOR}, as in "
                f"{FSDP}=8 or {FSDP}=4,{TENSOR}=2"
            )
        sizes[name] = int(size)
    return sizes


def mesh_of(text: str) -> Mesh:
    """Return a mesh over the first devices.

    Args:
        text: as in `sizes_of`.

    Raises:
        ValueError: on another form, and if there are not so many devices.
    """
    sizes = sizes_of(text)
    count, devices = math.prod(sizes.values()), jax.devices()
    if count > len(devices):
        raise ValueError(
            f"mesh is {text!r}; expected at most {len(devices)} devices, all there are"
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices[:count]
    )


@contextlib.contextmanager
def using(text: str | None) -> Generator[None, None, None]:
    """Compile and compute over a mesh in the body of a `with`; over one device for None.

    Args:
        text: as in `sizes_of`.
    """
    if text is None:
        yield
        return
    with jax.set_mesh(mesh_of(text)):
        yield


def current() -> Mesh | None:
    """Return the mesh that is in use, None for one device."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def placed(tree: T) -> T:
    """Return arrays of which those on one device are on all of the mesh that is in use.

    A checkpoint is read to where its arrays were, and a program takes arrays of one set of devices.

    Args:
        tree: arrays, of which some may be split over the mesh.
    """
    mesh = current()
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: jax.Array) -> jax.Array:
        split = isinstance(x.sharding, NamedSharding) and len(x.sharding.device_set) == mesh.size
        return x if split else jax.device_put(x, everywhere)

    return jax.tree.map(place, tree)
