"""Block Krylov spaces of A, from products of A and Aᴴ with thin blocks.

ScaledGD at η = 1 is block subspace iteration: it makes q = orth(A p) and p = orth(Aᴴ q) in turn
and forgets the blocks before. Here the blocks are kept, and each is made orthogonal to those
before. So every product counts fully: after s blocks the basis spans the range of
[AΩ, (AAᴴ)AΩ, …, (AAᴴ)^(s−1)AΩ].

References:
    Musco and Musco, Randomized block Krylov methods for stronger and faster approximate singular
    value decomposition, NeurIPS 2015.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.orthogonal import extend, inner
from nyscaled.lowrank.products import Products


class Projection(NamedTuple):
    """QQᴴA = Q C Pᴴ for an orthonormal basis Q of a subspace."""

    left: Inexact[Array, "m k"]
    core: Inexact[Array, "k j"]
    right: Inexact[Array, "n j"]


class Sketch(NamedTuple):
    """The first block of a basis, and what it was made of.

    `images` are AΩ, of which column j belongs to column j of Ω. `draws` are G and `probes` AG.
    """

    basis: Inexact[Array, "m b"]
    images: Inexact[Array, "m b"]
    draws: Inexact[Array, "n s"]
    probes: Inexact[Array, "m s"]


def sketch(
    products: Products, start: Inexact[Array, "n b"], draws: Inexact[Array, "n s"]
) -> Sketch:
    """Return the first block, by a product with A.

    Args:
        products: the products with A.
        start: a random block.
        draws: columns of which only the images are kept.
    """
    width = start.shape[1]
    both = products.times(jnp.concatenate([start, draws], axis=1))
    return Sketch(extend(None, both[:, :width]), both[:, :width], draws, both[:, width:])


def project(products: Products, first: Sketch, dimensions: int) -> Projection:
    """Return QQᴴA for a basis Q of this many columns, by an odd number of products.

    Args:
        products: the products with A.
        first: the first block, from `sketch`.
        dimensions: how many columns the basis gets; the last block may be narrower.
    """
    block = left = first.basis
    right, rows = None, []
    width = left.shape[1]
    while True:
        images = products.adjoint_times(block)
        extended = extend(right, images)
        right = extended if right is None else jnp.concatenate([right, extended], axis=1)
        rows.append(inner(images, right))  # 0 along the blocks to come, which they do not need
        columns = min(width, dimensions - left.shape[1])
        if columns <= 0:
            break
        if columns < width:  # those that A has most of
            leading, _, _ = core_svd(inner(extended, images))
            extended = extended @ leading[:, :columns]
        block = extend(left, products.times(extended))
        left = jnp.concatenate([left, block], axis=1)
    total = right.shape[1]
    core = [jnp.pad(row, ((0, 0), (0, total - row.shape[1]))) for row in rows]
    return Projection(left, jnp.concatenate(core), right)
