"""Put adapters into the layers of an NNX model, and take them out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from nyscaled import validation
from nyscaled.lora.adapter import Adapted, Adapter, adapted_class, dropout_of, make_adapter
from nyscaled.lora.inits import Init
from nyscaled.lora.recipe import (
    Recipe,
    kernel_init,
    origin_of,
    require_trainable,
)
from nyscaled.lora.view import (
    ADAPTABLE,
    LINEAR,
    Layer,
    is_quantized,
    kernel_of,
    unstacked_view,
    view_of,
)
from nyscaled.transforms.leaf_names import parse


def dotted(path: tuple[Any, ...]) -> str:
    """Return a module's path as one string: `layers.0.self_attn.q_proj`."""
    return ".".join(map(str, path))


def adapted_layers(model: nnx.Module) -> dict[str, Any]:
    """Return the layers of a model that carry adapters, by path.

    Examples:
        >>> model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
        >>> _ = apply(model, 2, targets=".*", key=jax.random.key(0))
        >>> list(adapted_layers(model))
        ['layers.0']
    """
    return {dotted(p): m for p, m in nnx.iter_modules(model) if isinstance(m, Adapted)}


def require_name(layers: Mapping[str, Any], name: str | None) -> None:
    """Raise ValueError unless some layer has an adapter of that name.

    Args:
        layers: layers with adapters, by path.
        name: name of the set; None accepts any name.
    """
    names = sorted({n for layer in layers.values() for n in layer.adapters})
    if not names or (name is not None and name not in names):
        known = names or "none (of `apply` or `load_peft`)"
        raise ValueError(f"adapter is {name!r}; the model has {known}")


def is_tied(model: Any) -> bool:
    """Return whether a model of `nyscaled.models` has its embedding as head; False for others."""
    return hasattr(model, "untie") and model.config.tie_word_embeddings


def _matching(
    model: nnx.Module, ranks: Mapping[str, int], embeddings: bool
) -> dict[str, tuple[Any, int]]:
    """The layers that the patterns match, each with the rank of the first that does."""
    types = ADAPTABLE if embeddings else LINEAR
    modules = {dotted(p): m for p, m in nnx.iter_modules(model) if p}
    layers = {p: m for p, m in modules.items() if isinstance(m, types)}
    matching: dict[str, tuple[Any, int]] = {}
    for pattern, rank in ranks.items():
        try:
            paths = [path for path in layers if re.fullmatch(pattern, path)]
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if not paths:
            raise ValueError(
                f"the pattern {pattern!r} matches {_what_matches(model, modules, pattern)}; "
                "expected (as a whole) a path of an nnx.Linear, LinearGeneral or Einsum, such as "
                f"{', '.join(list(layers)[:8]) or 'none here'}"
            )
        for path in paths:
            matching.setdefault(path, (layers[path], rank))
    return matching


def _what_matches(model: nnx.Module, modules: Mapping[str, Any], pattern: str) -> str:
    """What a pattern that matches no layer matches, for a message."""
    path = next((path for path in modules if re.fullmatch(pattern, path)), None)
    text = "no module" if path is None else f"only {path}, a {type(modules[path]).__name__}"
    if path is not None and isinstance(modules[path], nnx.Embed):
        text += " (pass embeddings=True to adapt it)"
    if pattern == "lm_head" and is_tied(model):
        text += ": the head is the embedding (model.untie() gives it weights of its own)"
    return text


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
    """Put adapters into the layers of an NNX model, in place; the base stays as it is.

    A layer then computes its own output plus s·x·a·b. The factors are `nnx.LoRAParam`, at
    `<layer>.adapters.<name>.lora_a` (in, r) and `lora_b` (r, out), with the axes of a stack
    (`nnx.vmap`, `nnx.scan`) and batch axes in front. Everything is checked before anything is
    changed.

    Args:
        model: any NNX model. Layers that can carry adapters are `nnx.Linear`,
            `nnx.LinearGeneral`, `nnx.Einsum` and, with `embeddings`, `nnx.Embed`.
        rank: r, the number of columns of the factors.
        alpha: α, for s = α/r. None is α = r, so that s = 1 (s = √r if rank-stabilized).
        targets: a regular expression for whole module paths (`.*(q_proj|v_proj)`), or a mapping
            from such expressions to ranks. The first that matches a layer counts.
        init: a name in `KERNEL_INITS`, or a function like those there. For an init from gradients
            call `initialize` afterwards.
        key: PRNG key, from which a key per layer is folded by the layer's path.
        name: name of this set of adapters. A model may hold several sets.
        rank_stabilized: whether s = α/√r in place of α/r.
        dropout: rate in [0, 1) of dropout on the adapter's input; off in `model.eval()`.
        dtype: dtype of the factors; it need not be that of the base.
        embeddings: whether patterns also match layers of type `nnx.Embed`. Their adapters change
            the lookup of tokens, without dropout, and not a head that shares their weights.
        **options: options of the init: `scale` (ξ), `sketch` and `side` of NoRA, `niter` of PiSSA,
            `distribution` of LoRA.

    Returns:
        The layers that were adapted, by path.

    Raises:
        ValueError: on a pattern that is not an expression or matches nothing, a rank above a
            layer's sides, a name in use, an unknown init, a dtype that is not floating, and a
            kernel that is not floating (quantized, say), not finite, only a shape, or, for starts
            from the kernel, zero.

    Examples:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.relu)
        >>> list(apply(model, rank=2, targets=r"layers\\.0", key=jax.random.key(0)))
        ['layers.0']
        >>> model.layers[0].adapters["default"].lora_b.shape
        (2, 8)
    """
    if not isinstance(targets, str | Mapping) or not targets:
        raise ValueError(
            f"targets is {targets!r}; expected a regular expression for whole paths, such as "
            "'.*(q_proj|v_proj)', or a mapping from such expressions to ranks"
        )
    ranks = {targets: rank} if isinstance(targets, str) else dict(targets)
    validation.require_scalar("dropout", dropout, 0, 1, open_low=False)
    if dropout == 1:
        raise ValueError("dropout is 1, with which nothing is left; expected a rate in [0, 1)")
    if alpha is not None:
        validation.require_positive("alpha", alpha)
    require_new_name(name)
    key, dtype = validation.require_key("key", key), floating(dtype)
    layers = {
        path: (layer, require_room(path, layer, r, name))
        for path, (layer, r) in _matching(model, ranks, embeddings).items()
    }
    draw, origin = kernel_init(init), origin_of(init, options, key)
    recipes = {
        path: Recipe(draw, origin.init[1], r, float(alpha or r), rank_stabilized, dtype)
        for path, (_, r) in layers.items()
    }
    weights = {
        path: recipes[path].draw_for(layer, path, key) for path, (layer, _) in layers.items()
    }
    adapters = {
        path: make_adapter(
            path,
            layer,
            weights[path],
            origin,
            alpha=recipes[path].alpha,
            rank_stabilized=rank_stabilized,
            dropout=dropout_of(dropout, key, path, view_of(layer).stack),
        )
        for path, (layer, _) in layers.items()
    }
    require_trainable(weights)
    return attach({path: layer for path, (layer, _) in layers.items()}, adapters, name)


def attach(layers: Mapping[str, Any], adapters: Mapping[str, Adapter], name: str) -> dict[str, Any]:
    """Give each layer its adapter, and the class that uses it.

    Args:
        layers: layers by path.
        adapters: their adapters, by the same paths.
        name: name of the set.

    Returns:
        The layers that have new adapters, by path.
    """
    for path, adapter in adapters.items():
        layer = layers[path]
        if not isinstance(layer, Adapted):
            layer.adapters = nnx.Dict({})
            layer.__class__ = adapted_class(type(layer))
        layer.adapters[name] = adapter
    return {path: layers[path] for path in adapters}


def require_new_name(name: str) -> None:
    """Raise ValueError unless `name` can be the name of a set of adapters."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"name is {name!r}; expected letters, digits and underscores")
    if hasattr(nnx.Dict, name):  # its entries are attributes, beside its methods
        raise ValueError(f"name is {name!r}, which nnx.Dict has already; expected another")


def floating(dtype: Any) -> Any:
    """Return the dtype that factors are asked to have, from any of its names.

    Raises:
        ValueError: if it is not a floating one, or float64 without JAX's 64-bit mode.
    """
    try:
        known = jnp.dtype(dtype) if dtype is not None else None
    except TypeError:
        known = None
    sound = known is not None and jnp.issubdtype(known, jnp.floating)
    if not sound or jax.dtypes.canonicalize_dtype(known) != known:
        raise ValueError(
            f"dtype is {dtype!r}; expected a floating one, float64 only with jax_enable_x64"
        )
    return known


def require_room(path: str, layer: Layer, rank: int, name: str) -> int:
    """Return the rank; ValueError unless the layer can have an adapter of this rank and name.

    Args:
        path: path of the layer, for messages.
        layer: the layer.
        rank: r.
        name: name of the set of adapters.
    """
    names = [parse((attribute,)) for attribute in vars(layer)]
    of_qwix = any(n is not None and n.convention.library == "qwix" for n in names)
    if isinstance(layer, nnx.LoRALinear) or of_qwix:
        raise ValueError(
            f"{path} has adapters of flax or qwix; expected a plain layer (`initialize` fills "
            "those)"
        )
    if isinstance(layer, Adapted) and name in layer.adapters:
        raise ValueError(
            f"{path} has an adapter named {name!r}; expected another name, or `remove`"
        )
    if is_quantized(kernel_of(layer)):
        raise ValueError(
            f"{path} was quantized by qwix, which reads every product of the model; expected a "
            "plain layer: let qwix.LoraProvider put the adapters in, and fill them with "
            "`initialize`"
        )
    view_of(layer)
    try:
        return validation.require_rank(rank, unstacked_view(layer).sides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def remove(model: nnx.Module, name: str | None = None) -> None:
    """Take adapters out of a model; a layer without any has its own class again.

    What `merge` put into the kernels stays there.

    Args:
        model: a model with adapters of `apply` or `load_peft`.
        name: name of the set to remove; None removes all sets.

    Raises:
        ValueError: if there is no such set.

    Examples:
        >>> model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
        >>> _ = apply(model, 2, targets=".*", key=jax.random.key(0))
        >>> remove(model)
        >>> adapted_layers(model)
        {}
    """
    layers = adapted_layers(model)
    require_name(layers, name)
    for layer in layers.values():
        for other in [n for n in layer.adapters if name in (None, n)]:
            del layer.adapters[other]
        if not layer.adapters:
            del layer.adapters
            layer.__class__ = layer.base_class
