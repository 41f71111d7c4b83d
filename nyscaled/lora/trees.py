"""Fills the adapters of a tree of parameters: Linen with qwix, gemma, your own dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from nyscaled.lora import gradients, kernels, pairs
from nyscaled.lora.axes import from_matrices
from nyscaled.lora.inits import Init
from nyscaled.transforms.leaf_names import Path, names_of


class Filled(NamedTuple):
    """New values of a pair, and of its kernel if a product was subtracted from it."""

    a: Array
    b: Array
    kernel: Array | None


def fill(
    pair: pairs.Pair,
    a: Array,
    b: Array,
    kernel: Any,
    *,
    init: Init,
    key: Key[Array, ""],
    alpha: float | None,
    options: Mapping[str, Any],
) -> Filled:
    """A start for factors of any shape over their kernel.

    Raises:
        ValueError: on a kernel that is missing, cannot be read or cannot be subtracted from, and
            on factors that do not lie over it.
    """
    if kernel is None:
        raise ValueError(f"{'.'.join(pair.a)} has no kernel beside it; expected one to start from")
    values = kernels.dense(kernel, pair.layer)
    depth, parts = pairs.layout(values.shape, a.shape, b.shape, pair.layer)
    rank = a.shape[-1]
    scaling = 1.0 if alpha is None else alpha / rank
    drawn = kernels.draw(
        kernels.path_key(key, pair.layer),
        values,
        init=init,
        rank=rank,
        scaling=scaling,
        parts=parts,
        depth=depth,
        options=tuple(sorted(options.items())),
        dtype=a.dtype,
    )
    kernels.require_finite({pair.layer: drawn})
    changed = None
    if drawn.subtracted is not None:
        if kernels.is_quantized(kernel):
            raise ValueError(
                f"the kernel of {pair.layer} is quantized, and this init must subtract its product "
                "from it; expected a floating kernel (dequantize it) or an init with a zero factor"
            )
        product = from_matrices(scaling * (drawn.a @ drawn.b), parts, depth, values.shape)
        changed = (values - product).astype(values.dtype)
    return Filled(drawn.a.reshape(a.shape), drawn.b.reshape(b.shape), changed)


def initialize_params(
    params: Any,
    init: str | Init = "nora",
    *,
    key: Key[Array, ""],
    alpha: float | None = None,
    gradient: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """`initialize` for a tree of parameters.

    Args:
        params: the tree. Adapters are leaves `lora_a`, `lora_b` beside a `kernel`; qwix's
            `<w>_lora_a`, `<w>_lora_b` beside `<w>`, which qwix may have quantized; or gemma's
            `lora/a`, `lora/b` beside `w`.
        init: as in `initialize`.
        key: as in `initialize`.
        alpha: α, for s = α/r; None is s = 1.
        gradient: for inits from gradients, from such a tree to its gradient.
        **options: of the init.

    Returns:
        A new tree; leaves other than factors (and kernels, if subtracted from) are the same objects.

    Raises:
        ValueError: if there is no adapter, on orphans, on a kernel that is missing or cannot be
            read, on an init that must subtract from a quantized kernel, and without `gradient`
            where it is needed.

    Examples:
        >>> params = {"kernel": jnp.ones((6, 4)), "lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}
        >>> params = initialize_params(params, "nora", key=jax.random.key(0), scale=0.1)
        >>> bool(jnp.any(params["lora_b"]))
        False
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=kernels.is_quantized)
    leaves = {names_of(path): leaf for path, leaf in flat}
    found = pairs.find(leaves)
    if not found:
        raise ValueError("the tree has no adapters; expected leaves lora_a, *_lora_a or lora/a")
    new = dict(leaves)
    if init in gradients.GRADIENT_INITS:
        if gradient is None:
            raise ValueError(
                f"init is {init!r}; expected `gradient`, from params to their gradient"
            )

        def of_leaves(values: dict[Path, Array]) -> dict[Path, Array]:
            grads = gradient(treedef.unflatten((leaves | values).values()))
            return dict(zip(leaves, treedef.flatten_up_to(grads), strict=True))

        new |= gradients.start(str(init), key, found, leaves, of_leaves, options)
    else:
        draw = kernels.resolve(init)
        for pair in found:
            kernel = leaves[pair.kernel] if pair.kernel else None
            filled = fill(
                pair, leaves[pair.a], leaves[pair.b], kernel,
                init=draw, key=key, alpha=alpha, options=options,
            )  # fmt: skip
            new |= {pair.a: filled.a, pair.b: filled.b}
            if pair.kernel and filled.kernel is not None:
                new[pair.kernel] = filled.kernel
    return treedef.unflatten(new.values())
