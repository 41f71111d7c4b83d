"""The two products that every factorization of the room is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, Key

from nyscaled.lowrank.host import HostMatrix
from nyscaled.lowrank.host_arrays import HOST_DTYPES, all_finite
from nyscaled.lowrank.host_operator import Sample, require_agreement
from nyscaled.lowrank.stream import RowBlocks
from nyscaled.matrices import transpose_times
from nyscaled.numerics import at_least_float32, full_precision
from nyscaled.operators import Operator
from nyscaled.typing import LinearMap

Product = Callable[[Inexact[Array, "n k"]], Inexact[Array, "m k"]]
"""x ↦ A x, for thin x."""

_DISAGREEMENT = 0.05
"""Largest difference of ⟨y, A x⟩ and ⟨Aᴴ y, x⟩, in parts of what random x and y make of both."""


class Products(NamedTuple):
    """x ↦ A x and y ↦ Aᴴ y of a matrix A (m, n), for thin x and y."""

    times: Product
    adjoint_times: Product

    @property
    def adjoint(self) -> Products:
        """The products of Aᴴ."""
        return Products(self.adjoint_times, self.times)


def working_dtype(a: LinearMap | HostMatrix) -> np.dtype:
    """Return the dtype of thin factors and sums: at least float32."""
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(a.dtype, jnp.float32))


def entry_rounding(a: LinearMap | HostMatrix) -> float:
    """Return the relative rounding error of entries in half precision, 0 of others.

    Args:
        a: a matrix, or a stream of one.
    """
    stored = a.stored if isinstance(a, RowBlocks) else a.dtype
    return float(jnp.finfo(stored).eps) / 2 if stored.itemsize == 2 else 0.0


def products_of(a: LinearMap | HostMatrix) -> Products:
    """Return the products with A; those of a host matrix are made outside of compiled code."""
    if isinstance(a, HostMatrix):
        return Products(
            lambda x: jnp.asarray(a.times(np.asarray(x))),
            lambda y: jnp.asarray(a.adjoint_times(np.asarray(y))),
        )
    dtype = working_dtype(a)
    wide = a.astype(dtype) if isinstance(a, jax.Array) else a

    def times(x: Inexact[Array, "n k"]) -> Inexact[Array, "m k"]:
        return at_least_float32(wide @ x)  # the products of an operator may be in half precision

    def transposed(y: Inexact[Array, "m k"]) -> Inexact[Array, "n k"]:
        return at_least_float32(transpose_times(wide, y))

    if jnp.issubdtype(dtype, jnp.complexfloating):
        # Without a conjugated copy of A.
        return Products(times, lambda y: transposed(y.conj()).conj())
    return Products(times, transposed)


def compiled(a: LinearMap) -> Products:
    """Return the products as programs of their own, which matrices of one shape share."""
    return Products(functools.partial(_times, a), functools.partial(_adjoint_times, a))


@jax.jit
@full_precision
def _times(a: LinearMap, x: Inexact[Array, "n k"]) -> Inexact[Array, "m k"]:
    return products_of(a).times(x)


@jax.jit
@full_precision
def _adjoint_times(a: LinearMap, y: Inexact[Array, "m k"]) -> Inexact[Array, "n k"]:
    return products_of(a).adjoint_times(y)


def require_adjoint(name: str, a: Operator) -> None:
    """Raise ValueError if the products of an operator differ by more than half precision explains.

    Each multiplies two random columns x or y. So ⟨y, A x⟩ is about ‖A x‖/√max(m, n), and relative
    errors of the products change it by as much. Errors of 2 % pass; other signs, factors and
    conjugates are seen. Operators in half precision, those over the devices of several processes,
    and products that are not finite are not compared.

    Args:
        name: what the error calls the operator.
        a: the operator, with known arrays.
    """
    here = all(x.is_fully_addressable for x in jax.tree.leaves(a) if isinstance(x, jax.Array))
    if a.dtype not in HOST_DTYPES or not here:
        return
    samples: list[Sample] = []
    for product, rows in zip(compiled(a), a.shape[::-1], strict=True):
        columns = random_block(jax.random.key(rows), rows, 2, a.dtype)
        image = product(columns)
        if not image.is_fully_addressable or not all_finite(np.asarray(image)):
            return
        samples.append(Sample.of(np.asarray(columns), np.asarray(image)))
    require_agreement(name, samples[0], samples[1], _DISAGREEMENT / max(a.shape) ** 0.5)


@functools.partial(jax.jit, static_argnames=("rows", "columns", "dtype"), inline=True)
def random_block(
    key: Key[Array, ""], rows: int, columns: int, dtype: DTypeLike
) -> Inexact[Array, "rows columns"]:
    """Return Gaussian columns with a standard deviation of 1/√rows, up to a factor of √2.

    So products with it are about as large as A. The deviation is a power of two, `random_scale`.

    Args:
        key: PRNG key.
        rows: the length of columns.
        columns: how many columns.
        dtype: a float or complex dtype; complex entries have independent parts.
    """
    return random_scale(rows) * jax.random.normal(key, (rows, columns), dtype)


def random_scale(rows: int) -> float:
    """Return the standard deviation of the entries of `random_block`."""
    # A Python number: one of NumPy would make float32 arrays double where x64 is on.
    return 2.0 ** -math.ceil(math.log2(rows) / 2)
