"""Specs: which leaves of a tree of parameters are thin factors, and which of them form a pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nyscaled.transforms.leaf_names import FactorName, names_of, num_leading_axes, parse

KeyPath = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class FactorSpec:
    """How a leaf is read as thin factors.

    Attributes:
        pair: None for a symmetric factor, preconditioned by its own Gram matrix. Otherwise a
            name that exactly two leaves carry, each preconditioned by the other's Gram matrix.
        rank_axis: the axis of length r.
        batch_axes: axes that index independent factors (stacked layers); both leaves of a pair
            must agree in them. The axes that remain are flattened to the long axis.
    """

    pair: Hashable | None = None
    rank_axis: int = -1
    batch_axes: tuple[int, ...] = ()


Spec = Any
"""A tree of `FactorSpec` or None like the parameters, or a callable that makes one from them."""


def default_spec(params: optax.Params) -> Any:
    """Read `params` by name; an array that is not named as one of a pair is a symmetric factor.

    | siblings                                 | shapes                                          |
    |------------------------------------------|-------------------------------------------------|
    | `left`, `right` (`Factors`)              | (batch…, m, rank) and (batch…, n, rank)         |
    | `lora_a`, `lora_b` (flax)                | (batch…, in, rank) and (batch…, rank, out)      |
    | `<w>_lora_a`, `<w>_lora_b` (qwix),       | (batch…, in…, rank) and (batch…, rank, out…),   |
    | `lora/a`, `lora/b` (gemma)               | with as many batch axes as fit both shapes      |
    | none of these                            | (batch…, long, rank)                            |

    If several `in` and several `out` axes are kept and the first of each has length rank, as in
    (r, h, r) and (r, r, n), the shapes are ambiguous: they are read as r stacked pairs. Pass a spec
    if that is wrong. The arrays in boxes (an nnx Variable, linen's Partitioned) are read alike.

    Raises:
        ValueError: on an array of fewer than two axes, or a pair of which no reading fits. The
            message names the leaves.

    Examples:
        >>> spec = default_spec({"w_lora_a": jnp.ones((6, 2)), "w_lora_b": jnp.ones((2, 3, 4))})
        >>> spec["w_lora_a"].rank_axis, spec["w_lora_b"].rank_axis
        (-1, 0)
    """
    return _by_name(params, _matrices)


def pair_spec(params: optax.Params) -> Any:
    """Return the pairs of `default_spec`. Every other leaf is None and passes through unchanged.

    Examples:
        >>> params = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4)), "x": jnp.ones(3)}
        >>> pair_spec(params)["x"]
    """
    return _by_name(params, lambda path, leaf: None)


def _by_name(params: optax.Params, otherwise: Callable[[KeyPath, Any], FactorSpec | None]) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [parse(names_of(path)) for path, _ in leaves]
    pairs: dict[Hashable, dict[int, tuple[KeyPath, Any]]] = {}
    for leaf, name in zip(leaves, names, strict=True):
        if name is not None:
            pairs.setdefault(name.pair, {})[name.position] = leaf

    def read(path: KeyPath, leaf: Any, name: FactorName | None) -> FactorSpec | None:
        if name is None:
            return otherwise(path, leaf)
        if name.convention.rank_axes is not None:
            spec = _matrices(path, leaf)
            return dataclasses.replace(
                spec, pair=name.pair, rank_axis=name.convention.rank_axes[name.position]
            )
        if len(pairs[name.pair]) == 1:
            return FactorSpec(name.pair)  # an orphan, which `groups` names
        batch = _num_batch_axes(*(pairs[name.pair][position] for position in (0, 1)))
        return FactorSpec(name.pair, batch if name.position else -1, tuple(range(batch)))

    return treedef.unflatten(
        [read(path, leaf, name) for (path, leaf), name in zip(leaves, names, strict=True)]
    )


def _matrices(path: KeyPath, leaf: Any) -> FactorSpec:
    """A factor (batch…, long, rank)."""
    if jnp.ndim(leaf) < 2:
        raise ValueError(
            f"leaf {show(path)} has shape {jnp.shape(leaf)}; expected a factor (…, long, rank): "
            "keep other leaves away with optax.masked or optax.partition, or pass a spec"
        )
    return FactorSpec(batch_axes=tuple(range(jnp.ndim(leaf) - 2)))


def _num_batch_axes(first: tuple[KeyPath, Any], second: tuple[KeyPath, Any]) -> int:
    (path_a, a), (path_b, b) = first, second
    try:
        return num_leading_axes(a.shape, b.shape, (show(path_a), show(path_b)))
    except ValueError as error:
        raise ValueError(f"{error}: for other layouts pass a spec") from None


def show(path: KeyPath) -> str:
    """Return a leaf's path as messages show it."""
    return jax.tree_util.keystr(path) or "params"
