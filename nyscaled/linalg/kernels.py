"""Kernels: functions of two points, and matrices of their values that are never formed.

A kernel is any function of JAX from two points (d,) to a number k(x, y) that is symmetric and
positive semidefinite. Blocks of its values are made by `jax.vmap`. The kernels of this file depend
on coordinates through one sum only, and make their blocks about five times as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from nyscaled._pytree import as_partial, field, pytree_dataclass
from nyscaled.matrices import as_dense, require_floating
from nyscaled.numerics import full_precision, root
from nyscaled.typing import Scalar

__all__ = ["KernelMatrix", "StationaryKernel", "evaluate", "gaussian", "laplace", "matern"]

_DIFFERENCES = 16  # coordinates up to which differences cost about what products do
_ENTRIES = 1 << 23  # of a block of rows in a product

Kernel = Any
"""A symmetric positive semidefinite function of JAX from two points (d,) to a number."""


@pytree_dataclass
class StationaryKernel:
    """k(x, y) = profile(Σᵢ part((xᵢ − yᵢ)/ℓᵢ)); `gaussian`, `matern` and `laplace` make them.

    Args:
        length_scale: ℓ, a number, or one per coordinate (d,).
        profile: a function of the sum.
        part: what is summed over coordinates, "squares" or "sizes".
    """

    length_scale: ArrayLike
    profile: Callable[[Array], Array] = field(static=True)
    part: str = field(static=True, default="squares")

    def __call__(self, x: Float[Array, " d"], y: Float[Array, " d"]) -> Scalar:
        """Return k(x, y)."""
        return self.profile(jnp.sum(self._part((x - y) / self._lengths(x))))

    @full_precision
    def block(self, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
        """Return the matrix k(xᵢ, yⱼ).

        Up to 16 coordinates are subtracted one by one. Of more, squares of distances are taken from
        products of points that are centered, and have an absolute rounding error of about eps times
        the largest square of a centered point.

        Args:
            x: points (m, d).
            y: points (n, d).
        """
        x, y = x / self._lengths(x), y / self._lengths(x)
        if self.part == "squares" and x.shape[1] > _DIFFERENCES:
            center = jnp.mean(x if len(x) > len(y) else y, axis=0)
            x, y = x - center, y - center
            total = jnp.sum(x * x, 1)[:, None] + jnp.sum(y * y, 1) - 2 * (x @ y.T)
            return self.profile(jnp.maximum(total, 0))
        columns, rows = x.T, y.T  # each coordinate of all points lies together
        total = jnp.zeros((len(x), len(y)), x.dtype)
        if x.shape[1] > _DIFFERENCES:

            def add(i: Int[Array, ""], total: Float[Array, "m n"]) -> Float[Array, "m n"]:
                return total + self._part(columns[i][:, None] - rows[i])

            return self.profile(lax.fori_loop(0, x.shape[1], add, total))
        for column, row in zip(columns, rows, strict=True):
            total = total + self._part(column[:, None] - row)
        return self.profile(total)

    def _lengths(self, x: Float[Array, "*n d"]) -> ArrayLike:
        """ℓ of points; ValueError on other shapes, which would broadcast against coordinates."""
        shape = jnp.shape(self.length_scale)
        if shape not in ((), x.shape[-1:]):
            raise ValueError(
                f"length_scale has shape {shape} for points of {x.shape[-1]} coordinates; expected "
                f"a number or {x.shape[-1:]}"
            )
        return self.length_scale

    def _part(self, difference: Array) -> Array:
        return difference * difference if self.part == "squares" else jnp.abs(difference)


def _gaussian(squares: Array) -> Array:
    return jnp.exp(-squares / 2)


def _matern_half(squares: Array) -> Array:
    return jnp.exp(-root(squares))


def _matern_three_halves(squares: Array) -> Array:
    distance = root(3 * squares)
    return (1 + distance) * jnp.exp(-distance)


def _matern_five_halves(squares: Array) -> Array:
    distance = root(5 * squares)
    return (1 + distance + distance * distance / 3) * jnp.exp(-distance)


def _decay(sizes: Array) -> Array:
    return jnp.exp(-sizes)


_MATERN = {0.5: _matern_half, 1.5: _matern_three_halves, 2.5: _matern_five_halves}


def _positive(length_scale: ArrayLike) -> ArrayLike:
    """ℓ; ValueError if its value is known and is not positive."""
    if not isinstance(length_scale, jax.core.Tracer):
        lengths = np.asarray(length_scale)
        real = jnp.issubdtype(lengths.dtype, jnp.number) and not np.iscomplexobj(lengths)
        if not (real and np.all((lengths > 0) & (lengths < np.inf))):
            raise ValueError(
                f"length_scale is {length_scale!r:.80}; expected positive numbers (one, or one per "
                "coordinate)"
            )
    return length_scale


def gaussian(length_scale: ArrayLike = 1.0) -> StationaryKernel:
    """Return the Gaussian kernel exp(−‖x − y‖²/(2ℓ²)).

    Args:
        length_scale: ℓ > 0, or one per coordinate (d,); it may be traced.

    Examples:
        >>> kernel = gaussian(2.0)
        >>> f"{float(kernel(jnp.zeros(1), jnp.full(1, 2.0))):.4f}"
        '0.6065'
    """
    return StationaryKernel(_positive(length_scale), _gaussian)


def matern(length_scale: ArrayLike = 1.0, smoothness: float = 1.5) -> StationaryKernel:
    """Return the Matérn kernel, whose samples have more derivatives the larger the smoothness.

    Args:
        length_scale: ℓ > 0, or one per coordinate (d,); it may be traced.
        smoothness: ν, one of 0.5 (exp(−‖x − y‖/ℓ)), 1.5 and 2.5.

    Examples:
        >>> kernel = matern(2.0, smoothness=0.5)
        >>> f"{float(kernel(jnp.zeros(1), jnp.full(1, 2.0))):.4f}"
        '0.3679'
    """
    if smoothness not in _MATERN:
        raise ValueError(f"smoothness is {smoothness!r}; expected 0.5, 1.5 or 2.5")
    return StationaryKernel(_positive(length_scale), _MATERN[smoothness])


def laplace(length_scale: ArrayLike = 1.0) -> StationaryKernel:
    """Return the Laplace kernel exp(−Σᵢ|xᵢ − yᵢ|/ℓ).

    Args:
        length_scale: ℓ > 0, or one per coordinate (d,); it may be traced.

    Examples:
        >>> kernel = laplace(2.0)
        >>> f"{float(kernel(jnp.zeros(2), jnp.ones(2))):.4f}"
        '0.3679'
    """
    return StationaryKernel(_positive(length_scale), _decay, "sizes")


@jax.jit
def evaluate(kernel: Kernel, x: Float[Array, "m d"], y: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """Return the matrix k(xᵢ, yⱼ) of a kernel.

    Args:
        kernel: a pytree, such as a kernel of this file or `jax.tree_util.Partial(fn)`.
        x: points (m, d).
        y: points (n, d).

    Examples:
        >>> evaluate(gaussian(), jnp.zeros((2, 1)), jnp.zeros((1, 1)))
        Array([[1.],
               [1.]], dtype=float32)
    """
    if isinstance(kernel, StationaryKernel):
        return kernel.block(x, y)
    row = jax.vmap(kernel, in_axes=(None, 0))
    return jax.vmap(row, in_axes=(0, None))(x, y)


def _as_kernel(kernel: Kernel) -> Kernel:
    if not callable(kernel):
        raise ValueError(
            f"kernel is a {type(kernel).__name__}; expected a function of two points (d,)"
        )
    return as_partial(kernel) if jax.tree_util.all_leaves([kernel]) else kernel


@pytree_dataclass
class KernelMatrix:
    """The positive semidefinite matrix k(xᵢ, xⱼ) of a kernel, known by its entries.

    It is a matrix for all that takes products: `A @ x` makes blocks of rows one after another, so
    that n × n entries are never in memory. `nys.nystrom` reads (rank + 1)·n of its entries.

    Args:
        kernel: a function of JAX from two points (d,) to a number, symmetric and positive
            semidefinite. For arrays inside it pass `jax.tree_util.Partial(fn, array)`, or one of
            `nys.linalg.kernels`: they are then arguments of compiled functions.
        points: the points xᵢ (n, d), float32 or float64.

    Raises:
        ValueError: if the points are not a matrix of these dtypes, or the kernel does not return a
            number of the same dtype.

    Examples:
        >>> a = KernelMatrix(gaussian(1.0), jnp.array([[0.0], [1.0], [3.0]]))
        >>> a.shape
        (3, 3)
        >>> bool(jnp.allclose(a @ jnp.eye(3), a.columns(jnp.arange(3))))
        True
    """

    kernel: Kernel = field(converter=_as_kernel)
    points: Float[Array, "n d"] = field(converter=functools.partial(as_dense, "points"))

    def __post_init__(self) -> None:
        require_floating("points", self.points)
        point = jax.ShapeDtypeStruct(self.points.shape[1:], self.points.dtype)
        try:
            value = jax.eval_shape(self.kernel, point, point)
        except Exception as error:  # what somebody else's function raises
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(
                f"the kernel of two points fails ({type(error).__name__}: {reason}); expected a "
                "function of JAX from two points (d,) to a number"
            ) from error
        if not isinstance(value, jax.ShapeDtypeStruct) or value.shape != ():
            raise ValueError(f"the kernel of two points is {value}; expected a number")
        if value.dtype != self.points.dtype:
            raise ValueError(
                f"the kernel of two points is {value.dtype}; expected {self.points.dtype}, the "
                "dtype of the points"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (n, n)."""
        return len(self.points), len(self.points)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the points."""
        return self.points.dtype

    @property
    def T(self) -> KernelMatrix:
        """The matrix itself."""
        return self

    def columns(self, indices: Int[Array, " k"]) -> Float[Array, "n k"]:
        """Return the columns A[:, indices]."""
        return evaluate(self.kernel, self.points, self.points[indices])

    def diagonal(self) -> Float[Array, " n"]:
        """Return k(xᵢ, xᵢ)."""
        return jax.vmap(self.kernel)(self.points, self.points)

    def __matmul__(self, other: Float[Array, "*n"]) -> Float[Array, "*n"]:
        if jnp.ndim(other) not in (1, 2) or len(other) != len(self.points):
            expected = f"({len(self.points)},) or ({len(self.points)}, k)"
            raise ValueError(f"x has shape {jnp.shape(other)}; expected {expected}")
        return _product(self, other)


@jax.jit
@full_precision
def _product(a: KernelMatrix, other: Float[Array, "*n"]) -> Float[Array, "*n"]:
    n = a.shape[0]
    rows = max(1, min(n, _ENTRIES // n))

    def write(i: Int[Array, ""], result: Float[Array, "*n"]) -> Float[Array, "*n"]:
        start = jnp.minimum(i * rows, n - rows)  # the last block is moved up to fit
        block = evaluate(a.kernel, lax.dynamic_slice_in_dim(a.points, start, rows), a.points)
        return lax.dynamic_update_slice_in_dim(result, block @ other, start, axis=0)

    dtype = jnp.result_type(a.dtype, other.dtype)
    return lax.fori_loop(0, -(-n // rows), write, jnp.zeros(other.shape, dtype))
