"""Starts from the gradient of the loss at W_0, by gradients of the adapters only (Appendix A.4).

At a = 0 the model computes what its base does, and the gradient in a is s·G·bᵀ, where G is the
gradient in W_0. At b = 0 the gradient in b is s·aᵀG. So one gradient in the adapters multiplies G
from either side, for all layers at once, and no array of W_0's size is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from nyscaled import validation
from nyscaled.initializers import random_sketch
from nyscaled.lapack import svd
from nyscaled.linalg import orthonormalize
from nyscaled.lora.inits import KAIMING
from nyscaled.lora.pairs import Pair, num_shared
from nyscaled.lora.recipe import path_key
from nyscaled.numerics import at_least_float32, full_precision, norm
from nyscaled.transforms.leaf_names import Path
from nyscaled.typing import Sketch


class FactorStacks(NamedTuple):
    """An adapter's factors, or their gradients, as stacks of matrices in float32 at least."""

    a: Float[Array, "k m r"]
    b: Float[Array, "k r n"]


ByLayer = dict[str, FactorStacks]
"""Factors by the paths of their layers."""

Gradient = Callable[[ByLayer], ByLayer]


def _zeros(
    starts: ByLayer, a: Mapping[str, Array] | None, b: Mapping[str, Array] | None
) -> ByLayer:
    """`starts` with a or b replaced and the other factor zero."""
    return {
        path: FactorStacks(
            jnp.zeros_like(s.a) if a is None else a[path],
            jnp.zeros_like(s.b) if b is None else b[path],
        )
        for path, s in starts.items()
    }


def _sketches(key: Key[Array, ""], starts: ByLayer, sketch: Sketch) -> dict[str, Array]:
    """Ωᵀ (k, r, out) for each layer."""

    def draw(path: str, b: Array) -> Array:
        keys = jax.random.split(path_key(key, path), len(b))
        rank, n = b.shape[1:]
        return jax.vmap(lambda k: random_sketch(k, n, rank, 1.0, sketch, b.dtype).T)(keys)

    return {path: draw(path, s.b) for path, s in starts.items()}


def _require_gradient(images: Mapping[str, Array]) -> None:
    """Raise ValueError where the loss does not depend on a layer, or is not finite there."""
    if not validation.is_concrete(images):
        return
    sizes = jax.device_get({p: jnp.min(norm(x, axis=(1, 2))) for p, x in images.items()})
    for path, size in sizes.items():
        if not (0 < size < math.inf):
            raise ValueError(
                f"the loss has a gradient of norm {size} at {path}; expected a finite one, not "
                "zero (is the adapter active, and does the loss depend on the layer?)"
            )


@full_precision
def nora_grad(
    gradient: Gradient,
    starts: ByLayer,
    key: Key[Array, ""],
    *,
    scale: float = KAIMING,
    sketch: Sketch = "gaussian",
) -> ByLayer:
    """NoRA from gradients (A.4): a = −GΩ, the negative gradient in a at (0, Ωᵀ), and b = 0.

    The length of a gradient is in units of the loss and has no meaning for a start, so each a is
    scaled to columns of root mean square length `scale`.

    Args:
        gradient: from factors to the gradient of the loss in them.
        starts: factors of the right shapes; their values are not used.
        key: PRNG key for Ω.
        scale: root mean square length of the columns of a; 1/√3 is that of LoRA's Kaiming start.
        sketch: "gaussian", or "stiefel" for an orthonormal Ω.
    """
    validation.require_positive("scale", scale)
    images = {
        p: g.a for p, g in gradient(_zeros(starts, None, _sketches(key, starts, sketch))).items()
    }
    _require_gradient(images)
    size = {p: norm(x, axis=(1, 2))[:, None, None] for p, x in images.items()}
    return _zeros(
        starts, {p: -x * (scale * x.shape[-1] ** 0.5 / size[p]) for p, x in images.items()}, None
    )


@full_precision
def lora_one(
    gradient: Gradient,
    starts: ByLayer,
    key: Key[Array, ""],
    *,
    gamma: float = 16.0,
    niter: int = 2,
) -> ByLayer:
    """LoRA-One: a = c·U√(S/S_1), b = c·√(S/S_1)Vᵀ of the leading r singular triples of −G.

    c² = √out/γ. The product is not subtracted: the model starts one rank-r gradient step ahead of
    W_0, which is the idea of the method. The triples are computed by `niter` rounds of subspace
    iteration, of two gradients each, and two gradients more.

    Args:
        gradient: from factors to the gradient of the loss in them.
        starts: factors of the right shapes; their values are not used.
        key: PRNG key of the subspace iteration.
        gamma: γ > 0, the inverse of the squared length of the step.
        niter: number of rounds of subspace iteration, ≥ 0.

    References:
        Zhang, Liu, Chen, LoRA-One: one-step full gradient could suffice for fine-tuning large
        language models, ICML 2025.
    """
    validation.require_positive("gamma", gamma)
    niter = validation.require_count("niter", niter)
    b = _sketches(key, starts, "gaussian")
    rows: dict[str, Array] = {}
    bases: dict[str, Array] = {}
    for _ in range(niter + 1):
        images = {p: -g.a for p, g in gradient(_zeros(starts, None, b)).items()}
        _require_gradient(images)
        bases = {p: _orthonormal(x) for p, x in images.items()}
        rows = {p: -g.b for p, g in gradient(_zeros(starts, bases, None)).items()}
        b = {p: _orthonormal(x.mT).mT for p, x in rows.items()}

    def balanced(basis: Array, compressed: Array) -> FactorStacks:
        u, s, vt = svd(compressed)
        root = jnp.sqrt(s / s[0] * (vt.shape[1] ** 0.5 / gamma))
        return FactorStacks(basis @ (u * root), root[:, None] * vt)

    return {p: jax.vmap(balanced)(bases[p], rows[p]) for p in starts}


_orthonormal = jax.vmap(orthonormalize)

GRADIENT_INITS: dict[str, Callable[..., Any]] = {"nora_grad": nora_grad, "lora_one": lora_one}


def start(
    init: str,
    key: Key[Array, ""],
    pairs: Sequence[Pair],
    leaves: Mapping[Path, Array],
    gradient: Callable[[dict[Path, Array]], Mapping[Path, Array]],
    options: Mapping[str, Any],
) -> dict[Path, Array]:
    """Return new values for the factors of pairs.

    Args:
        init: a name in `GRADIENT_INITS`.
        key: PRNG key.
        pairs: the pairs.
        leaves: arrays of the model or tree by path, the factors among them.
        gradient: from values of the factors to the gradient of the loss in them.
        options: options of the init.
    """

    def matrices(values: Mapping[Path, Array]) -> ByLayer:
        out = {}
        for pair in pairs:
            a, b = values[pair.a], values[pair.b]
            count = math.prod(a.shape[: num_shared(a.shape, b.shape, pair.layer)])
            out[pair.layer] = FactorStacks(
                at_least_float32(a).reshape((count, -1, a.shape[-1])),
                at_least_float32(b).reshape((count, a.shape[-1], -1)),
            )
        return out

    def written(starts: ByLayer) -> dict[Path, Array]:
        values = [
            (path, x) for p in pairs for path, x in zip((p.a, p.b), starts[p.layer], strict=True)
        ]
        return {
            path: x.reshape(leaves[path].shape).astype(leaves[path].dtype) for path, x in values
        }

    new = GRADIENT_INITS[init](
        lambda starts: matrices(gradient(written(starts))), matrices(leaves), key, **options
    )
    return written(new)
