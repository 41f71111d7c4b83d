"""Which leaves of a tree of parameters are thin factors, and which of them form a pair."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FactorSpec:
    """How a leaf is read as thin factors.

    Attributes:
        pair: None for a symmetric factor, preconditioned by its own Gram matrix. Otherwise a
            name that exactly two leaves carry, each preconditioned by the other's.
        rank_axis: the axis of length r.
        batch_axes: axes that index independent factors (stacked layers); both leaves of a pair
            must agree in them. What remains is flattened to the long axis.
    """

    pair: Hashable | None = None
    rank_axis: int = -1
    batch_axes: tuple[int, ...] = ()


Spec = Any
"""A tree of `FactorSpec` or None like the parameters, or a callable that makes one from them."""

_PAIRS = {"left": ("left", "right"), "right": ("left", "right")}
_PAIRS |= {"lora_a": ("lora_a", "lora_b"), "lora_b": ("lora_a", "lora_b")}


def _name(entry: Any) -> Any:
    return next((getattr(entry, k) for k in ("key", "name", "idx") if hasattr(entry, k)), entry)


def default_spec(params: Any) -> Any:
    """Reads `params` by name: pairs are `left`/`right` (`Factors`) and `lora_a`/`lora_b` siblings.

    Every other array is a symmetric factor. The last two axes are (long, rank), but (rank, long)
    for `lora_b`; axes before them are batch axes.

    Raises:
        ValueError: on an array of fewer than two axes; it names the leaf.
    """
    return jax.tree_util.tree_map_with_path(_by_name, params)


def pair_spec(params: Any) -> Any:
    """The pairs of `default_spec`; every other leaf is None, to be left alone."""

    def of_leaf(path: Any, leaf: Any) -> FactorSpec | None:
        return _by_name(path, leaf) if path and _name(path[-1]) in _PAIRS else None

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _by_name(path: Any, leaf: Any) -> FactorSpec:
    if jnp.ndim(leaf) < 2:
        raise ValueError(
            f"leaf {_show(path)} has shape {jnp.shape(leaf)}; a factor wants (…, long, rank): "
            "keep other leaves away with optax.masked or optax.partition, or pass a spec"
        )
    last = _name(path[-1]) if path else None
    pair = (path[:-1], _PAIRS[last]) if last in _PAIRS else None
    return FactorSpec(pair, -2 if last == "lora_b" else -1, tuple(range(jnp.ndim(leaf) - 2)))


def _show(path: Any) -> str:
    return jax.tree_util.keystr(path) or "params"


class Member(NamedTuple):
    """A leaf of a group: its place among the leaves, its path, how it is read."""

    leaf: int
    path: Any
    spec: FactorSpec


def groups(spec: Spec, params: Any) -> list[tuple[Member, ...]]:
    """The leaves of `params` that go together: one member if symmetric, two if a pair.

    Raises:
        ValueError: on a leaf without its partner, or leaves that do not fit; it names them.
    """
    if not jax.tree.leaves(params):  # as `optax.tree.map_params` asks, with placeholders
        return []
    tree = default_spec(params) if spec is None else spec(params) if callable(spec) else spec
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    found: dict[tuple[str, Any], list[Member]] = {}
    for index, ((path, leaf), s) in enumerate(
        zip(leaves, treedef.flatten_up_to(tree), strict=True)
    ):
        if s is None:
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"leaf {_show(path)} has dtype {leaf.dtype}; wanted a floating one")
        key = ("single", index) if s.pair is None else ("pair", s.pair)
        found.setdefault(key, []).append(Member(index, path, s))
    arrays = [leaf for _, leaf in leaves]
    for key, members in found.items():
        if key[0] == "pair" and len(members) != 2:
            named = ", ".join(_show(m.path) for m in members)
            raise ValueError(
                f"leaf {named} belongs to a pair with {len(members)} member(s); wanted exactly two: "
                "its partner is missing, masked away or named otherwise"
            )
        shapes = [canonical(arrays[m.leaf], m.spec).shape for m in members]
        if any(s[:-2] != shapes[0][:-2] or s[-1] != shapes[0][-1] for s in shapes) or not all(
            shapes[0]
        ):
            named = " and ".join(f"{_show(m.path)} {arrays[m.leaf].shape}" for m in members)
            raise ValueError(
                f"{named} do not go together; wanted the same batch axes and the same rank ≥ 1"
            )
    return [tuple(members) for members in found.values()]


def _axes(leaf: Any, spec: FactorSpec) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Batch axes, long axes, rank axis."""
    batch = tuple(a % leaf.ndim for a in spec.batch_axes)
    rank = spec.rank_axis % leaf.ndim
    return batch, tuple(a for a in range(leaf.ndim) if a not in (*batch, rank)), rank


def canonical(leaf: Any, spec: FactorSpec) -> Any:
    """`leaf` as (batch…, long, rank), in float32 at least."""
    batch, rest, rank = _axes(leaf, spec)
    moved = jnp.transpose(leaf, (*batch, *rest, rank))
    lengths = [leaf.shape[a] for a in batch]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    return moved.reshape((*lengths, -1, leaf.shape[rank])).astype(wide)


def _restore(value: Any, leaf: Any, spec: FactorSpec) -> Any:
    """The inverse of `canonical`, in the layout and dtype of `leaf`."""
    batch, rest, rank = _axes(leaf, spec)
    order = (*batch, *rest, rank)
    moved = value.reshape([leaf.shape[a] for a in order])
    return jnp.transpose(moved, [order.index(a) for a in range(leaf.ndim)]).astype(leaf.dtype)


def over_batch(fn: Callable[..., Any], value: Any, *args: Any) -> Any:
    """`fn` over the leading batch axes of canonical arrays."""
    for _ in range(value.ndim - 2):
        fn = jax.vmap(fn)
    return fn(value, *args)


def require_params(params: Any) -> None:
    """Raises ValueError if an update was called without the current parameters."""
    if params is None:
        raise ValueError(
            "params is None; wanted the current parameters: update(grads, state, params)"
        )


def map_gradients(
    fn: Callable[..., Any], spec: Spec, updates: Any, params: Any, *extra: Any
) -> Any:
    """Replaces each factor's gradient G by fn(position, G, factor, partner, *extra leaves).

    `position` is 0 for single factors and for the first of a pair, 1 for the second; a single
    factor is its own partner. Arrays are canonical, without batch axes; other leaves pass through.
    Each of `extra` is a tree like the parameters, whose leaves have the batch axes in front.
    """
    leaves, treedef = jax.tree.flatten(params)
    grads = treedef.flatten_up_to(updates)
    others = [treedef.flatten_up_to(tree) for tree in extra]
    new = list(grads)
    for group in groups(spec, params):
        factors = [canonical(leaves[m.leaf], m.spec) for m in group]
        for position, member in enumerate(group):
            g = canonical(grads[member.leaf], member.spec)
            args = (factors[position], factors[-1 - position], *(e[member.leaf] for e in others))
            solved = over_batch(functools.partial(fn, position), g, *args)
            new[member.leaf] = _restore(solved, grads[member.leaf], member.spec)
    return treedef.unflatten(new)
