"""Fills the adapters of an NNX model: ours, flax's nnx.LoRA and LoRALinear, qwix's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from nyscaled.lora import foreign, gradients, kernels, pairs
from nyscaled.lora.inits import Init
from nyscaled.lora.inject import adapted_layers, draw_for
from nyscaled.lora.trees import fill
from nyscaled.transforms.leaf_names import Path


def initialize(
    model: nnx.Module,
    init: str | Init = "nora",
    *,
    key: Key[Array, ""],
    name: str = "default",
    alpha: float | None = None,
    loss: Callable[[Any, Any], Array] | None = None,
    batches: Iterable[Any] = (),
    **options: Any,
) -> list[str]:
    """Starts the adapters of an NNX model anew, in place: those of `apply`, of flax, of qwix.

    Args:
        model: with adapters. Kernels may be quantized by qwix (int8, nf4): they are dequantized,
            one layer at a time, for what the start needs.
        init: a name in `KERNEL_INITS`, or in `GRADIENT_INITS` (with `loss` and `batches`), or a
            function like those of the former.
        key: PRNG key; each layer's is folded from it by path.
        name: which set, among those of `apply`.
        alpha: α of adapters that do not know their own scaling, for s = α/r. None is s = 1, which
            is right for flax; pass qwix's, which `merge` and `save_peft` then remember.
        loss: for inits from gradients, a function of (model, batch).
        batches: what the gradient is averaged over; the first few batches will do.
        **options: of the init.

    Returns:
        The paths of the layers.

    Raises:
        ValueError: if there is no adapter, on orphans, on a kernel that cannot be read, on PiSSA
            and its like over a quantized kernel of qwix (they would subtract from it), and
            without `loss` and `batches` where they are needed. Nothing has been changed then.

    Examples:
        >>> model = nnx.LoRALinear(6, 4, lora_rank=2, rngs=nnx.Rngs(0))
        >>> initialize(model, "nora", key=jax.random.key(0), scale=0.1)
        ['model']
    """
    mine = {p: m for p, m in adapted_layers(model).items() if name in m.adapters}
    nodes = foreign.nodes(model)
    found = [p for p in pairs.find(nodes) if p.library != "nyscaled" or p.set_name == name]
    if not found:
        raise ValueError(f"the model has no adapter named {name!r}, nor any of flax or qwix")
    others = [p for p in found if p.library != "nyscaled"]
    if init in gradients.GRADIENT_INITS:
        new = _from_gradients(
            model, str(init), key, name, loss, list(batches), found, nodes, options
        )
    else:
        draw = kernels.resolve(init)
        drawn = {}
        for path, layer in mine.items():
            a = layer.adapters[name]
            drawn[path] = draw_for(
                layer, path, a.rank, a.scaling, a.lora_a.dtype, key, draw, options
            )
        kernels.require_finite(drawn)
        new = {}
        for pair in others:
            filled = fill(
                pair, nodes[pair.a][...], nodes[pair.b][...], nodes.get(pair.kernel),
                init=draw, key=key, alpha=alpha, options=options,
            )  # fmt: skip
            new |= {pair.a: filled.a, pair.b: filled.b}
            if filled.kernel is not None:
                new[pair.kernel] = filled.kernel
        for path, layer in mine.items():
            layer.adapters[name].restart(drawn[path], key, init, options)
    for path, value in new.items():
        nodes[path][...] = value
    for pair in others if alpha is not None else ():
        nodes[pair.a].set_metadata(foreign.ALPHA, alpha)
    return [p.layer for p in found]


def _from_gradients(
    model: Any, init: str, key: Any, name: str, loss: Any, batches: list[Any],
    found: Sequence[pairs.Pair], nodes: dict[Any, Any], options: Any,
) -> dict[Any, Array]:  # fmt: skip
    """The factors' new values, by the gradient of the loss in the model's LoRAParams."""
    if loss is None or not batches:
        raise ValueError(
            f"init is {init!r}; expected `loss`, a function of (model, batch), and batches"
        )
    # The gradient is wanted at W_0: what an earlier start subtracts is taken as zero.
    mine = {p.a[:-1] for p in found}
    subtracted = lambda path, _: path[-2:-1] == ("start",) and tuple(map(str, path[:-2])) in mine  # noqa: E731
    graphdef, factors, old, rest = nnx.split(model, nnx.LoRAParam, subtracted, ...)
    old = jax.tree.map(jnp.zeros_like, old)
    flat = dict(nnx.to_flat_state(factors))
    paths = {tuple(map(str, path)): path for path in flat}

    @jax.jit
    def gradient(factors: Any, old: Any, rest: Any, batch: Any) -> Any:
        return jax.grad(lambda f: loss(nnx.merge(graphdef, f, old, rest, copy=True), batch))(
            factors
        )

    def of_leaves(values: dict[Path, Array]) -> dict[Path, Array]:
        new = {paths[p]: flat[paths[p]].replace(value) for p, value in values.items()}
        state = nnx.from_flat_state(flat | new)
        total = functools.reduce(
            functools.partial(jax.tree.map, jnp.add),
            (gradient(state, old, rest, batch) for batch in batches),
        )
        return {tuple(map(str, p)): v[...] for p, v in nnx.to_flat_state(total)}

    leaves = {path: nodes[path][...] for p in found for path in (p.a, p.b)}
    new = gradients.start(init, key, found, leaves, of_leaves, options)
    for layer in adapted_layers(model).values():
        if name in layer.adapters:
            adapter = layer.adapters[name]
            drawn = kernels.Drawn(adapter.lora_a[...], adapter.lora_b[...], None)
            adapter.restart(drawn, key, init, options)
    return new
