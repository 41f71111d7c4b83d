"""Puts adapters into the layers of an NNX model, and takes them out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from nyscaled import validation
from nyscaled.lora import kernels
from nyscaled.lora.axes import (
    KINDS,
    LINEAR,
    declared_shape,
    kernel_of,
    split,
    stack_of,
    to_matrices,
)
from nyscaled.lora.inits import Init
from nyscaled.lora.layer import Adapted, Adapter, adapted_class, scaling_of


def dotted(path: tuple[Any, ...]) -> str:
    """A module's path as one string: `layers.0.self_attn.q_proj`."""
    return ".".join(map(str, path))


def adapted_layers(model: nnx.Module) -> dict[str, Any]:
    """The layers of `model` that carry adapters, by path."""
    return {dotted(p): m for p, m in nnx.iter_modules(model) if isinstance(m, Adapted)}


def require_name(layers: Mapping[str, Any], name: str | None) -> None:
    """Raises ValueError unless some layer has an adapter of that name (any, if None)."""
    names = sorted({n for layer in layers.values() for n in layer.adapters})
    if not names or (name is not None and name not in names):
        known = names or "none (of `apply` or `load_peft`)"
        raise ValueError(f"adapter is {name!r}; the model has {known}")


def is_tied(model: Any) -> bool:
    """Whether the model's head is its embedding, as far as a model of `nyscaled.models` says it."""
    return hasattr(model, "untie") and model.config.tie_word_embeddings


def _find(
    model: nnx.Module, ranks: Mapping[str, int], embeddings: bool
) -> dict[str, tuple[Any, int]]:
    """The layers that the patterns match, each with the rank of the first that does."""
    kinds = KINDS if embeddings else LINEAR
    modules = {dotted(p): m for p, m in nnx.iter_modules(model) if p}
    layers = {p: m for p, m in modules.items() if isinstance(m, kinds)}
    found: dict[str, tuple[Any, int]] = {}
    for pattern, rank in ranks.items():
        try:
            hits = [path for path in layers if re.fullmatch(pattern, path)]
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not hits:
            others = [p for p in modules if re.fullmatch(pattern, p)]
            named = (
                f"only {others[0]}, a {type(modules[others[0]]).__name__}"
                if others
                else "no module"
            )
            if others and isinstance(modules[others[0]], nnx.Embed):
                named += " (pass embeddings=True to adapt it)"
            if pattern == "lm_head" and is_tied(model):
                named += ": the head is the embedding (model.untie() gives it weights of its own)"
            raise ValueError(
                f"the pattern {pattern!r} matches {named}; expected (as a whole) a path of an "
                f"nnx.Linear, LinearGeneral or Einsum, such as {', '.join(list(layers)[:8]) or 'none here'}"
            )
        for path in hits:
            found.setdefault(path, (layers[path], rank))
    return found


def apply(
    model: nnx.Module,
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: str | Mapping[str, int],
    init: str | Init = "nora",
    key: Key[Array, ""],
    name: str = "default",
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    embeddings: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Puts adapters into the layers of an NNX model, in place; the base stays as it is.

    A layer then computes its own output plus s·x·a·b. The factors are `nnx.LoRAParam`, at
    `<layer>.adapters.<name>.lora_a` (in, r) and `lora_b` (r, out), with the axes of a stack
    (`nnx.vmap`, `nnx.scan`) and batch axes in front. Everything is checked before anything is
    changed.

    Args:
        model: any NNX model. Layers that can carry adapters are `nnx.Linear`,
            `nnx.LinearGeneral`, `nnx.Einsum` and, if asked for, `nnx.Embed`.
        rank: r.
        alpha: α; r if None, so that s = 1 (s = √r if rank-stabilized).
        targets: a regular expression for whole module paths (`.*(q_proj|v_proj)`), or a mapping
            from such expressions to ranks; the first that matches a layer counts.
        init: a name in `inits.KERNEL_INITS`, or a function like those there. Inits from gradients
            come afterwards, by `initialize`.
        key: PRNG key. Each layer's own is folded from it by path.
        name: of this set of adapters, to hold several.
        rank_stabilized: s = α/√r in place of α/r.
        dropout: rate in [0, 1), on the adapter's input; off in `model.eval()`.
        dtype: of the factors, whatever the base's.
        embeddings: whether patterns also match layers of the kind `nnx.Embed`. Their adapters change
            the lookup of tokens, without dropout, and not a head that shares their weights.
        **options: of the init: `scale` (ξ), `sketch`, `side`; `niter`; `distribution`.

    Returns:
        The layers that were adapted, by path.

    Raises:
        ValueError: on a pattern that is no expression or matches nothing, a rank above a layer's
            sides, a name in use, an unknown init, a dtype that is not floating, a kernel that is not floating (quantized, say), or NaN in one.

    Examples:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu)
        >>> list(apply(model, rank=2, targets=r"layers\\.0", key=jax.random.key(0)))
        ['layers.0']
        >>> model.layers[0].adapters["default"].lora_b.shape
        (2, 8)
    """
    ranks = {targets: rank} if isinstance(targets, str) else dict(targets)
    validation.require_scalar("dropout", dropout, 0, 1, open_low=False)
    if dropout == 1:
        raise ValueError("dropout is 1, with which nothing is left; expected a rate in [0, 1)")
    if alpha is not None:
        validation.require_positive("alpha", alpha)
    require_new_name(name)
    dtype = floating(dtype)
    found, draw = _find(model, ranks, embeddings), kernels.resolve(init)
    for path, (layer, r) in found.items():
        require_room(path, layer, r, name)
    drawn = {
        path: draw_for(
            layer, path, r, scaling_of(alpha or r, r, rank_stabilized), dtype, key, draw, options
        )
        for path, (layer, r) in found.items()
    }
    kernels.require_finite(drawn)
    adapters = {}
    for path, (layer, r) in found.items():
        adapters[path] = new_adapter(
            layer,
            path,
            drawn[path].a,
            drawn[path].b,
            alpha=alpha or r,
            rank_stabilized=rank_stabilized,
            dropout=dropout,
            key=key,
        )
        adapters[path].restart(drawn[path], key, init, options)
    return attach({path: layer for path, (layer, _) in found.items()}, adapters, name)


def new_adapter(
    layer: Any,
    path: str,
    a: Array,
    b: Array,
    *,
    alpha: float,
    rank_stabilized: bool,
    dropout: float,
    key: Key[Array, ""] | None,
) -> Adapter:
    """An adapter with these factors for a layer; without dropout if there is no key for it."""
    scaling = scaling_of(alpha, a.shape[-1], rank_stabilized)
    narrow = jnp.dtype(layer.dtype or a.dtype)
    if abs(scaling) > float(jnp.finfo(narrow).max):
        raise ValueError(
            f"{path}: the scaling is {scaling:g} (α is {alpha:g}); expected one that {narrow} holds, in "
            "which the layer computes"
        )
    stack = stack_of(layer)
    rate = dropout if key is not None else 0.0
    return Adapter(
        a,
        b,
        stack=stack,
        alpha=alpha,
        rank_stabilized=rank_stabilized,
        dropout=_dropout(rate, key, path, stack),
        names=_declared_names(layer, len(stack)),
    )


def attach(layers: Mapping[str, Any], adapters: Mapping[str, Adapter], name: str) -> dict[str, Any]:
    """Gives each layer its adapter, and the class that uses it."""
    for path, adapter in adapters.items():
        layer = layers[path]
        if not isinstance(layer, Adapted):
            layer.adapters = nnx.Dict({})
            layer.__class__ = adapted_class(type(layer))
        layer.adapters[name] = adapter
    return {path: layers[path] for path in adapters}


def require_new_name(name: str) -> None:
    """Raises ValueError unless `name` can be that of a set of adapters."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"name is {name!r}; expected letters, digits and underscores")


def floating(dtype: Any) -> Any:
    """The dtype that factors are asked to have, by any of its names.

    Raises:
        ValueError: if it is not a floating one, or float64 without JAX's 64-bit mode.
    """
    try:
        kind = jnp.dtype(dtype) if dtype is not None else None
    except TypeError:
        kind = None
    sound = kind is not None and jnp.issubdtype(kind, jnp.floating)
    if not sound or jax.dtypes.canonicalize_dtype(kind) != kind:
        raise ValueError(
            f"dtype is {dtype!r}; expected a floating one, float64 only with jax_enable_x64"
        )
    return kind


def require_room(path: str, layer: Any, rank: int, name: str) -> None:
    """Raises ValueError unless the layer can take an adapter of this rank and name."""
    if isinstance(layer, nnx.LoRALinear) or any(k.endswith("_lora_a") for k in vars(layer)):
        raise ValueError(
            f"{path} has adapters of flax or qwix; expected a plain layer (`initialize` fills those)"
        )
    if isinstance(layer, Adapted) and name in layer.adapters:
        raise ValueError(
            f"{path} has an adapter named {name!r}; expected another name, or `remove`"
        )
    if kernels.is_quantized(kernel_of(layer)):
        raise ValueError(
            f"{path} was quantized by qwix, which reads every product of the model; expected a plain "
            "layer: let qwix.LoraProvider put the adapters in, and fill them with `initialize`"
        )
    stack_of(layer)
    sides = jax.eval_shape(
        lambda: to_matrices(jnp.zeros(declared_shape(layer)), split(layer), 0)
    ).shape[-2:]
    try:
        validation.require_rank(rank, sides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def draw_for(
    layer: Any, path: str, rank: int, scaling: float, dtype: Any, key: Any, init: Init,
    options: Mapping[str, Any],
) -> kernels.Drawn:  # fmt: skip
    """What an init draws from a layer's kernel, placed as the kernel is."""
    depth, parts = len(stack_of(layer)), split(layer)
    drawn = kernels.draw(
        kernels.path_key(key, path),
        kernels.dense(kernel_of(layer), path),
        init=init,
        rank=rank,
        scaling=scaling,
        parts=parts,
        depth=depth,
        options=tuple(sorted(options.items())),
        dtype=jnp.dtype(dtype),
    )
    return kernels.place(drawn, kernel_of(layer), parts, depth)


def _declared_names(layer: Any, depth: int) -> Any:
    """Axis names for the factors, if the kernel carries such metadata itself."""
    kernel = kernel_of(layer)
    if not isinstance(kernel, nnx.Variable) or not kernel.get_metadata().get("out_sharding"):
        return None
    return kernels.names_like(kernel, split(layer), depth)


def _dropout(rate: float, key: Any, path: str, stack: tuple[int, ...]) -> nnx.Dropout | None:
    """A dropout with a stream of its own for each layer of a stack."""
    if not rate:
        return None
    key = kernels.path_key(key, f"{path}.dropout")
    make = lambda key: nnx.Dropout(rate, rngs=nnx.Rngs(dropout=key))  # noqa: E731
    for _ in stack:
        make = nnx.vmap(make)
    return make(jax.random.split(key, stack) if stack else key)


def remove(model: nnx.Module, name: str | None = None) -> None:
    """Takes adapters out of a model; a layer without any has its own class again.

    What `merge` put into the kernels stays there.

    Args:
        model: as `apply` left it.
        name: of the set to remove; all if None.

    Raises:
        ValueError: if there is no such set.
    """
    layers = adapted_layers(model)
    require_name(layers, name)
    for layer in layers.values():
        for other in [n for n in layer.adapters if name in (None, n)]:
            del layer.adapters[other]
        if not layer.adapters:
            del layer.adapters
            layer.__class__ = layer.base_class
