"""Names of the leaves that hold the factors of a pair, as the JAX libraries of LoRA give them.

`CONVENTIONS` is the one place where these names are written down. A path is a tuple of names, the
last of which is the leaf's.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

Path = tuple[str, ...]
Shape = tuple[int, ...]


class Convention(NamedTuple):
    """How a library names the factors of a pair and their kernel.

    Attributes:
        library: name of the library; "Factors" for the class of that name.
        ends: patterns of the last names of a factor's path. The names before them are the layer's.
        kernels: paths from the layer at which the kernel may be, the likeliest first; `*` stands
            for the weight that the factor's name contains.
        rank_axes: the axis of length r of either factor, where both are (stacks of) matrices. None
            where factors keep the axes of their kernel, so that shapes decide.
    """

    library: str
    ends: tuple[str, ...]
    kernels: tuple[Path, ...]
    rank_axes: tuple[int, int] | None


_BESIDE = (("kernel",), ("base_module", "kernel"))

CONVENTIONS = (
    Convention("Factors", ("(?P<side>left|right)",), (), (-1, -1)),
    Convention("nyscaled", ("adapters", ".+", "lora_(?P<side>[ab])"), (), (-1, -2)),
    Convention("flax", ("lora", "lora_(?P<side>[ab])"), _BESIDE, (-1, -2)),
    Convention("flax", ("lora_(?P<side>[ab])",), _BESIDE, (-1, -2)),
    Convention("qwix", ("(?P<weight>.+)_lora_(?P<side>[ab])",), (("*",),), None),
    Convention("gemma", ("lora", "(?P<side>[ab])"), (("w",), ("kernel",)), None),
)

_OTHER = {"a": "b", "b": "a", "left": "right", "right": "left"}


class FactorName(NamedTuple):
    """What the path of a leaf says, if the leaf is a factor of a pair.

    Attributes:
        convention: the convention that the path follows.
        position: 0 for the first factor of the pair (a, left), 1 for the second.
        pair: the path of the first factor, by which both factors are known.
        partner: the path of the other factor.
        layer: the path of the layer that the pair adapts.
        kernels: the paths at which the layer's kernel may be, the likeliest first.
    """

    convention: Convention
    position: int
    pair: Path
    partner: Path
    layer: Path
    kernels: tuple[Path, ...]


def parse(path: Path) -> FactorName | None:
    """Read the path of a leaf; None if it does not name a factor of a pair.

    Examples:
        >>> name = parse(("mlp", "up_lora_b"))
        >>> name.convention.library, name.position, name.partner, name.layer, name.kernels
        ('qwix', 1, ('mlp', 'up_lora_a'), ('mlp', 'up'), (('mlp', 'up'),))
        >>> parse(("mlp", "bias"))
    """
    for convention in CONVENTIONS:
        above, names = path[: -len(convention.ends)], path[-len(convention.ends) :]
        if len(names) < len(convention.ends):
            continue
        matches = [re.fullmatch(*pair) for pair in zip(convention.ends, names, strict=True)]
        if None not in matches and (last := matches[-1]) is not None:
            return _read(convention, path, above, last)
    return None


def _read(convention: Convention, path: Path, above: Path, last: re.Match[str]) -> FactorName:
    side, weight = last["side"], last.groupdict().get("weight")
    name = path[-1][: last.start("side")] + _OTHER[side] + path[-1][last.end("side") :]
    partner = (*path[:-1], name)
    position = int(side in ("b", "right"))
    # qwix names the weight of a layer, or a weight that is a layer by itself.
    layer = above if weight in (None, "kernel") else (*above, weight)
    kernels = (
        (*above, *(weight if weight and part == "*" else part for part in parts))
        for parts in convention.kernels
    )
    return FactorName(
        convention, position, partner if position else path, partner, layer, tuple(kernels)
    )


def names_of(path: tuple[Any, ...]) -> Path:
    """Return the names in a path of `jax.tree_util`, without the `.value` of a box.

    Boxes are flax's `Variable` and `Partitioned`. A key of a flattened tree holds several names: as
    a tuple, or joined by "/" or ".".

    Examples:
        >>> params = {("mlp", "up"): {"lora/a": 0}}
        >>> [names_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        [('mlp', 'up', 'lora', 'a')]
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    keys = (getattr(entry, "key", entry) for entry in path)
    joined = (
        "/".join(map(str, key))
        if isinstance(key, tuple)
        else jax.tree_util.keystr((entry,), simple=True)
        for entry, key in zip(path, keys, strict=True)
    )
    return tuple(name for names in joined for name in re.split("[/.]", names))


def num_leading_axes(first: Shape, second: Shape, names: tuple[str, str]) -> int:
    """Return how many leading axes factors (…, in…, r) and (…, r, out…) share: the most that fit.

    Args:
        first: shape of the first factor.
        second: shape of the second factor.
        names: what messages call the factors.

    Raises:
        ValueError: if the shapes do not go together.
    """
    for count in reversed(range(min(len(first), len(second)) - 1)):
        if first[:count] == second[:count] and first[-1] == second[count]:
            return count
    raise ValueError(
        f"{names[0]} {first} and {names[1]} {second} do not go together; expected (batch…, in…, "
        "rank) and (batch…, rank, out…)"
    )
