"""Bases that get more columns, in arrays whose shapes change seldom: few programs are compiled."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Int, Key

from nyscaled.lowrank.orthogonal import extend
from nyscaled.lowrank.products import random_block

WIDTH = 16  # columns of a block: fewer make no product faster, more find a larger rank than needed
PROBES = 16  # columns that measure the error


class Growing(NamedTuple):
    """Arrays with room for more columns, which are zero until then."""

    left: Inexact[Array, "m capacity"]
    """An orthonormal basis."""
    core: Inexact[Array, "capacity capacity"]
    right: Inexact[Array, "n capacity"]


def with_room(space: Growing, count: int) -> Growing:
    """Return the arrays with room for this many columns; capacities double."""
    capacity = space.core.shape[0]
    if count <= capacity:
        return space
    more = max(count, 2 * capacity) - capacity
    columns, square = ((0, 0), (0, more)), ((0, more), (0, more))
    return Growing(*map(jnp.pad, space, (columns, square, columns)))


def placed(matrix: Array | None, part: Array, start: Int[Array, ""] | int, axis: int = 1) -> Array:
    """Return the matrix with a part from `start` on; only the part if there is no matrix.

    Args:
        matrix: an array that has room for it.
        part: columns, or rows.
        start: where it begins.
        axis: 1 for columns.
    """
    return part if matrix is None else lax.dynamic_update_slice_in_dim(matrix, part, start, axis)


def with_fresh(
    basis: Inexact[Array, "n k"], columns: Inexact[Array, "n b"], key: Key[Array, ""]
) -> Inexact[Array, "n b"]:
    """Return the columns, with other random directions in place of those that are zero.

    There are such where the space is invariant under A: what it does not reach needs them.

    Args:
        basis: an orthonormal basis, of which the columns are some.
        columns: orthonormal, or zero.
        key: PRNG key.
    """
    dead = jnp.all(columns == 0, axis=0)

    def replaced(columns: Array) -> Array:
        fresh = random_block(key, columns.shape[0], columns.shape[1], columns.dtype)
        return columns + jnp.where(dead, extend(basis, fresh), 0)

    return lax.cond(jnp.any(dead), replaced, lambda columns: columns, columns)
