"""Matrices on a mesh with axes of type Explicit, which `jax.make_mesh` makes by default.

There JAX refuses a product whose sharding it would have to choose. The compiler can choose: the
same buffers are seen as arrays on a mesh with Auto axes, and results are seen on the given mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.tree_util import Partial

from nyscaled.validation import is_concrete

_P = ParamSpec("_P")
_R = TypeVar("_R")


def with_auto_axes(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return `fn` so that it also takes arrays on a mesh with Explicit axes, outside of jit."""

    @functools.wraps(fn)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        call = Partial(fn, *args, **kwargs)
        leaves = [leaf for leaf in jax.tree.leaves(call) if _is_explicit(leaf)]
        if not leaves:
            return fn(*args, **kwargs)
        if not is_concrete(leaves):
            raise ValueError(
                "A is traced and lies on a mesh with Explicit axes; expected Auto ones under jit "
                "(pass axis_types to jax.make_mesh, or call inside of jax.sharding.auto_axes)"
            )
        mesh: Mesh = leaves[0].sharding.mesh
        auto = _auto(mesh)
        with jax.set_mesh(auto):
            result = _placed(call, auto)()
        return _placed(result, mesh)

    return wrapped


def on_auto_axes(a: jax.Array) -> jax.Array:
    """Return `a` on a mesh with Auto axes, where JAX takes any slice of it: the same buffers."""
    if not _is_explicit(a) or not is_concrete(a):
        return a
    sharding = a.sharding
    assert isinstance(sharding, NamedSharding)
    assert isinstance(sharding.mesh, Mesh)
    return _placed(a, _auto(sharding.mesh))


def _auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def _is_explicit(leaf: object) -> bool:
    if not isinstance(leaf, jax.Array):
        return False
    return AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types


def _placed(tree: _R, mesh: Mesh) -> _R:
    """The same buffers on this mesh, which has the devices where they lie."""

    def placed(x: object) -> object:
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))
        return x

    return jax.tree.map(placed, tree)
