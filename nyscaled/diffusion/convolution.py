"""A convolution whose gradient is a convolution with a kernel in the usual order of axes.

In a loop, XLA computes a convolution with the transposed kernel of JAX's own rule on a CPU at a
fortieth of the speed of any other. `jax.custom_vjp` would have no forward mode.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.core
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Pads = tuple[tuple[int, int], ...]
Strides = tuple[int, ...]
Precision = jax.lax.PrecisionLike

PIXELS = 2
"""Most pixels per channel for which a CPU multiplies gradients by kernels as they are."""
ORDER = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Channels last in images; rows, columns, channels in and channels out in kernels."""


@runtime_checkable
class Unknown(Protocol):
    """What stands for the argument in which a gradient is computed."""

    @property
    def aval(self) -> jax.core.ShapedArray:
        """Its shape and dtype."""
        ...


_conv = jax.extend.core.Primitive("convolution")


def convolve(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    precision: Precision = None,
    **options: object,
) -> Array:
    """Return a convolution, as `jax.lax.conv_general_dilated` does, for `nnx.Conv`.

    Args:
        x: images, (batch, height, width, channels).
        kernel: (height, width, channels in, channels out).
        strides: distance of the kernel's positions along both axes.
        padding: zeros before and after the rows, and the columns.
        precision: precision of the products.
        **options: further options of `nnx.Conv`, which have their defaults in this package.

    Examples:
        >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
        >>> convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))[0, 1, :, 0]
        Array([12., 18., 18., 12.], dtype=float32)
    """
    mesh = jax.typeof(x).sharding.mesh
    run = _conv.bind if mesh.empty or mesh.are_all_axes_auto else _lax
    pads = tuple((int(before), int(after)) for before, after in padding)
    if precision is None:  # the program is written when the context may be another
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    out = run(x, kernel, strides=tuple(strides), pads=pads, precision=precision)
    assert isinstance(out, Array)
    return out


def _lax(
    x: Array,
    kernel: Array,
    strides: Strides,
    pads: Pads,
    precision: Precision,
    dilation: Strides = (1, 1),
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        lhs_dilation=dilation,
        dimension_numbers=ORDER,
        precision=precision,
    )


def _outline(
    x: jax.core.ShapedArray,
    kernel: jax.core.ShapedArray,
    strides: Strides,
    pads: Pads,
    precision: Precision,
) -> jax.core.ShapedArray:
    run = functools.partial(_lax, strides=strides, pads=pads, precision=precision)
    out = jax.eval_shape(run, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, kernel)))
    return jax.core.ShapedArray(out.shape, out.dtype)


def _to_x(
    gradient: Array,
    x: Unknown,
    kernel: Array,
    strides: Strides,
    pads: Pads,
    precision: Precision,
) -> Array:
    sizes = zip(x.aval.shape[1:3], gradient.shape[1:3], kernel.shape[:2], strict=True)
    around: list[tuple[int, int]] = []
    for (size, out, window), stride, (before, _) in zip(sizes, strides, pads, strict=True):
        first = window - 1 - before
        around.append((first, size + window - 2 - stride * (out - 1) - first))
    run = functools.partial(_turned, strides=strides, pads=tuple(around), precision=precision)
    batch, height, width, channels = gradient.shape
    if set(strides) != {1} or batch * height * width > PIXELS * channels:
        return run(gradient, kernel)
    spread = functools.partial(_spread, pads=tuple(around), precision=precision)
    return jax.lax.platform_dependent(gradient, kernel, cpu=spread, default=run)


def _turned(
    gradient: Array, kernel: Array, strides: Strides, pads: Pads, precision: Precision
) -> Array:
    # Without the barrier, XLA would make this the transposed convolution again.
    turned = jax.lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    if set(strides) == {1}:
        return convolve(gradient, turned, strides, pads, precision=precision)
    return _lax(gradient, turned, (1, 1), pads, precision, strides)


def _spread(gradient: Array, kernel: Array, pads: Pads, precision: Precision) -> Array:
    """Multiply by all of the kernel at once, and add up what reaches each pixel.

    A kernel that is larger than the image is not copied so, as it is when it is turned.
    """
    rows, columns, width, channels = kernel.shape
    # As matrices: of other shapes, XLA would turn the kernel.
    flat = gradient.reshape(-1, channels), kernel.reshape(-1, channels)
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    products = jax.lax.dot_general(
        *flat, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=wide
    )
    products = products.reshape(*gradient.shape[:3], rows, columns, width)
    (above, below), (left, right) = pads
    zero = jnp.zeros((), products.dtype)
    parts: list[Array] = []
    for y, x in itertools.product(range(rows), range(columns)):
        back = rows - 1 - y, columns - 1 - x
        shifts = (above - back[0], below - y, 0), (left - back[1], right - x, 0)
        parts.append(jax.lax.pad(products[:, :, :, y, x], zero, ((0, 0, 0), *shifts, (0, 0, 0))))
    return functools.reduce(jnp.add, parts).astype(gradient.dtype)


def _to_kernel(
    gradient: Array,
    x: Array,
    kernel: Unknown,
    strides: Strides,
    pads: Pads,
    precision: Precision,
) -> Array:
    def of_kernel(kernel: Array) -> Array:
        return _lax(x, kernel, strides, pads, precision)

    outline = jax.ShapeDtypeStruct(kernel.aval.shape, kernel.aval.dtype)
    return jax.linear_transpose(of_kernel, outline)(gradient)[0]


def _batched(
    args: tuple[Array, Array],
    axes: tuple[int | None, int | None],
    strides: Strides,
    pads: Pads,
    precision: Precision,
) -> tuple[Array, int]:
    x, kernel = args
    options = {"strides": strides, "pads": pads, "precision": precision}
    if axes[1] is not None:
        return jax.vmap(functools.partial(_lax, **options), axes)(x, kernel), 0
    assert axes[0] is not None
    x = jnp.moveaxis(x, axes[0], 0)
    joined = x.reshape(-1, *x.shape[2:])
    out = _conv.bind(joined, kernel, **options)
    assert isinstance(out, Array)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


_conv.def_impl(_lax)
_conv.def_abstract_eval(_outline)
mlir.register_lowering(_conv, mlir.lower_fun(_lax, multiple_results=False))
ad.defbilinear(_conv, _to_x, _to_kernel)
batching.primitive_batchers[_conv] = _batched
