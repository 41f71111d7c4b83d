"""Adapters that others have put in: where they are, and how they lie over their kernels.

They are found by name, in a tree of parameters or among the variables of an NNX model;
`nyscaled.transforms.leaf_names` has the conventions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

from nyscaled.lora.axes import Split
from nyscaled.transforms.leaf_names import Path, Shape, num_leading_axes, parse


class Pair(NamedTuple):
    """An adapter by the paths of its arrays.

    Attributes:
        library: whose adapter it is; "nyscaled" for those of `apply`.
        layer: path of the layer, with dots.
        a: path of the factor (…, in…, r).
        b: path of the factor (…, r, out…).
        kernel: path of the kernel, if there is one.
    """

    library: str
    layer: str
    a: Path
    b: Path
    kernel: Path | None

    @property
    def set_name(self) -> str:
        """The name of the set that an adapter of `apply` belongs to."""
        return self.a[-2]


class Layout(NamedTuple):
    """A pair over its kernel: leading axes in common, the kernel's split behind them."""

    depth: int
    parts: Split


def find(paths: Iterable[Path]) -> list[Pair]:
    """Return the pairs among the leaves of a tree.

    Raises:
        ValueError: on a factor without its partner; it names the leaf.
    """
    known = set(paths)
    pairs = []
    for path in sorted(known):
        name = parse(path)
        if name is None or name.convention.library == "Factors":
            continue
        if name.partner not in known:
            raise ValueError(
                f"{'.'.join(path)} has no {name.partner[-1]} beside it; expected both factors"
            )
        if name.position == 0:
            kernel = next((k for k in name.kernels if k in known), None)
            layer = ".".join(name.layer) or "model"
            pairs.append(Pair(name.convention.library, layer, path, name.partner, kernel))
    return pairs


def num_shared(a: Shape, b: Shape, layer: str) -> int:
    """Return how many leading axes factors of these shapes share; `layer` is for messages."""
    return num_leading_axes(a, b, (f"{layer}: a", "b"))


def layout(kernel: Shape, a: Shape, b: Shape, layer: str) -> Layout:
    """Return how factors lie over their kernel.

    The first axes of the kernel are its inputs where that fits (as in `Dense`). Otherwise its
    inputs are the axes whose lengths are those of a (as in the einsum `BTD,NDH->BTNH`).

    Args:
        kernel: shape of the kernel.
        a: shape of the first factor.
        b: shape of the second factor.
        layer: path of the layer, for messages.

    Raises:
        ValueError: if nothing fits, or more than one choice of axes does.
    """
    depth = num_shared(a, b, layer)
    splits = []
    if kernel[:depth] == a[:depth]:
        rows, columns, lengths = a[depth:-1], b[depth + 1 :], kernel[depth:]
        splits = _first_axes(lengths, rows, columns) or _equal_axes(lengths, rows, columns)
    if len(splits) != 1:
        raise ValueError(
            f"{layer}: factors {a} and {b} lie over the kernel {kernel} in {len(splits)} ways; "
            "expected one"
        )
    return Layout(depth, splits[0])


def _first_axes(lengths: Shape, rows: Shape, columns: Shape) -> list[Split]:
    """The least number of first axes that have as many rows as a, if there is one."""
    axes, sizes = tuple(range(len(lengths))), (math.prod(rows), math.prod(columns))
    for count in range(1, len(lengths)):
        if (math.prod(lengths[:count]), math.prod(lengths[count:])) == sizes:
            return [Split((), axes[:count], axes[count:])]
    return []


def _equal_axes(lengths: Shape, rows: Shape, columns: Shape) -> list[Split]:
    """All choices of axes, in order, that have just the lengths of a's and b's."""
    splits = []
    for inputs in itertools.combinations(range(len(lengths)), len(rows)):
        outputs = tuple(i for i in range(len(lengths)) if i not in inputs)
        if (tuple(lengths[i] for i in inputs), tuple(lengths[i] for i in outputs)) == (
            rows,
            columns,
        ):
            splits.append(Split((), inputs, outputs))
    return splits
