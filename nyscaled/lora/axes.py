"""How the kernel of a Flax layer is read as matrices W_0 (in, out).

Axes that the layer contracts with its input are `inputs`, axes that only its output has are
`outputs`, axes that both have (experts, say) are `batch`. Axes in front of those that the layer
itself declares are a stack made by `nnx.vmap` and consumed by `nnx.scan`.
"""

from __future__ import annotations

import math
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
# An embedding is a product with rows of the identity.
KINDS = (*LINEAR, nnx.Embed)


class Split(NamedTuple):
    """Axes of an unstacked kernel."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Equations(NamedTuple):
    """The layer x, W → y, and its adapter x, a → h and h, b → y, as einsum equations.

    Of an embedding, whose x are tokens, h are rows of a: `down` is empty.
    """

    down: str
    up: str


def _operands(module: Any) -> tuple[str, str, str]:
    equation = module.einsum_str
    if equation is None:
        raise ValueError(
            "the layer is an nnx.Einsum without einsum_str, whose axes are known only when it is "
            "called; expected the equation given to its constructor"
        )
    left, out = equation.replace(" ", "").split("->")
    lhs, kernel = left.split(",")
    return lhs, kernel, out


def kernel_of(module: Any) -> Any:
    """The variable that holds W_0."""
    return module.embedding if isinstance(module, nnx.Embed) else module.kernel


def declared_shape(module: Any) -> tuple[int, ...]:
    """The kernel's shape as the layer declares it, without a stack."""
    if isinstance(module, nnx.Embed):
        return (module.num_embeddings, module.features)
    if isinstance(module, nnx.Einsum):
        return tuple(module.kernel_shape)
    if isinstance(module, nnx.LinearGeneral):
        return (*module.batch_axis.values(), *module.in_features, *module.out_features)
    return (module.in_features, module.out_features)


def split(module: Any) -> Split:
    """The roles of the kernel's axes.

    Raises:
        ValueError: on an Einsum whose equation is unknown or sums a kernel axis by itself.
    """
    if isinstance(module, nnx.Einsum):
        lhs, kernel, out = _operands(module)
        if "..." in kernel or len(set(kernel)) != len(kernel) or not set(kernel) <= set(lhs + out):
            raise ValueError(
                f"the layer is nnx.Einsum({module.einsum_str!r}); expected kernel axes that are "
                "distinct letters, each in the input or the output"
            )
        roles = [(c in lhs, c in out) for c in kernel]
        wanted = ((True, True), (True, False), (False, True))
        return Split(*(tuple(i for i, r in enumerate(roles) if r == w) for w in wanted))
    if isinstance(module, nnx.LinearGeneral):
        counts = len(module.batch_axis), len(module.in_features), len(module.out_features)
        first, second = counts[0], counts[0] + counts[1]
        axes = tuple(range(sum(counts)))
        return Split(axes[:first], axes[first:second], axes[second:])
    return Split((), (0,), (1,))


def equations(module: Any, ndim: int) -> Equations:
    """The adapter's two contractions for an input of `ndim` axes."""
    if isinstance(module, nnx.Embed):
        return Equations("", "...r,ro->...o")
    if isinstance(module, nnx.Einsum):
        lhs, kernel, out = _operands(module)
    elif isinstance(module, nnx.LinearGeneral):
        names = iter(string.ascii_letters.replace("r", ""))
        lhs = "".join(next(names) for _ in range(ndim))
        contracted = [lhs[i] for i in sorted(axis % ndim for axis in module.axis)]
        batch = [lhs[i] for i in sorted(int(axis) % ndim for axis in module.batch_axis)]
        outputs = [next(names) for _ in module.out_features]
        free = [c for c in lhs if c not in (*contracted, *batch)]
        kernel = "".join((*batch, *contracted, *outputs))
        out = "".join((*batch, *free, *outputs))
    else:
        lhs, kernel, out = "...i", "io", "...o"
    rank = next(c for c in "r" + string.ascii_letters if c not in lhs + kernel + out)
    parts = split(module)
    batch, inputs, outputs = ("".join(kernel[i] for i in axes) for axes in parts)
    hidden = "".join(c for c in lhs if c not in inputs) + rank
    return Equations(
        f"{lhs},{batch}{inputs}{rank}->{hidden}", f"{hidden},{batch}{rank}{outputs}->{out}"
    )


def stack_of(module: Any) -> tuple[int, ...]:
    """The lengths of the kernel's leading axes beyond those declared.

    Raises:
        ValueError: if the rest is not what the layer declares (a stack on another axis).
    """
    declared, shape = declared_shape(module), tuple(kernel_of(module).shape)
    depth = len(shape) - len(declared)
    if depth < 0 or shape[depth:] != declared:
        raise ValueError(
            f"the kernel has shape {shape}, the layer declares {declared}; expected the declared "
            "shape, with the axes of a stack (nnx.vmap, nnx.scan) in front"
        )
    return shape[:depth]


def _order(parts: Split, depth: int) -> list[int]:
    return [*range(depth), *(depth + i for axes in parts for i in axes)]


def to_matrices(kernel: jax.Array, parts: Split, depth: int) -> jax.Array:
    """The kernel as (stack…, batch…, in, out)."""
    moved = jnp.transpose(kernel, _order(parts, depth))
    leading = depth + len(parts.batch)
    rows = math.prod(moved.shape[leading : leading + len(parts.inputs)])
    return moved.reshape((*moved.shape[:leading], rows, -1))


def from_matrices(value: jax.Array, parts: Split, depth: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_matrices`, for a kernel of `shape`."""
    order = _order(parts, depth)
    moved = value.reshape([shape[i] for i in order])
    return jnp.transpose(moved, [order.index(i) for i in range(len(shape))])
