"""Adapters that flax (nnx.LoRA, nnx.LoRALinear) or qwix have put into an NNX model."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from nyscaled.lora import kernels, pairs
from nyscaled.lora.axes import LINEAR, Split, from_matrices, split

ALPHA = "lora_alpha"  # of a factor's metadata, where `initialize` was told α


class Foreign(NamedTuple):
    """An adapter and its kernel.

    Attributes:
        path: of the layer.
        a: the variable with the factor (stack…, in…, r).
        b: the variable with the factor (stack…, r, out…).
        kernel: what holds W_0: a variable, what qwix made of it, or None.
        layout: how the factors lie over it.
        scaling: s.
    """

    path: str
    a: Any
    b: Any
    kernel: Any
    layout: pairs.Layout
    scaling: float

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """The factors, (stack…, in, r) and (stack…, r, out)."""
        a, b = (np.asarray(factor[...]) for factor in (self.a, self.b))
        stack, rank = a.shape[: self.layout.depth], a.shape[-1]
        return a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1)

    def merged(self) -> Array:
        """W_0 + s·a·b, in the kernel's dtype.

        Raises:
            ValueError: if there is no kernel, or none that the sum is exact in to its own rounding.
        """
        if self.kernel is None:
            raise ValueError(
                f"{self.path} has no kernel beside its adapter; expected one to merge into"
            )
        if kernels.is_quantized(self.kernel):
            raise ValueError(
                f"the kernel of {self.path} was quantized by qwix, which has no form for the sum with "
                "an update; expected a floating kernel, or the adapter left beside it"
            )
        kernel = kernels.dense(self.kernel, self.path)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        a, b = (jnp.asarray(x, wide) for x in self.matrices())
        with jax.default_matmul_precision("highest"):
            change = from_matrices(
                self.scaling * (a @ b), self.layout.parts, self.layout.depth, kernel.shape
            )
        return (kernel.astype(wide) + change).astype(kernel.dtype)


def nodes(model: nnx.Module) -> dict[Any, Any]:
    """Variables of the model's layers by path, and what qwix made of quantized ones."""
    return {
        (*map(str, path), attribute): node
        for path, module in nnx.iter_modules(model)
        for attribute, node in vars(module).items()
        if isinstance(node, nnx.Variable) or kernels.is_quantized(node)
    }


def find(model: nnx.Module, alpha: float | None) -> list[Foreign]:
    """The adapters that others have put into a model.

    Args:
        model: to be looked through.
        alpha: α, for s = α/r; None for that which `initialize` was told, or s = 1, as flax has it.

    Raises:
        ValueError: on orphans, factors that do not lie over their kernels, layers with batch axes,
            and adapters of qwix without α.
    """
    known = nodes(model)
    modules = {tuple(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return [
        _of_pair(pair, known, modules, alpha)
        for pair in pairs.find(known)
        if pair.library != "nyscaled"
    ]


def _of_pair(pair: pairs.Pair, known: Any, modules: Any, alpha: float | None) -> Foreign:
    alpha = known[pair.a].get_metadata(ALPHA, None) if alpha is None else alpha
    if pair.library == "qwix" and alpha is None:
        raise ValueError(
            f"alpha is None, and the adapter of {pair.layer} is qwix's, which does not know its "
            "own; expected that of its provider, here or in `initialize`"
        )
    a, b = known[pair.a], known[pair.b]
    kernel = known.get(pair.kernel)
    layer = modules.get(pair.kernel[:-1]) if pair.kernel else None
    if isinstance(layer, LINEAR) and split(layer).batch:
        raise ValueError(
            f"{pair.layer} has batch axes (experts, say), for which adapters of flax and qwix can be "
            "filled alone; expected a layer of one matrix"
        )
    if kernel is None:
        depth = pairs.num_shared(a.shape, b.shape, pair.layer)
        layout = pairs.Layout(depth, Split((), (0,), (1,)))
    else:
        shape = jax.eval_shape(lambda: kernels.dense(kernel, pair.layer)).shape
        layout = pairs.layout(shape, a.shape, b.shape, pair.layer)
    rank = a.shape[-1]
    return Foreign(pair.layer, a, b, kernel, layout, 1.0 if alpha is None else alpha / rank)
