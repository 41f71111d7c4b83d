"""The skeleton of the transforms over factors: a rule for one gradient, applied to all leaves."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from nyscaled import validation
from nyscaled.numerics import at_least_float32, full_precision
from nyscaled.transforms.pairing import FactorSpec, KeyPath, Spec, default_spec, show

Rule = Callable[..., Array]
"""(position, gradient, factor, partner, *arrays of the factor) -> the scaled gradient."""


def pairwise(
    rule_of: Callable[..., Rule],
    spec: Spec,
    init_state: Callable[[optax.Params], Any] = lambda params: optax.EmptyState(),
    *,
    per_factor: Callable[[Any, optax.Params], optax.Params] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the transform that replaces the gradient of each factor by what a rule makes of it.

    Args:
        rule_of: `(state, **extra_args) -> rule`, called once in each update. The rule is run at
            full precision; `map_gradients` says what it is called with.
        spec: which leaves are factors.
        init_state: the state of given parameters. A field `count` of it counts the updates.
        per_factor: `(state, params) -> tree` of arrays, one at each factor, which the rule receives
            as its last argument.
    """

    def init(params: optax.Params) -> Any:
        require_groups(spec, params)
        return init_state(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        params = require_params(params)
        rule = full_precision(rule_of(state, **extra_args))
        arrays = () if per_factor is None else (per_factor(state, params),)
        updates = map_gradients(rule, spec, updates, params, *arrays)
        if "count" in state._fields:
            state = state._replace(count=optax.safe_increment(state.count))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def require_params(params: optax.Params | None) -> optax.Params:
    """Return the parameters that `update` was called with; ValueError if there are none."""
    if params is None:
        raise ValueError(
            "params is None; expected the current parameters: update(grads, state, params)"
        )
    return params


def before(
    transform: optax.GradientTransformation, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Return `transform` followed by an optimizer; either may have extra arguments.

    Args:
        transform: the transform of gradients.
        inner: the optimizer.

    Raises:
        ValueError: if `inner` is not a transformation, but its learning rate, say.
    """
    validation.require_transformation("inner", inner)
    return optax.with_extra_args_support(optax.chain(transform, inner))


class Member(NamedTuple):
    """A leaf of a group: its index among the leaves, its path, how it is read."""

    leaf: int
    path: KeyPath
    spec: FactorSpec


Group = tuple[Member, ...]


def groups(spec: Spec, params: optax.Params) -> list[Group]:
    """Return the leaves of `params` that go together: one if symmetric, two if a pair.

    Args:
        spec: which leaves are factors; `default_spec` if None.
        params: the tree of parameters.

    Raises:
        ValueError: on a leaf without its partner, or leaves that do not fit; it names them.
    """
    if not jax.tree.leaves(params):  # as `optax.tree.map_params` asks, with placeholders
        return []
    tree = default_spec(params) if spec is None else spec(params) if callable(spec) else spec
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    by_key: dict[Hashable, list[Member]] = {}
    for index, ((path, leaf), s) in enumerate(
        zip(leaves, treedef.flatten_up_to(tree), strict=True)
    ):
        if s is None:
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"leaf {show(path)} has dtype {leaf.dtype}; expected a floating one")
        axes = (s.rank_axis, *s.batch_axes)
        known = all(-leaf.ndim <= axis < leaf.ndim for axis in axes)
        if not known or len({axis % leaf.ndim for axis in axes}) < len(axes):
            raise ValueError(
                f"leaf {show(path)} has {leaf.ndim} axes, and its spec has the rank axis "
                f"{s.rank_axis} and batch axes {s.batch_axes}; expected different axes of the leaf"
            )
        key = ("single", index) if s.pair is None else ("pair", s.pair)
        by_key.setdefault(key, []).append(Member(index, path, s))
    arrays = [leaf for _, leaf in leaves]
    for members in by_key.values():
        _require_fit(members, arrays)
    return [tuple(members) for members in by_key.values()]


def require_groups(spec: Spec, params: optax.Params) -> list[Group]:
    """Return `groups`; ValueError if there are none, as the transform would then do nothing."""
    result = groups(spec, params)
    if not result and (leaves := jax.tree_util.tree_leaves_with_path(params)):
        raise ValueError(
            f"no leaf is a factor among {', '.join(show(path) for path, _ in leaves[:4])}; "
            "expected names that `default_spec` reads, such as lora_a and lora_b, or a spec"
        )
    return result


def _require_fit(members: Sequence[Member], arrays: Sequence[Array]) -> None:
    """Raise ValueError unless the members are a single factor or a pair that goes together."""
    if members[0].spec.pair is not None and len(members) != 2:
        names = ", ".join(show(m.path) for m in members)
        raise ValueError(
            f"leaf {names} belongs to a pair with {len(members)} member(s); expected exactly two: "
            "its partner is missing, masked away or named otherwise"
        )
    shapes = [canonical_shape(arrays[m.leaf], m.spec) for m in members]
    agree = all(s[:-2] == shapes[0][:-2] and s[-1] == shapes[0][-1] for s in shapes)
    if not agree or not all(shapes[0]):
        names = " and ".join(f"{show(m.path)} {arrays[m.leaf].shape}" for m in members)
        raise ValueError(
            f"{names} do not go together; expected the same batch axes and the same rank ≥ 1"
        )


def require_tall(spec: Spec, params: optax.Params) -> None:
    """Raise ValueError on a factor with fewer rows than columns: its Gram matrix is singular.

    Args:
        spec: which leaves are factors.
        params: the tree of parameters.
    """
    leaves = jax.tree.leaves(params)
    for member in itertools.chain.from_iterable(groups(spec, params)):
        leaf = leaves[member.leaf]
        *_, rows, rank = canonical_shape(leaf, member.spec)
        if rows < rank:
            raise ValueError(
                f"leaf {show(member.path)} {leaf.shape} has {rows} rows for a rank of {rank}, so "
                "that its Gram matrix is singular; expected damping > 0, or the pseudo-inverse"
            )


# --- Leaves as matrices --------------------------------------------------------------------------


def _axes(leaf: Array, spec: FactorSpec) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Batch axes, long axes, rank axis."""
    batch = tuple(a % leaf.ndim for a in spec.batch_axes)
    rank = spec.rank_axis % leaf.ndim
    return batch, tuple(a for a in range(leaf.ndim) if a not in (*batch, rank)), rank


def canonical_shape(leaf: Array, spec: FactorSpec) -> tuple[int, ...]:
    """Return the shape of `canonical(leaf, spec)`."""
    batch, long_axes, rank = _axes(leaf, spec)
    long = math.prod(leaf.shape[a] for a in long_axes)
    return (*(leaf.shape[a] for a in batch), long, leaf.shape[rank])


def canonical(leaf: Array, spec: FactorSpec) -> Array:
    """Return a leaf as (batch…, long, rank), in float32 at least.

    Args:
        leaf: the array.
        spec: how it is read.
    """
    batch, long_axes, rank = _axes(leaf, spec)
    moved = jnp.transpose(leaf, (*batch, *long_axes, rank))
    return at_least_float32(moved.reshape(canonical_shape(leaf, spec)))


def restore(value: Array, leaf: Array, spec: FactorSpec) -> Array:
    """Return what `canonical` was called with, in the layout and dtype of a leaf.

    Args:
        value: the canonical array.
        leaf: an array like the result.
        spec: how it is read.
    """
    batch, long_axes, rank = _axes(leaf, spec)
    order = (*batch, *long_axes, rank)
    moved = value.reshape([leaf.shape[a] for a in order])
    return jnp.transpose(moved, [order.index(a) for a in range(leaf.ndim)]).astype(leaf.dtype)


def over_batch(fn: Callable[..., Array], value: Array, *arrays: Array) -> Array:
    """Call a function on the matrices of canonical arrays, over their leading batch axes.

    Args:
        fn: the function of matrices.
        value: a canonical array.
        *arrays: further arrays with the same batch axes.
    """
    for _ in range(value.ndim - 2):
        fn = jax.vmap(fn)
    return fn(value, *arrays)


# --- All leaves ----------------------------------------------------------------------------------


def map_gradients(
    rule: Rule, spec: Spec, updates: optax.Updates, params: optax.Params, *trees: optax.Params
) -> optax.Updates:
    """Replace each factor's gradient G by rule(position, G, factor, partner, *arrays).

    `position` is 0 for single factors and for the first of a pair, 1 for the second; a single
    factor is its own partner. Arrays are canonical, without batch axes; other leaves pass through.
    Groups of equal shapes are stacked and share one call of `rule`: what is compiled does not grow
    with the number of layers.

    Args:
        rule: see above.
        spec: which leaves are factors.
        updates: the gradients, a tree like the parameters.
        params: the parameters.
        *trees: trees like the parameters, whose leaves have the batch axes in front.
    """
    leaves, treedef = jax.tree.flatten(params)
    grads = treedef.flatten_up_to(updates)
    arrays = [treedef.flatten_up_to(tree) for tree in trees]
    new = list(grads)
    for equal in by_shape(groups(spec, params), leaves, grads):
        members = list(zip(*equal, strict=True))  # those of each position
        specs = [stacked_spec(leaves, m) for m in members]
        factors = [canonical(stack(leaves, m), s) for m, s in zip(members, specs, strict=True)]
        for position, (own, s) in enumerate(zip(members, specs, strict=True)):
            raw = stack(grads, own)
            args = (factors[position], factors[-1 - position], *(stack(x, own) for x in arrays))
            scaled = over_batch(functools.partial(rule, position), canonical(raw, s), *args)
            results = unstack(restore(scaled, raw, s), len(own))
            for member, result in zip(own, results, strict=True):
                new[member.leaf] = result
    return treedef.unflatten(new)


def by_shape(
    all_groups: Sequence[Group], leaves: Sequence[Array], grads: Sequence[Array]
) -> list[list[Group]]:
    """Return lists of the groups whose factors and gradients have equal types and are read alike.

    Args:
        all_groups: what `groups` has returned.
        leaves: leaves of the parameters.
        grads: leaves of the gradients.
    """
    equal: dict[Hashable, list[Group]] = {}
    for group in all_groups:
        # The type of an array has its sharding too, where that is explicit.
        key = tuple(
            (jax.typeof(arrays[m.leaf]), *_axes(leaves[m.leaf], m.spec))
            for m in group
            for arrays in (leaves, grads)
        )
        equal.setdefault(key, []).append(group)
    return list(equal.values())


def stack(leaves: Sequence[Array] | Mapping[int, Array], members: Sequence[Member]) -> Array:
    """Return the members' leaves along a new first axis; the leaf itself if there is only one."""
    chosen = [leaves[m.leaf] for m in members]
    return jnp.stack(chosen) if len(chosen) > 1 else chosen[0]


def stacked_spec(leaves: Sequence[Array], members: Sequence[Member]) -> FactorSpec:
    """Return how the result of `stack` is read."""
    spec, ndim = members[0].spec, leaves[members[0].leaf].ndim
    if len(members) == 1:
        return spec
    batch = (0, *(a % ndim + 1 for a in spec.batch_axes))
    return FactorSpec(spec.pair, spec.rank_axis % ndim + 1, batch)


def unstack(value: Array, length: int) -> list[Array]:
    """Return what `stack` was called with, by slices at offsets that XLA does not know.

    A slice at a constant offset is a kernel of its own, and CPUs take half a minute to compile 448
    of them; at an offset read from an array, all are one kernel. The barrier behind them keeps the
    slices out of what comes next (Adam, say), which is then one kernel per shape too.
    """
    if length == 1:
        return [value]
    offsets = [jax.lax.optimization_barrier(jnp.array([i, 0]))[0] for i in range(length)]
    slices = [jax.lax.dynamic_index_in_dim(value, i, keepdims=False) for i in offsets]
    return jax.lax.optimization_barrier(slices)
