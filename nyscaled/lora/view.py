"""How the kernel of a Flax layer is read as matrices W_0 (in, out).

Axes that the layer contracts with its input are `inputs`, axes that only its output has are
`outputs`, axes that both have (experts, say) are `batch`. Axes in front of those that the layer
itself declares are a stack made by `nnx.vmap` and consumed by `nnx.scan`.
"""

from __future__ import annotations

import dataclasses
import math
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from nyscaled.transforms.leaf_names import Shape

LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
# An embedding is a product with rows of the identity.
ADAPTABLE = (*LINEAR, nnx.Embed)

Layer = nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Embed
"""A layer that can carry adapters."""

MeshNames = tuple[Any, ...]
"""For each axis of an array the axis of the mesh, or axes, that it is split over; or None."""


class AxisRoles(NamedTuple):
    """The axes of an unstacked kernel by what the layer does with them."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KernelView:
    """How a kernel is read as matrices.

    Attributes:
        shape: shape of the kernel of one layer, without the stack.
        roles: what the layer does with the axes of `shape`.
        stack: lengths of the axes of the stack, which are in front of these.
    """

    shape: Shape
    roles: AxisRoles
    stack: Shape = ()

    @property
    def batch(self) -> Shape:
        """Lengths of the batch axes."""
        return tuple(self.shape[i] for i in self.roles.batch)

    @property
    def inputs(self) -> Shape:
        """Lengths of the axes that are contracted."""
        return tuple(self.shape[i] for i in self.roles.inputs)

    @property
    def outputs(self) -> Shape:
        """Lengths of the axes of the output."""
        return tuple(self.shape[i] for i in self.roles.outputs)

    @property
    def sides(self) -> tuple[int, int]:
        """(in, out) of each matrix."""
        return math.prod(self.inputs), math.prod(self.outputs)

    @property
    def unstacked(self) -> KernelView:
        """The view of one layer of the stack."""
        return dataclasses.replace(self, stack=())

    def _order(self) -> list[int]:
        depth = len(self.stack)
        return [*range(depth), *(depth + i for axes in self.roles for i in axes)]

    def to_matrices(self, kernel: Array) -> Array:
        """Return the kernel as (stack…, batch…, in, out)."""
        moved = jnp.transpose(kernel, self._order())
        leading = len(self.stack) + len(self.batch)
        return moved.reshape((*moved.shape[:leading], self.sides[0], -1))

    def from_matrices(self, matrices: Array) -> Array:
        """Return the kernel of matrices (stack…, batch…, in, out)."""
        order, shape = self._order(), (*self.stack, *self.shape)
        moved = matrices.reshape([shape[i] for i in order])
        return jnp.transpose(moved, [order.index(i) for i in range(len(shape))])

    def factor_names(self, kernel: Any) -> tuple[MeshNames, MeshNames] | None:
        """Return the names of the mesh's axes for factors that go with a kernel.

        A flattened side has the name of its first axis; the rank is not sharded. None if the
        kernel has no mesh.
        """
        sharding = sharding_of(kernel)
        if sharding is None:
            return None
        depth, ndim = len(self.stack), len(self.stack) + len(self.shape)
        names = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
        leading = (*names[:depth], *(names[depth + i] for i in self.roles.batch))
        rows, columns = (
            next((names[depth + i] for i in axes), None)
            for axes in (self.roles.inputs, self.roles.outputs)
        )
        return (*leading, rows, None), (*leading, None, columns)


def view_of(layer: Layer) -> KernelView:
    """Return how the kernel of a layer is read.

    Raises:
        ValueError: if the kernel has not the shape that the layer declares (a stack on another
            axis), and as `roles_of`.
    """
    declared, shape = declared_shape(layer), tuple(kernel_of(layer).shape)
    depth = len(shape) - len(declared)
    if depth < 0 or shape[depth:] != declared:
        raise ValueError(
            f"the kernel has shape {shape}, the layer declares {declared}; expected the declared "
            "shape, with the axes of a stack (nnx.vmap, nnx.scan) in front"
        )
    return KernelView(declared, roles_of(layer), shape[:depth])


def unstacked_view(layer: Layer) -> KernelView:
    """Return how the kernel of one layer is read, if `layer` is that or a stack of such."""
    return KernelView(declared_shape(layer), roles_of(layer))


def kernel_of(layer: Layer) -> Any:
    """Return the variable that holds W_0, or what qwix has in its place when it is quantized."""
    return layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel


def declared_shape(layer: Layer) -> Shape:
    """Return the kernel's shape as the layer declares it, without a stack."""
    if isinstance(layer, nnx.Embed):
        return (layer.num_embeddings, layer.features)
    if isinstance(layer, nnx.Einsum):
        return tuple(layer.kernel_shape)
    if isinstance(layer, nnx.LinearGeneral):
        return (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    return (layer.in_features, layer.out_features)


def roles_of(layer: Layer) -> AxisRoles:
    """Return the roles of the axes of a layer's kernel.

    Raises:
        ValueError: on an Einsum whose equation is unknown or sums a kernel axis by itself.
    """
    if isinstance(layer, nnx.Einsum):
        lhs, kernel, out = _operands(layer)
        if "..." in kernel or len(set(kernel)) != len(kernel) or not set(kernel) <= set(lhs + out):
            raise ValueError(
                f"the layer is nnx.Einsum({layer.einsum_str!r}); expected kernel axes that are "
                "distinct letters, each in the input or the output"
            )
        places = [(c in lhs, c in out) for c in kernel]
        roles = ((True, True), (True, False), (False, True))
        return AxisRoles(*(tuple(i for i, p in enumerate(places) if p == r) for r in roles))
    if isinstance(layer, nnx.LinearGeneral):
        counts = len(layer.batch_axis), len(layer.in_features), len(layer.out_features)
        first, second = counts[0], counts[0] + counts[1]
        axes = tuple(range(sum(counts)))
        return AxisRoles(axes[:first], axes[first:second], axes[second:])
    return AxisRoles((), (0,), (1,))


def _operands(layer: nnx.Einsum) -> tuple[str, str, str]:
    equation = layer.einsum_str
    if not equation:  # None, which flax allows and does not declare
        raise ValueError(
            "the layer is an nnx.Einsum without einsum_str, whose axes are known only when it is "
            "called; expected the equation given to its constructor"
        )
    left, out = equation.replace(" ", "").split("->")
    lhs, kernel = left.split(",")
    return lhs, kernel, out


class Equations(NamedTuple):
    """The adapter x, a → h and h, b → y of a layer x, W → y, as einsum equations.

    The x of an embedding are tokens and h are rows of a: `down` is empty.
    """

    down: str
    up: str


def equations(layer: Layer, ndim: int) -> Equations:
    """Return the two contractions of a layer's adapter.

    Args:
        layer: the layer.
        ndim: number of axes of the layer's input.
    """
    if isinstance(layer, nnx.Embed):
        return Equations("", "...r,ro->...o")
    if isinstance(layer, nnx.Einsum):
        lhs, kernel, out = _operands(layer)
    elif isinstance(layer, nnx.LinearGeneral):
        letters = iter(string.ascii_letters.replace("r", ""))
        lhs = "".join(next(letters) for _ in range(ndim))
        contracted = [lhs[i] for i in sorted(axis % ndim for axis in layer.axis)]
        batch = [lhs[i] for i in sorted(int(axis) % ndim for axis in layer.batch_axis)]
        outputs = [next(letters) for _ in layer.out_features]
        free = [c for c in lhs if c not in (*contracted, *batch)]
        kernel = "".join((*batch, *contracted, *outputs))
        out = "".join((*batch, *free, *outputs))
    else:
        lhs, kernel, out = "...i", "io", "...o"
    rank = next(c for c in "r" + string.ascii_letters if c not in lhs + kernel + out)
    batch, inputs, outputs = ("".join(kernel[i] for i in axes) for axes in roles_of(layer))
    hidden = "".join(c for c in lhs if c not in inputs) + rank
    return Equations(
        f"{lhs},{batch}{inputs}{rank}->{hidden}", f"{hidden},{batch}{rank}{outputs}->{out}"
    )


def is_quantized(kernel: Any) -> bool:
    """Return whether qwix quantized a kernel."""
    return hasattr(getattr(kernel, "array", None), "qvalue")


def values_of(kernel: Any, path: str) -> Array:
    """Return the values of a kernel: a variable or an array, dequantized if qwix quantized it.

    Args:
        kernel: what the layer or tree holds.
        path: path of the layer, for messages.

    Raises:
        ValueError: on a kernel of another type, of integers, or without values.
    """
    if is_quantized(kernel):
        import qwix

        return qwix.dequantize(nnx.as_pure(kernel.array))
    value = _content(kernel)
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            f"the kernel of {path} has a shape and no values; expected values (a model of shapes "
            "gets its adapters in the function that nnx.eval_shape calls)"
        )
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        dtype = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"the kernel of {path} is {dtype}; expected a floating array or one quantized by qwix: "
            "a start needs the kernel's values, dequantize it first"
        )
    return value


def sharding_of(kernel: Any) -> NamedSharding | None:
    """Return the sharding of a kernel's values if it has axes of a mesh."""
    sharding = getattr(_content(kernel), "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _content(kernel: object) -> Any:
    """What a variable holds, which may be only a shape."""
    return kernel.get_value() if isinstance(kernel, nnx.Variable) else kernel
