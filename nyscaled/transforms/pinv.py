"""ScaledGD for factors of deficient rank: pseudo-inverses of Gram matrices, whose rank is cut once.

single factor X           G  ←  G (XᵀX)†                                  (26)
pair X Yᵀ                 G_X ← G_X (YᵀY)†,   G_Y ← G_Y (XᵀX)†            (35)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nyscaled import linalg
from nyscaled.numerics import norm
from nyscaled.transforms._pairwise import canonical, groups, over_batch, pairwise
from nyscaled.transforms.pairing import Spec


class ScaleByGramPinvState(NamedTuple):
    """Row spaces of the first factors.

    They are one vector, and not a tree like the parameters, because `optax.tree.map_params` finds
    what is not like the parameters by an `init` without arrays, whose state must have the same
    structure.

    Attributes:
        row_spaces: the orthonormal basis (r, r) of each group, flattened and joined. Columns beyond
            the rank are zero.
    """

    row_spaces: Float[Array, " k"]


def scale_by_gram_pinv(*, spec: Spec = None) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients of factors by pseudo-inverse Gram matrices, (26) and (35).

    ScaledGD keeps the row space of its factors, so the rank is cut once, by `init`, at √m·eps of
    the largest singular value. A new cut in each step would amplify the rounding noise in the
    directions that were cut.

    Args:
        spec: which leaves are factors; `default_spec` if None.

    Returns:
        A transformation whose `update` requires `params`.

    Raises:
        ValueError: as `scale_by_gram`.

    Examples:
        >>> x = jnp.array([[2.0, 2.0], [0.0, 0.0]])  # rank 1
        >>> tx = scale_by_gram_pinv()
        >>> updates, _ = tx.update(jnp.ones_like(x), tx.init(x), x)
        >>> jnp.round(updates, 4)
        Array([[0.125, 0.125],
               [0.125, 0.125]], dtype=float32)
    """

    def init_state(params: optax.Params) -> ScaleByGramPinvState:
        leaves = jax.tree.leaves(params)
        spaces = [
            over_batch(_row_space, *(canonical(leaves[m.leaf], m.spec) for m in group)).ravel()
            for group in groups(spec, params)
        ]
        return ScaleByGramPinvState(jnp.concatenate(spaces) if spaces else jnp.zeros((0,)))

    def spaces_of(state: ScaleByGramPinvState, params: optax.Params) -> optax.Params:
        """The row space of each factor, at its leaf."""
        leaves, treedef = jax.tree.flatten(params)
        spaces, start = [jnp.zeros((0,))] * len(leaves), 0
        for group in groups(spec, params):
            factor = canonical(leaves[group[0].leaf], group[0].spec)
            shape = (*factor.shape[:-2], factor.shape[-1], factor.shape[-1])
            stop = start + math.prod(shape)
            for member in group:
                space = state.row_spaces[start:stop].reshape(shape)
                spaces[member.leaf] = space.astype(factor.dtype)
            start = stop
        return treedef.unflatten(spaces)

    def rule(_: int, g: Array, factor: Array, partner: Array, space: Array) -> Array:
        partner, g = partner @ space, g @ space
        if len(partner) < partner.shape[1]:  # YᵀY is singular; (YᵀY)† = DDᵀ with D = Y†
            d = linalg.pinv(partner.T).T
            return (g @ d) @ d.T @ space.T
        return linalg.gram_solve(partner, g) @ space.T

    return pairwise(lambda state, **extra_args: rule, spec, init_state, per_factor=spaces_of)


def _row_space(*factors: Array) -> Array:
    """The row space that the factors of a group share, (r, r); zero columns beyond its rank."""
    sizes = [norm(f) for f in factors]
    stacked = jnp.concatenate(
        [f / jnp.where(s > 0, s, 1) for f, s in zip(factors, sizes, strict=True)]
    )
    rows, r = stacked.shape
    stacked = jnp.pad(stacked, ((0, max(r - rows, 0)), (0, 0)))  # for a rotation (r, r)
    cut = linalg.compress(stacked, linalg.default_rcond(factors[0].shape[0], stacked.dtype))
    return jnp.where(jnp.arange(r) < cut.rank, cut.rotation, 0)
