"""Which leaves of a tree of parameters are thin factors, and which of them form a pair."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
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

# Tails of paths that name a factor of a pair: `Factors`, gemma, flax, qwix.
_TAIL = re.compile(r"(?:^|/)(left|right|lora/[ab]|(?:[^/]+_)?lora_[ab])$")
_FLAT = {"left": -1, "right": -1, "lora_a": -1, "lora_b": -2}  # tails that keep no kernel axes


def _name(entry: Any) -> Any:
    return next((getattr(entry, k) for k in ("key", "name", "idx") if hasattr(entry, k)), entry)


def default_spec(params: Any) -> Any:
    """Reads `params` by name; an array that is not named as one of a pair is a symmetric factor.

    | siblings                                 | shapes                                          |
    |------------------------------------------|-------------------------------------------------|
    | `left`, `right` (`Factors`)              | (batch…, m, rank) and (batch…, n, rank)         |
    | `lora_a`, `lora_b` (flax)                | (batch…, in, rank) and (batch…, rank, out)      |
    | `<w>_lora_a`, `<w>_lora_b` (qwix),       | (batch…, in…, rank) and (batch…, rank, out…),   |
    | `lora/a`, `lora/b` (gemma)               | with as many batch axes as fit both shapes      |
    | none of these                            | (batch…, long, rank)                            |

    Where several `in` and several `out` axes are kept and the first of each has length rank, as in
    (r, h, r) and (r, r, n), the shapes do not tell: they are read as r stacked pairs, and only a
    spec can say otherwise. Boxes (an nnx Variable, linen's Partitioned) are looked into.

    Raises:
        ValueError: on an array of fewer than two axes, or a pair of which no reading fits; it
            names the leaves.

    Examples:
        >>> spec = default_spec({"w_lora_a": jnp.ones((6, 2)), "w_lora_b": jnp.ones((2, 3, 4))})
        >>> spec["w_lora_a"].rank_axis, spec["w_lora_b"].rank_axis
        (-1, 0)
    """
    return _by_name(params, _single)


def pair_spec(params: Any) -> Any:
    """The pairs of `default_spec`; every other leaf is None, to be left alone."""
    return _by_name(params, lambda path, leaf: None)


def _by_name(params: Any, otherwise: Callable[[Any, Any], FactorSpec | None]) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    roles = [_role(path) for path, _ in leaves]
    pairs: dict[Hashable, dict[bool, Any]] = {}
    for leaf, (pair, tail) in zip(leaves, roles, strict=True):
        pairs.setdefault(pair, {})[tail.endswith("b")] = leaf

    def read(path: Any, leaf: Any, pair: Hashable, tail: str) -> FactorSpec | None:
        if not tail:
            return otherwise(path, leaf)
        if tail in _FLAT:
            return dataclasses.replace(_single(path, leaf), pair=pair, rank_axis=_FLAT[tail])
        if len(pairs[pair]) == 1:
            return FactorSpec(pair)  # an orphan, which `groups` names
        batch = _num_batch_axes(pairs[pair][False], pairs[pair][True])
        return FactorSpec(pair, batch if tail.endswith("b") else -1, tuple(range(batch)))

    return treedef.unflatten([read(*leaf, *role) for leaf, role in zip(leaves, roles, strict=True)])


def _role(path: Any) -> tuple[Hashable, str]:
    """The pair that a path names and the tail that names it; (None, "") if it names none."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]  # of a box
    found = _TAIL.search("/".join(str(_name(entry)) for entry in path[-2:]))
    if found is None:
        return None, ""
    tail = found[1]
    return (path[:-1], "factors" if tail in ("left", "right") else tail[:-1]), tail


def _single(path: Any, leaf: Any) -> FactorSpec:
    if jnp.ndim(leaf) < 2:
        raise ValueError(
            f"leaf {_show(path)} has shape {jnp.shape(leaf)}; a factor wants (…, long, rank): "
            "keep other leaves away with optax.masked or optax.partition, or pass a spec"
        )
    return FactorSpec(batch_axes=tuple(range(jnp.ndim(leaf) - 2)))


def _num_batch_axes(first: Any, second: Any) -> int:
    """The most leading axes that both have, such that the rank, last in a, comes next in b."""
    (path_a, a), (path_b, b) = first, second
    for p in reversed(range(min(a.ndim, b.ndim) - 1)):
        if a.shape[:p] == b.shape[:p] and a.shape[-1] == b.shape[p]:
            return p
    raise ValueError(
        f"{_show(path_a)} {a.shape} and {_show(path_b)} {b.shape} do not go together; expected "
        "(batch…, in…, rank) and (batch…, rank, out…): for other layouts pass a spec"
    )


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
            raise ValueError(f"leaf {_show(path)} has dtype {leaf.dtype}; expected a floating one")
        key = ("single", index) if s.pair is None else ("pair", s.pair)
        found.setdefault(key, []).append(Member(index, path, s))
    arrays = [leaf for _, leaf in leaves]
    for key, members in found.items():
        if key[0] == "pair" and len(members) != 2:
            named = ", ".join(_show(m.path) for m in members)
            raise ValueError(
                f"leaf {named} belongs to a pair with {len(members)} member(s); expected exactly two: "
                "its partner is missing, masked away or named otherwise"
            )
        shapes = [_shape(arrays[m.leaf], m.spec) for m in members]
        if any(s[:-2] != shapes[0][:-2] or s[-1] != shapes[0][-1] for s in shapes) or not all(
            shapes[0]
        ):
            named = " and ".join(f"{_show(m.path)} {arrays[m.leaf].shape}" for m in members)
            raise ValueError(
                f"{named} do not go together; expected the same batch axes and the same rank ≥ 1"
            )
    return [tuple(members) for members in found.values()]


def _axes(leaf: Any, spec: FactorSpec) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Batch axes, long axes, rank axis."""
    batch = tuple(a % leaf.ndim for a in spec.batch_axes)
    rank = spec.rank_axis % leaf.ndim
    return batch, tuple(a for a in range(leaf.ndim) if a not in (*batch, rank)), rank


def _shape(leaf: Any, spec: FactorSpec) -> tuple[int, ...]:
    batch, rest, rank = _axes(leaf, spec)
    long = math.prod(leaf.shape[a] for a in rest)
    return (*(leaf.shape[a] for a in batch), long, leaf.shape[rank])


def canonical(leaf: Any, spec: FactorSpec) -> Any:
    """`leaf` as (batch…, long, rank), in float32 at least."""
    batch, rest, rank = _axes(leaf, spec)
    moved = jnp.transpose(leaf, (*batch, *rest, rank))
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    return moved.reshape(_shape(leaf, spec)).astype(wide)


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
            "params is None; expected the current parameters: update(grads, state, params)"
        )


def map_gradients(
    fn: Callable[..., Any], spec: Spec, updates: Any, params: Any, *extra: Any
) -> Any:
    """Replaces each factor's gradient G by fn(position, G, factor, partner, *extra leaves).

    `position` is 0 for single factors and for the first of a pair, 1 for the second; a single
    factor is its own partner. Arrays are canonical, without batch axes; other leaves pass through.
    Each of `extra` is a tree like the parameters, whose leaves have the batch axes in front.
    Groups of equal shapes are stacked and share one call of `fn`: what is compiled does not grow
    with the number of layers.
    """
    leaves, treedef = jax.tree.flatten(params)
    grads = treedef.flatten_up_to(updates)
    others = [treedef.flatten_up_to(tree) for tree in extra]
    new = list(grads)
    alike: dict[Any, list[tuple[Member, ...]]] = {}
    for group in groups(spec, params):
        # The type of an array has its sharding too, where that is explicit.
        kind = [
            (jax.typeof(t[m.leaf]), *_axes(leaves[m.leaf], m.spec))
            for m in group
            for t in (leaves, grads)
        ]
        alike.setdefault(tuple(kind), []).append(group)
    for same in alike.values():
        members = list(zip(*same, strict=True))  # those of each position
        specs = [_stacked_spec(leaves, m) for m in members]
        factors = [canonical(_stack(leaves, m), s) for m, s in zip(members, specs, strict=True)]
        for position, (mine, s) in enumerate(zip(members, specs, strict=True)):
            raw = _stack(grads, mine)
            args = (factors[position], factors[-1 - position], *(_stack(e, mine) for e in others))
            solved = over_batch(functools.partial(fn, position), canonical(raw, s), *args)
            results = _unstack(_restore(solved, raw, s), len(mine))
            for member, result in zip(mine, results, strict=True):
                new[member.leaf] = result
    return treedef.unflatten(new)


def _stack(leaves: Any, members: Any) -> Any:
    """The members' leaves along a new first axis; the leaf itself if there is but one."""
    chosen = [leaves[m.leaf] for m in members]
    return jnp.stack(chosen) if len(chosen) > 1 else chosen[0]


def _stacked_spec(leaves: Any, members: Any) -> FactorSpec:
    """How the result of `_stack` is read."""
    spec, ndim = members[0].spec, leaves[members[0].leaf].ndim
    if len(members) == 1:
        return spec
    batch = (0, *(a % ndim + 1 for a in spec.batch_axes))
    return FactorSpec(spec.pair, spec.rank_axis % ndim + 1, batch)


def _unstack(value: Any, length: int) -> list[Any]:
    """The inverse of `_stack`, by slices at offsets that XLA does not know.

    A slice at a constant offset is a kernel of its own, and 448 of them take CPUs half a minute to
    compile; at an offset read from an array, all are one kernel. The barrier behind them keeps the
    slices out of what comes next (Adam, say), which is then one kernel a shape too.
    """
    if length == 1:
        return [value]
    offsets = [jax.lax.optimization_barrier(jnp.array([i, 0]))[0] for i in range(length)]
    slices = [jax.lax.dynamic_index_in_dim(value, i, keepdims=False) for i in offsets]
    return jax.lax.optimization_barrier(slices)
