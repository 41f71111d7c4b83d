"""The two products of an adapter, for every kind of layer, as einsum equations."""

from __future__ import annotations

import functools
import string
from typing import NamedTuple

import jax
import jax.core
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from nyscaled.lora.view import Equations
from nyscaled.transforms.leaf_names import Shape

Precision = jax.lax.PrecisionLike
OutSharding = NamedSharding | PartitionSpec | None


class Contraction(NamedTuple):
    """What an adapter must know of a call of its layer.

    Attributes:
        equations: the einsum equations of its two products.
        batch: lengths of the kernel's batch axes.
        inputs: lengths of the axes that are contracted.
        outputs: lengths of the axes of the output.
        dtype: dtype of the products; None for that of the factors.
        precision: precision of the products, as in `jax.lax`.
        out_sharding: sharding of the layer's output, or None.
    """

    equations: Equations
    batch: Shape
    inputs: Shape
    outputs: Shape
    dtype: DTypeLike | None
    precision: Precision
    out_sharding: OutSharding

    def down(self, x: Array, a: Array) -> Array:
        """Return x·a for a factor (batch…, in, r), in its dtype; rows of it, if x are tokens."""
        a = a.reshape((*self.batch, *self.inputs, a.shape[-1]))
        if not self.equations.down:
            return jnp.take(a, x, axis=0)
        if jnp.iscomplexobj(x):
            raise ValueError(f"the layer's input is {x.dtype}; expected a real one, as factors are")
        x = x.astype(a.dtype)
        return jnp.einsum(self.equations.down, x, a, precision=self.precision)

    def up(self, hidden: Array, b: Array) -> Array:
        """Return hidden·b for a factor (batch…, r, out)."""
        b = b.reshape((*self.batch, b.shape[-2], *self.outputs))
        first = self.equations.up.split(",")[0]
        spare = (c for c in string.ascii_letters if c not in self.equations.up)
        letters = "".join(next(spare) for _ in range(hidden.ndim - len(first.replace("...", ""))))
        equation = self.equations.up.replace("...", letters)
        first, others = equation.split(",")
        # A layer may sum over an axis that its kernel lacks, along which gradients are repeated.
        summed = not set(first) <= set(others)
        mesh = jax.typeof(hidden).sharding.mesh
        if not summed and self.out_sharding is None and (mesh.empty or mesh.are_all_axes_auto):
            out = _product.bind(hidden, b, equation=equation, precision=self.precision)
            assert isinstance(out, Array)
            return out
        return jnp.einsum(
            equation, hidden, b, precision=self.precision, out_sharding=self.out_sharding
        )


# hidden·b by an einsum equation, whose gradient in b transposes hidden. JAX's own rule transposes
# the gradient of the output, which has out / r times as many entries: a fourth of a step's time on
# a CPU. `jax.custom_vjp` would have no forward mode.
_product = jax.extend.core.Primitive("product_of_factors")


def _einsum(hidden: Array, b: Array, equation: str, precision: Precision) -> Array:
    return jnp.einsum(equation, hidden, b, precision=precision)


def _outline(
    hidden: jax.core.ShapedArray, b: jax.core.ShapedArray, equation: str, precision: Precision
) -> jax.core.ShapedArray:
    out = jax.eval_shape(
        functools.partial(_einsum, equation=equation, precision=precision),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (hidden, b)),
    )
    return jax.core.ShapedArray(out.shape, out.dtype)


def _to_hidden(
    gradient: Array, hidden: object, b: Array, equation: str, precision: Precision
) -> Array:
    factors, out = equation.split("->")
    first, second = factors.split(",")
    return _einsum(gradient, b, f"{out},{second}->{first}", precision)


def _to_b(gradient: Array, hidden: Array, b: object, equation: str, precision: Precision) -> Array:
    factors, out = equation.split("->")
    first, second = factors.split(",")
    return _einsum(hidden, gradient, f"{first},{out}->{second}", precision)


def _batched(
    args: tuple[Array, Array],
    axes: tuple[int | None, int | None],
    equation: str,
    precision: Precision,
) -> tuple[Array, int]:
    hidden, b = (x if i is None else jnp.moveaxis(x, i, 0) for x, i in zip(args, axes, strict=True))
    factors, out = equation.split("->")
    first, second = factors.split(",")
    new = next(c for c in string.ascii_letters if c not in equation)
    one, two = ("" if i is None else new for i in axes)
    equation = f"{one}{first},{two}{second}->{new}{out}"
    product = _product.bind(hidden, b, equation=equation, precision=precision)
    assert isinstance(product, Array)
    return product, 0


_product.def_impl(_einsum)
_product.def_abstract_eval(_outline)
mlir.register_lowering(_product, mlir.lower_fun(_einsum, multiple_results=False))
ad.defbilinear(_product, _to_hidden, _to_b)
batching.primitive_batchers[_product] = _batched
