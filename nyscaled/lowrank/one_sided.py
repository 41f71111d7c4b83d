"""A P Pᴴ for a block Krylov space of the shorter side, and its SVD.

P spans the range of [AᴴAΩ, …, (AᴴA)^s Ω]. Only P is a basis. On the longer side no block is made
orthogonal to others but the first to itself: the images A P stay as the products give them, and one
Cholesky factorization of their Gram matrix gives the SVD of A P. For that they may not be close to
dependent. So the columns of each block are turned to the singular vectors of what is known of A on
it, whose images are almost orthogonal, and scaled to images of norm about 1. If they are dependent
nevertheless, an orthonormal basis of the images is made. The projection is exact in both cases.

References:
    Simon and Zha, Low-rank matrix approximation using the Lanczos bidiagonalization process with
    applications, SIAM J. Sci. Comput. 21, 2000.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int

from nyscaled.lapack import inverse_cholesky
from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.orthogonal import adjoint, extend, inner, reciprocal_norms
from nyscaled.lowrank.products import Products
from nyscaled.numerics import abs_squared, full_precision, normalized, shift

_MOST_GROWTH = 16  # of the rounding of a Gram matrix, by the square of the inverse of its factor

Triples = tuple[Inexact[Array, "m r"], Float[Array, " k"], Inexact[Array, "k k"]]


class RowSpace(NamedTuple):
    """An orthonormal basis of the shorter side, and its images.

    `images` are A P 2^−e, with an exponent e for each column. `coimages` are AᴴQ for the first
    block Q, of which the first columns of `right` are a basis.
    """

    images: Inexact[Array, "m k"]
    exponents: Int[Array, "1 k"]
    right: Inexact[Array, "n k"]
    coimages: Inexact[Array, "n b"]


def row_space(products: Products, block: Inexact[Array, "m b"], dimensions: int) -> RowSpace:
    """Return a Krylov space of this many dimensions, by two products for each block.

    Args:
        products: the products with A.
        block: an orthonormal basis of AΩ.
        dimensions: how many columns the basis gets; the last block may be narrower.
    """
    coimages = first = products.adjoint_times(block)
    right, images, exponents = None, [], []
    while True:
        missing = dimensions - (0 if right is None else right.shape[1])
        right, scaled, exponent = _grown(right, coimages, min(block.shape[1], missing))
        images.append(products.times(scaled))
        exponents.append(exponent)
        if right.shape[1] == dimensions:
            break
        coimages = products.adjoint_times(images[-1])
    whole, e = jnp.concatenate(images, axis=1), jnp.concatenate(exponents, axis=1)
    return RowSpace(whole, e, right, first)


@functools.partial(jax.jit, static_argnums=2)
@full_precision
def _grown(
    right: Inexact[Array, "n k"] | None, coimages: Inexact[Array, "n b"], count: int
) -> tuple[Inexact[Array, "n j"], Inexact[Array, "n c"], Int[Array, "1 c"]]:
    """The basis with the next block, and that block times 2^−e, whose images have norm about 1."""
    columns = extend(right, coimages)
    # The vectors of the second side are orthonormal for all singular values.
    _, values, turn = core_svd(inner(coimages, columns))
    columns = columns @ adjoint(turn[:count])
    eps = float(jnp.finfo(values.dtype).eps)
    _, e = normalized(jnp.maximum(values[None, :count], eps * values[0]), axis=0)
    joined = columns if right is None else jnp.concatenate([right, columns], axis=1)
    return joined, shift(columns, -e), e


@functools.partial(jax.jit, static_argnums=2)
@full_precision
def svd_of_images(
    images: Inexact[Array, "m k"], exponents: Int[Array, "1 k"], rank: int
) -> Triples:
    """Return the left singular vectors of the largest values of A P, all values, and Vᴴ.

    Args:
        images: A P 2^−e.
        exponents: e of each column.
        rank: the number of left singular vectors.
    """
    gram = inner(images, images)
    inverse, both = reciprocal_norms(gram, 0)
    scaled = gram * both
    root = inverse_cholesky(scaled)
    good = jnp.max(jnp.sum(abs_squared(root), axis=1)) < _MOST_GROWTH  # NaN is not

    def by_gram() -> Triples:
        size = jnp.sqrt(jnp.diagonal(gram).real)
        u, values, vh = core_svd(shift((adjoint(root) @ scaled) * size, exponents))
        return images @ (inverse[:, None] * (root @ u[:, :rank])), values, vh

    def by_basis() -> Triples:
        basis = extend(None, images)
        u, values, vh = core_svd(shift(inner(basis, images), exponents))
        return basis @ u[:, :rank], values, vh

    return lax.cond(good, by_gram, by_basis)
