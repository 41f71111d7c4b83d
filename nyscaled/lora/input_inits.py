"""Starts from the inputs of layers, which are read by gradients of the adapters.

An adapter that measures adds nothing to its layer, and what it hands back as the gradient in a is
Σ xᵀx·a over the inputs x of the layer. So the products that subspace iteration requires come from
as many passes over a few batches, for all layers at once, stacked ones too. Neither the inputs nor
a matrix of the inputs' second moments is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from nyscaled import validation
from nyscaled.lapack import svd
from nyscaled.linalg.subspace import OVERSAMPLING
from nyscaled.lora.pairs import Pair, num_shared
from nyscaled.lora.recipe import path_key
from nyscaled.numerics import full_precision, norm
from nyscaled.transforms.leaf_names import Path

ByLayer = dict[str, Array]
"""Stacks of matrices (k, in, columns) by the paths of their layers."""


@full_precision
def eva(
    products: Callable[[ByLayer], ByLayer],
    starts: ByLayer,
    key: Key[Array, ""],
    *,
    niter: int = 2,
) -> ByLayer:
    """EVA: a = the r leading right singular vectors of the layer's inputs X, b = 0.

    Unlike in PEFT, the mean of the inputs is not subtracted. Ranks are not moved between layers.

    Args:
        products: from V to XᵀX·V, for each layer.
        starts: first factors of the right shapes; their values are not used.
        key: PRNG key of the subspace iteration.
        niter: number ≥ 0 of rounds of subspace iteration; each reads all batches, one more does.

    References:
        Paischer et al., One initialization to rule them all: fine-tuning via explained variance
        adaptation, 2024.
    """
    niter = validation.require_count("niter", niter)
    bases: ByLayer = {}
    for path, a in starts.items():
        count, m, rank = a.shape
        columns = min(m, rank + OVERSAMPLING)
        bases[path] = jax.random.normal(path_key(key, path), (count, m, columns))
    for _ in range(niter + 1):
        images = products(bases)
        _require_inputs(images)
        bases = {path: _left_vectors(image) for path, image in images.items()}
    return {path: bases[path][:, :, : a.shape[-1]] for path, a in starts.items()}


_left_vectors = jax.vmap(lambda x: svd(x)[0])

INPUT_INITS: dict[str, Callable[..., ByLayer]] = {"eva": eva}


def _require_inputs(images: ByLayer) -> None:
    """Raise ValueError where a layer has no inputs that matter to the loss, or they overflow."""
    if not validation.is_concrete(images):
        return
    sizes = jax.device_get({p: jnp.min(norm(x, axis=(1, 2))) for p, x in images.items()})
    for path, size in sizes.items():
        if not (0 < size < math.inf):
            raise ValueError(
                f"the inputs of {path} have second moments of norm {size}; expected finite ones, "
                "not zero (does the loss depend on the layer?)"
            )


def start(
    init: str,
    key: Key[Array, ""],
    pairs: Sequence[Pair],
    leaves: Mapping[Path, Array],
    gradient: Callable[[dict[Path, Array]], Mapping[Path, Array]],
    options: Mapping[str, object],
) -> dict[Path, Array]:
    """Return new values for the factors of pairs.

    Args:
        init: a name in `INPUT_INITS`.
        key: PRNG key.
        pairs: the pairs.
        leaves: the factors by path.
        gradient: from values of the first factors to what adapters that measure hand back.
        options: options of the init.
    """
    leading = {
        p.layer: leaves[p.a].shape[: num_shared(leaves[p.a].shape, leaves[p.b].shape, p.layer)]
        for p in pairs
    }

    def matrices(values: Mapping[Path, Array]) -> ByLayer:
        count = {layer: math.prod(shape) for layer, shape in leading.items()}
        return {
            p.layer: values[p.a]
            .astype(jnp.float32)
            .reshape((count[p.layer], -1, values[p.a].shape[-1]))
            for p in pairs
        }

    def written(starts: ByLayer) -> dict[Path, Array]:
        return {p.a: starts[p.layer].reshape((*leaves[p.a].shape[:-1], -1)) for p in pairs}

    new = written(
        INPUT_INITS[init](
            lambda starts: matrices(gradient(written(starts))), matrices(leaves), key, **options
        )
    )
    values = {path: x.astype(leaves[path].dtype) for path, x in new.items()}
    return values | {p.b: jnp.zeros_like(leaves[p.b]) for p in pairs}
