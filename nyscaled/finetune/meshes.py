"""A run over several devices: the mesh of a process, and what lies on all of its devices.

Several processes have the same model, each over a mesh of its own devices. Only a step of training
sees them all: its mesh has one axis more, over which the batch is split.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from nyscaled.models.sharding import FSDP, TENSOR

T = TypeVar("T")

PROCESS = "process"
"""Axis of processes in the mesh of a step."""


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


def parts_of(text: str | None) -> int:
    """Return into how many parts the examples of a batch are split, over processes and devices.

    Args:
        text: as in `sizes_of`, or None for one device.
    """
    return jax.process_count() * (1 if text is None else sizes_of(text).get(FSDP, 1))


def mesh_of(text: str) -> Mesh:
    """Return a mesh over the first devices of this process.

    Args:
        text: as in `sizes_of`.

    Raises:
        ValueError: on another form, and if there are not so many devices.
    """
    sizes = sizes_of(text)
    count, devices = math.prod(sizes.values()), jax.local_devices()
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


def over_processes() -> contextlib.AbstractContextManager[object]:
    """Compile and compute over the meshes of all processes in the body of a `with`.

    In one process nothing changes.
    """
    return jax.set_mesh(_of_all()) if jax.process_count() > 1 else contextlib.nullcontext()


def shared(tree: T) -> T:
    """Return arrays that are the same in all processes as arrays over the devices of all.

    Args:
        tree: arrays over the mesh of this process. They share their memory with the result.
    """
    if jax.process_count() == 1:
        return tree
    mesh = _of_all()

    def share(x: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, _spec(x))
        parts = [part.data for part in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(share, tree)


def own(tree: T) -> T:
    """Return arrays over the devices of all processes as arrays over those of this one.

    Args:
        tree: arrays that are the same in all processes. They share their memory with the result.
    """
    if jax.process_count() == 1:
        return tree
    mesh = current()

    def take(x: jax.Array) -> jax.Array:
        if mesh is None:
            return x.addressable_data(0)
        parts = [part.data for part in x.addressable_shards]
        sharding = NamedSharding(mesh, _spec(x))
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return jax.tree.map(take, tree)


def joined(x: np.ndarray, axis: int | None) -> jax.Array | np.ndarray:
    """Return an array of all processes, of which each has a part.

    Args:
        x: the part of this process, or the whole.
        axis: axis along which the parts follow each other; None if each process has the whole.
    """
    if jax.process_count() == 1:
        return x
    spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, PROCESS)
    return jax.make_array_from_process_local_data(NamedSharding(_of_all(), spec), x)


def summed(
    function: Callable[..., T], arguments: tuple[object, ...], split: tuple[object, ...]
) -> T:
    """Return the sums over the processes of what a function returns for the part of each.

    Args:
        function: the function.
        arguments: its arguments.
        split: for each of them a `PartitionSpec`, or a tree of these.
    """
    if not _is_split():
        return function(*arguments)

    def of_process(*arguments: object) -> T:
        return jax.lax.psum(function(*arguments), PROCESS)

    return jax.shard_map(
        of_process,
        in_specs=split,
        out_specs=PartitionSpec(),
        axis_names={PROCESS},
        check_vma=False,
    )(*arguments)


def numbered(index: Int[Array, ""]) -> Int[Array, ""]:
    """Return an index that differs between the processes, in a function that `summed` calls.

    Args:
        index: an index that they share.
    """
    if not _is_split():
        return index
    return index * jax.lax.axis_size(PROCESS) + jax.lax.axis_index(PROCESS)


def _is_split() -> bool:
    return PROCESS in jax.sharding.get_abstract_mesh().axis_names


def _spec(x: jax.Array) -> PartitionSpec:
    return x.sharding.spec if isinstance(x.sharding, NamedSharding) else PartitionSpec()


def _of_all() -> Mesh:
    """The mesh of this process, once for each process."""
    mesh, local = current(), jax.local_devices()
    if mesh is not None and PROCESS in mesh.axis_names:
        return mesh
    devices = np.array(local[:1]) if mesh is None else mesh.devices
    # Devices are numbered alike in all processes.
    places = [local.index(device) for device in devices.flat]
    everywhere = [jax.local_devices(process_index=i) for i in range(jax.process_count())]
    all_devices = np.array([[devices[i] for i in places] for devices in everywhere])
    shape, names = (
        (() if mesh is None else devices.shape),
        (() if mesh is None else mesh.axis_names),
    )
    return Mesh(
        all_devices.reshape(len(everywhere), *shape),
        (PROCESS, *names),
        axis_types=(AxisType.Auto,) * (1 + len(names)),
    )
