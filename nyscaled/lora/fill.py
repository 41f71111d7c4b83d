"""Fill the adapters of an NNX model or a tree of parameters, whichever library put them in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from nyscaled.lora import foreign, gradient_inits, input_inits
from nyscaled.lora.adapter import Adapter
from nyscaled.lora.inits import Init
from nyscaled.lora.inject import adapted_layers
from nyscaled.lora.pairs import Pair, find, view_over
from nyscaled.lora.recipe import (
    Recipe,
    Weights,
    kernel_init,
    options_of,
    origin_of,
    path_key,
    require_trainable,
)
from nyscaled.lora.view import is_quantized, values_of
from nyscaled.numerics import at_least_float32
from nyscaled.transforms.leaf_names import Path, names_of
from nyscaled.validation import is_concrete, require_key


def initialize(
    model: nnx.Module,
    init: str | Init = "nora",
    *,
    key: Key[Array, ""],
    name: str = "default",
    alpha: float | None = None,
    loss: Callable[..., Array] | None = None,
    batches: Iterable[Any] = (),
    **options: Any,
) -> list[str]:
    """Start the adapters of an NNX model again, in place: those of `apply`, of flax, of qwix.

    Args:
        model: a model with adapters. Kernels that qwix quantized (int8, nf4) are dequantized, one
            layer at a time.
        init: a name in `KERNEL_INITS`, or in `GRADIENT_INITS` or `INPUT_INITS` (with `loss` and
            `batches`), or a function like those in `KERNEL_INITS`.
        key: PRNG key, from which a key per layer is folded by the layer's path.
        name: name of the set, among those of `apply`.
        alpha: α of adapters of flax and qwix, for s = α/r. None is s = 1, which is right for flax.
            Pass the α of qwix's provider; `merge` and `save_peft` then use it too.
        loss: for inits from gradients or inputs, a function of (model, batch). Inputs on which it
            does not depend, such as those at padding, are left out.
        batches: the batches over which the gradient is averaged, or the inputs are taken. A few
            are enough.
        **options: options of the init.

    Returns:
        The paths of the layers.

    Raises:
        ValueError: if there is no adapter or it is merged, on a factor without its partner, on a
            kernel that cannot be read, on an init that must subtract from a kernel that qwix
            quantized, without `loss` and `batches` if the init requires them, and on an init from
            inputs for adapters of flax or qwix. Nothing has been changed then.

    Examples:
        >>> model = nnx.LoRALinear(6, 4, lora_rank=2, rngs=nnx.Rngs(0))
        >>> initialize(model, "nora", key=jax.random.key(0), scale=0.1)
        ['model']
    """
    layers = {p: m for p, m in adapted_layers(model).items() if name in m.adapters}
    for path, layer in layers.items():
        if layer.adapters[name].merged:  # `unmerge` would take the new product out of the kernel
            raise ValueError(f"{path}: {name!r} is merged into the kernel; expected it unmerged")
    nodes = foreign.nodes(model)
    pairs = [p for p in find(nodes) if p.library != "nyscaled" or p.set_name == name]
    if not pairs:
        raise ValueError(f"the model has no adapter named {name!r}, nor any of flax or qwix")
    others = [p for p in pairs if p.library != "nyscaled"]
    key = require_key("key", key)
    origin = origin_of(init, options, key)
    if init in gradient_inits.GRADIENT_INITS or init in input_inits.INPUT_INITS:
        if loss is None or not (batches := list(batches)):
            raise ValueError(
                f"init is {init!r}; expected `loss`, a function of (model, batch), and batches"
            )
        leaves = {path: nodes[path][...] for p in pairs for path in (p.a, p.b)}
        if init in gradient_inits.GRADIENT_INITS:
            gradient = _gradient_of(model, pairs, loss, batches)
            values = gradient_inits.start(str(init), key, pairs, leaves, gradient, options)
        else:
            if others:
                raise ValueError(
                    f"init is {init!r} and {others[0].layer} has an adapter of "
                    f"{others[0].library}, which cannot read the inputs of its layer; expected "
                    "adapters of `apply`"
                )
            with _measuring([layer.adapters[name] for layer in layers.values()]):
                gradient = _gradient_of(model, pairs, loss, batches)
            values = input_inits.start(str(init), key, pairs, leaves, gradient, options)
        values = {path: _placed(x, leaves[path]) for path, x in values.items()}
        # The path of a factor of ours is that of its layer, `adapters`, the set and its name.
        weights = {
            ".".join(p.a[:-3]): Weights(values.pop(p.a), values.pop(p.b))
            for p in pairs
            if p.library == "nyscaled"
        }
    else:
        recipe = functools.partial(Recipe, kernel_init(init), origin.init[1])
        weights, values = {}, {}
        for path, layer in layers.items():
            a = layer.adapters[name]
            own = recipe(a.rank, a.alpha, a.rank_stabilized, a.lora_a.dtype)
            weights[path] = own.draw_for(layer, path, key)
        require_trainable(weights)
        for pair in others:
            values |= _fill_pair(pair, nodes, recipe, alpha, key)
    for path, value in weights.items():
        layers[path].adapters[name].restart(value, origin)
    for path, value in values.items():
        nodes[path][...] = value
    for pair in others if alpha is not None else ():
        nodes[pair.a].set_metadata(foreign.ALPHA, alpha)
    return [p.layer for p in pairs]


def _fill_pair(
    pair: Pair,
    leaves: Mapping[Path, Any],
    recipe: Callable[..., Recipe],
    alpha: float | None,
    key: Key[Array, ""],
) -> dict[Path, Array]:
    """New values of a pair, and of its kernel if the product is to be subtracted from it.

    Raises:
        ValueError: on a kernel that is missing, cannot be read or cannot be subtracted from, and
            on factors that do not fit it.
    """
    a, b = leaves[pair.a][...], leaves[pair.b][...]
    if pair.kernel is None:
        raise ValueError(f"{'.'.join(pair.a)} has no kernel beside it; expected one to start from")
    kernel = leaves[pair.kernel]
    old = values_of(kernel, pair.layer)
    view, rank = view_over(old.shape, a.shape, b.shape, pair.layer), a.shape[-1]
    own = recipe(rank, float(rank if alpha is None else alpha), False, a.dtype)
    new = own.draw(path_key(key, pair.layer), old, view)
    require_trainable({pair.layer: new})
    values = {pair.a: new.a.reshape(a.shape), pair.b: new.b.reshape(b.shape)}
    if new.start is None:
        return values
    if is_quantized(kernel):
        raise ValueError(
            f"the kernel of {pair.layer} is quantized, and this init must subtract its product "
            "from it; expected a floating kernel (dequantize it) or an init with a zero factor"
        )
    with jax.default_matmul_precision("highest"):
        product = view.from_matrices(own.scaling * (at_least_float32(new.a) @ new.b))
    return values | {pair.kernel: (old - product).astype(old.dtype)}


def _placed(x: Array, like: Array) -> Array:
    """The array on the devices of another one, where these are known."""
    return jax.device_put(x, like.sharding) if is_concrete((x, like)) else x


@contextlib.contextmanager
def _measuring(adapters: Sequence[Adapter]) -> Generator[None, None, None]:
    """Let adapters read the inputs of their layers, in models that are made of this one's graph."""
    for adapter in adapters:
        adapter.measures = True
    try:
        yield
    finally:
        for adapter in adapters:
            del adapter.measures


def _gradient_of(
    model: nnx.Module,
    pairs: Sequence[Pair],
    loss: Callable[..., Array],
    batches: Sequence[Any],
) -> Callable[[dict[Path, Array]], dict[Path, Array]]:
    """From values of the factors to the gradient of the loss in the model's LoRAParams, at W_0."""
    sets = {p.a[:-1] for p in pairs}

    def is_subtracted(path: tuple[Any, ...], value: Any) -> bool:
        return path[-2:-1] == ("start",) and tuple(map(str, path[:-2])) in sets

    # What an earlier start subtracts is zero here, so that the gradient is that at W_0.
    graphdef, factors, starts, others = nnx.split(model, nnx.LoRAParam, is_subtracted, ...)
    starts = jax.tree.map(jnp.zeros_like, starts)
    flat = dict(nnx.to_flat_state(factors))
    paths = {tuple(map(str, path)): path for path in flat}

    @jax.jit
    def of_batch(factors: Any, starts: Any, others: Any, batch: Any) -> Any:
        return jax.grad(lambda f: loss(nnx.merge(graphdef, f, starts, others, copy=True), batch))(
            factors
        )

    def gradient(values: dict[Path, Array]) -> dict[Path, Array]:
        new = {paths[p]: flat[paths[p]].replace(value) for p, value in values.items()}
        state = nnx.from_flat_state(flat | new)
        total = functools.reduce(
            functools.partial(jax.tree.map, jnp.add),
            (of_batch(state, starts, others, batch) for batch in batches),
        )
        return {tuple(map(str, p)): v[...] for p, v in nnx.to_flat_state(total)}

    return gradient


def initialize_params(
    params: Any,
    init: str | Init = "nora",
    *,
    key: Key[Array, ""],
    alpha: float | None = None,
    gradient: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """Return a tree of parameters in which the adapters start again.

    Args:
        params: the tree. Adapters are leaves `lora_a`, `lora_b` beside a `kernel`; qwix's
            `<w>_lora_a`, `<w>_lora_b` beside `<w>`, which qwix may have quantized; or gemma's
            `lora/a`, `lora/b` beside `w`.
        init: a name in `KERNEL_INITS`, or in `GRADIENT_INITS` (with `gradient`), or a function
            like those in `KERNEL_INITS`.
        key: PRNG key, from which a key per layer is folded by the layer's path.
        alpha: α, for s = α/r; None is s = 1.
        gradient: for inits from gradients, a function from such a tree to its gradient.
        **options: options of the init.

    Returns:
        A new tree. Leaves that are neither factors nor kernels subtracted from are the same
        objects.

    Raises:
        ValueError: if there is no adapter, on a factor without its partner, on a kernel that is
            missing or cannot be read, on an init that must subtract from a quantized kernel, and
            without `gradient` if the init requires it.

    Examples:
        >>> factors = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}
        >>> params = {"kernel": jnp.ones((6, 4)), **factors}
        >>> params = initialize_params(params, "nora", key=jax.random.key(0), scale=0.1)
        >>> bool(jnp.any(params["lora_b"]))
        False
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    leaves = {names_of(path): leaf for path, leaf in flat}
    pairs = find(leaves)
    if not pairs:
        raise ValueError("the tree has no adapters; expected leaves lora_a, *_lora_a or lora/a")
    key, new = require_key("key", key), dict(leaves)
    if init in gradient_inits.GRADIENT_INITS:
        if gradient is None:
            raise ValueError(
                f"init is {init!r}; expected `gradient`, from params to their gradient"
            )

        def of_leaves(values: dict[Path, Array]) -> dict[Path, Array]:
            grads = gradient(treedef.unflatten((leaves | values).values()))
            return dict(zip(leaves, treedef.flatten_up_to(grads), strict=True))

        new |= gradient_inits.start(str(init), key, pairs, leaves, of_leaves, options)
    else:
        recipe = functools.partial(Recipe, kernel_init(init), options_of(options))
        for pair in pairs:
            new |= _fill_pair(pair, leaves, recipe, alpha, key)
    return treedef.unflatten(new.values())
