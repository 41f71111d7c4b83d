"""Matrices known only by their products, and the check that JAX can trace these."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nyscaled._pytree import as_partial, build, field, pytree_dataclass

COLUMNS = 2
"""Columns of the thin matrices with which products are traced."""


def as_shape(name: str, shape: Any) -> tuple[int, int]:
    """Return the shape of a matrix as two integers; ValueError unless both are at least 1."""
    try:
        m, n = map(operator.index, shape)
    except (TypeError, ValueError):  # of other counts too
        m = n = 0
    if min(m, n) < 1:
        raise ValueError(f"{name} has shape {shape!r}; expected a matrix, (m, n)")
    return m, n


def require_traced(
    name: str, fn: Callable[..., Any], args: Any, shape: tuple[int, ...], dtype: Any = None
) -> Any:
    """Return the dtype of fn(*args); ValueError unless JAX can trace it to an array of this shape.

    Args:
        name: what errors call the result.
        fn: a function of arrays and pytrees to an array.
        args: its arguments, where `jax.ShapeDtypeStruct` may stand for arrays.
        shape: of the result.
        dtype: of the result; None for any.
    """
    try:
        result = jax.eval_shape(fn, *args)
    except Exception as error:  # what somebody else's function raises
        reason = (str(error).splitlines() or [""])[0][:200]
        got = f"cannot be compiled by JAX ({type(error).__name__}: {reason})"
        raise ValueError(f"{name} {got}") from error
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} is a {type(result).__name__}; expected an array {shape}")
    expected = result.dtype if dtype is None else dtype
    if (result.shape, result.dtype) != (shape, expected):
        got = f"{result.shape} {result.dtype}"
        raise ValueError(f"{name} is {got}; expected {shape} {expected}")
    return result.dtype


def _call(fn: Any, x: Array) -> Any:
    return fn(x)


@pytree_dataclass
class Operator:
    """A matrix known only by its products: `matmat(x)` is A @ x, `rmatmat(y)` is Aᵀ @ y.

    Both take and return 2-d arrays, (n, k) → (m, k) and (m, k) → (n, k). For arrays inside them
    pass `jax.tree_util.Partial(fn, array)`: they are then arguments of the compiled loop and
    not constants in it.

    Args:
        matmat: a function of JAX, x ↦ A @ x.
        rmatmat: a function of JAX, y ↦ Aᵀ @ y.
        shape: (m, n).
        dtype: of the products with arrays of the same dtype. By default what the functions make of
            a float32 array: float64 if they hold float64 arrays.

    Raises:
        ValueError: if JAX cannot trace the functions, or their shapes and dtypes are others.

    Examples:
        >>> d = jnp.array([[1.0], [2.0]])
        >>> a = Operator(lambda x: d * x, lambda y: d * y, shape=(2, 2))
        >>> a @ jnp.ones((2, 1))
        Array([[1.],
               [2.]], dtype=float32)
    """

    matmat: Any
    rmatmat: Any
    shape: tuple[int, ...] = field(static=True)
    dtype: Any = field(static=True, default=None)

    def __post_init__(self) -> None:
        shape = as_shape("the operator", self.shape)
        products = {"matmat": shape, "rmatmat": shape[::-1]}
        for name in products:
            fn = getattr(self, name)
            if not callable(fn):
                raise ValueError(f"{name} is a {type(fn).__name__}; expected a function of JAX")
            object.__setattr__(self, name, as_partial(fn))

        def image(name: str, given: Any, expected: Any = None) -> Any:
            rows, columns = products[name]
            thin = jax.ShapeDtypeStruct((columns, COLUMNS), given)
            got = f"{name} of an array {thin.shape} {thin.dtype}"
            args = (getattr(self, name), thin)
            return require_traced(got, _call, args, (rows, COLUMNS), expected)

        dtype = self.dtype
        if dtype is None:
            dtype = jnp.promote_types(*(image(name, jnp.float32) for name in products))
        try:
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        except TypeError:
            raise ValueError(
                f"the operator's dtype is {dtype!r}; expected a dtype, such as jnp.float32"
            ) from None
        for name in products:
            image(name, dtype, dtype)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype)

    @property
    def T(self) -> Operator:
        """Return the transpose."""
        m, n = self.shape
        return build(
            Operator, matmat=self.rmatmat, rmatmat=self.matmat, shape=(n, m), dtype=self.dtype
        )

    def __matmul__(self, other: Array) -> Array:
        return self.matmat(other)
