"""The two products of an adapter, for every kind of layer, as einsum equations."""

from __future__ import annotations

import functools
import string
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
        x = x.astype(a.dtype)
        return jnp.einsum(self.equations.down, x, a, precision=self.precision)

    def up(self, hidden: Array, b: Array) -> Array:
        """Return hidden·b for a factor (batch…, r, out)."""
        b = b.reshape((*self.batch, b.shape[-2], *self.outputs))
        first = self.equations.up.split(",")[0]
        letters = string.ascii_uppercase[: hidden.ndim - len(first.replace("...", ""))]
        equation = self.equations.up.replace("...", letters)
        return product_of_factor(hidden, b, equation, self.precision, self.out_sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product_of_factor(
    hidden: Array, b: Array, equation: str, precision: Precision, out_sharding: OutSharding
) -> Array:
    """Return hidden·b by an einsum equation; the gradient in b transposes hidden.

    JAX's own rule transposes the gradient of the output, which has out / r times as many entries:
    a fourth of a step's time on a CPU. There is no `jax.jvp` of it; second derivatives work in both
    modes.

    Args:
        hidden: x·a.
        b: a factor with the axes of the kernel's output.
        equation: of the product.
        precision: as in `jax.lax`.
        out_sharding: sharding of the output, or None.
    """
    return jnp.einsum(equation, hidden, b, precision=precision, out_sharding=out_sharding)


def _product_forward(
    hidden: Array, b: Array, equation: str, precision: Precision, out_sharding: OutSharding
) -> tuple[Array, tuple[Array, Array]]:
    # Not the function itself: a second derivative may be in forward mode.
    out = jnp.einsum(equation, hidden, b, precision=precision, out_sharding=out_sharding)
    return out, (hidden, b)


def _product_backward(
    equation: str,
    precision: Precision,
    out_sharding: OutSharding,
    kept: tuple[Array, Array],
    gradient: Array,
) -> tuple[Array, Array]:
    hidden, b = kept
    factors, out = equation.split("->")
    first, second = factors.split(",")
    to_hidden = jax.linear_transpose(
        lambda hidden: jnp.einsum(
            equation, hidden, b, precision=precision, out_sharding=out_sharding
        ),
        hidden,
    )
    sharding = jax.typeof(b).sharding
    return to_hidden(gradient)[0], jnp.einsum(
        f"{first},{out}->{second}",
        hidden,
        gradient,
        precision=precision,
        out_sharding=sharding if sharding.mesh.are_all_axes_explicit else None,
    )


product_of_factor.defvjp(_product_forward, _product_backward)
