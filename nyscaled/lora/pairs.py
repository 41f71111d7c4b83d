"""Pairs of factors in a tree or a model: where they are, and how they read their kernels.

They are found by name, in a tree of parameters or among the variables of an NNX model;
`nyscaled.transforms.leaf_names` has the conventions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

from nyscaled.lora.view import AxisRoles, KernelView
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
    """Return how many leading axes factors share.

    Args:
        a: shape of the first factor.
        b: shape of the second factor.
        layer: path of the layer, for messages.
    """
    return num_leading_axes(a, b, (f"{layer}: a", "b"))


def view_over(kernel: Shape, a: Shape, b: Shape, layer: str) -> KernelView:
    """Return how a kernel is read by factors of these shapes.

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
    roles = []
    if kernel[:depth] == a[:depth]:
        rows, columns, lengths = a[depth:-1], b[depth + 1 :], kernel[depth:]
        roles = _first_axes(lengths, rows, columns) or _equal_axes(lengths, rows, columns)
    if len(roles) != 1:
        raise ValueError(
            f"{layer}: factors {a} and {b} lie over the kernel {kernel} in {len(roles)} ways; "
            "expected one"
        )
    return KernelView(kernel[depth:], roles[0], kernel[:depth])


def _first_axes(lengths: Shape, rows: Shape, columns: Shape) -> list[AxisRoles]:
    """The least number of first axes that have as many rows as a, if there is one."""
    axes, sizes = tuple(range(len(lengths))), (math.prod(rows), math.prod(columns))
    for count in range(1, len(lengths)):
        if (math.prod(lengths[:count]), math.prod(lengths[count:])) == sizes:
            return [AxisRoles((), axes[:count], axes[count:])]
    return []


def _equal_axes(lengths: Shape, rows: Shape, columns: Shape) -> list[AxisRoles]:
    """All choices of axes, in order, that have just the lengths of a's and b's."""
    axes, choices = tuple(range(len(lengths))), []
    for inputs in itertools.combinations(axes, len(rows)):
        outputs = tuple(i for i in axes if i not in inputs)
        ordered = tuple(lengths[i] for i in (*inputs, *outputs))
        if ordered == (*rows, *columns):
            choices.append(AxisRoles((), inputs, outputs))
    return choices
