"""Adapters that flax (nnx.LoRA, nnx.LoRALinear) or qwix have put into an NNX model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from nyscaled.lora import pairs
from nyscaled.lora.view import (
    LINEAR,
    AxisRoles,
    KernelView,
    is_quantized,
    roles_of,
    values_of,
)
from nyscaled.numerics import at_least_float32
from nyscaled.transforms.leaf_names import Path

ALPHA = "lora_alpha"  # the α that was passed to `initialize`, in a factor's metadata


class Foreign(NamedTuple):
    """An adapter and its kernel.

    Attributes:
        path: path of the layer.
        a: the variable with the factor (stack…, in…, r).
        b: the variable with the factor (stack…, r, out…).
        kernel: the holder of W_0: a variable, what qwix made of it, or None.
        view: how the kernel is read.
        scaling: s, which multiplies the product of the factors.
    """

    path: str
    a: Any
    b: Any
    kernel: Any
    view: KernelView
    scaling: float

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors, (stack…, in, r) and (stack…, r, out)."""
        a, b = (np.asarray(factor[...]) for factor in (self.a, self.b))
        stack, rank = self.view.stack, a.shape[-1]
        return a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1)

    def merged(self) -> Array:
        """Return W_0 + s·a·b, in the kernel's dtype.

        Raises:
            ValueError: if there is no kernel, or if qwix quantized it.
        """
        if self.kernel is None:
            raise ValueError(
                f"{self.path} has no kernel beside its adapter; expected one to merge into"
            )
        if is_quantized(self.kernel):
            raise ValueError(
                f"the kernel of {self.path} was quantized by qwix, which has no form for the sum "
                "with an update; expected a floating kernel, or the adapter left beside it"
            )
        kernel = values_of(self.kernel, self.path)
        wide = at_least_float32(kernel)
        a, b = (jnp.asarray(x, wide.dtype) for x in self.matrices())
        with jax.default_matmul_precision("highest"):
            change = self.view.from_matrices(self.scaling * (a @ b))
        return (wide + change).astype(kernel.dtype)


def nodes(model: nnx.Module) -> dict[Path, Any]:
    """Return the variables of the model's layers by path, and what qwix made of quantized ones."""
    return {
        (*map(str, path), attribute): node
        for path, module in nnx.iter_modules(model)
        for attribute, node in vars(module).items()
        if isinstance(node, nnx.Variable) or is_quantized(node)
    }


def find(model: nnx.Module, alpha: float | None) -> list[Foreign]:
    """Return the adapters that flax and qwix have put into a model.

    Args:
        model: the model.
        alpha: α, for s = α/r. None is the α that was passed to `initialize`, or s = 1 as in flax.

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


def _of_pair(
    pair: pairs.Pair,
    known: dict[Path, Any],
    modules: dict[Path, nnx.Module],
    alpha: float | None,
) -> Foreign:
    alpha = known[pair.a].get_metadata(ALPHA, None) if alpha is None else alpha
    if pair.library == "qwix" and alpha is None:
        raise ValueError(
            f"alpha is None, and the adapter of {pair.layer} is qwix's, which does not know its "
            "own; expected that of its provider, here or in `initialize`"
        )
    a, b = known[pair.a], known[pair.b]
    kernel = None if pair.kernel is None else known[pair.kernel]
    layer = None if pair.kernel is None else modules.get(pair.kernel[:-1])
    if isinstance(layer, LINEAR) and roles_of(layer).batch:
        raise ValueError(
            f"{pair.layer} has batch axes (experts, say), for which adapters of flax and qwix can "
            "only be filled; expected a layer of one matrix"
        )
    if kernel is None:
        depth = pairs.num_shared(a.shape, b.shape, pair.layer)
        sides = math.prod(a.shape[depth:-1]), math.prod(b.shape[depth + 1 :])
        view = KernelView(sides, AxisRoles((), (0,), (1,)), a.shape[:depth])
    else:
        shape = jax.eval_shape(lambda: values_of(kernel, pair.layer)).shape
        view = pairs.view_over(shape, a.shape, b.shape, pair.layer)
    rank = a.shape[-1]
    return Foreign(pair.layer, a, b, kernel, view, 1.0 if alpha is None else alpha / rank)
