"""Save adapters as PEFT's folders, and load them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

import nyscaled
from nyscaled.checkpoints import peft
from nyscaled.lora import foreign, inject, records, updates, whole_modules
from nyscaled.lora.adapter import Adapter, dropout_of, make_adapter
from nyscaled.lora.names import Namer, Names, resolve
from nyscaled.lora.recipe import Origin
from nyscaled.lora.view import ADAPTABLE, Layer, view_of


def save_peft(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str],
    name: str = "default",
    names: Names = None,
    modules_to_save: Sequence[str] | None = (),
    task_type: str | None = None,
    alpha: float | None = None,
) -> None:
    """Write a set of adapters as a folder that PEFT, and what reads its format, can load.

    A stack is written as its layers. Layers of it, and columns, of which both factors are zero are
    left out: `load_peft` makes them where a file has fewer. An adapter whose start is subtracted
    (PiSSA, OLoRA) becomes plain LoRA of twice the rank, [a, a₀] and [b; −b₀], with the same
    scaling. The metadata of the safetensors file records each layer's init, its options and its
    key. Which adapters are active is not saved. Factors keep their dtype.

    Args:
        model: a model with adapters.
        folder: the folder; made if missing. Its two files are replaced together.
        base_model: hub id or path of the base, which PEFT's `AutoPeftModel` looks up.
        name: name of the set.
        names: what PEFT's model calls the layers. None asks the model (its method `layer_name`,
            which those of `nys.models` have), and stands for the model's own dotted paths where
            it has none. Otherwise a mapping from those paths, with `{}` for the position in a
            stack, or a function `(path, index) -> name`, which raises ValueError on a path that it
            does not know, such as `nys.models.Llama.family.layer_name`. `index` is `()` outside
            of stacks.
        modules_to_save: paths of layers that were trained themselves (a new head, an embedding,
            norms), or of modules that hold such layers, to be saved whole. PEFT takes an end of a
            name for the name (`head` for `pre_head`): such layers are saved too. Biases of adapted
            layers (PEFT's `bias`) are not saved.
        task_type: PEFT's name of the task, such as "CAUSAL_LM", or None. For "SEQ_CLS", "TOKEN_CLS"
            and "QUESTION_ANS" PEFT requires the head in the folder, trained or not.
        alpha: α, for s = α/r, of adapters that flax or qwix have put in, which are saved too. None
            is the α that was passed to `initialize`, or s = 1, which is right for flax.

    Raises:
        ValueError: on an unknown adapter, one that is merged, has batch axes (experts) or entries
            that are not finite; on a path without a name, or one name for two layers; on a module
            to save without weights or with adapters, and a task's head that is not among them; on
            adapters of qwix without `alpha`.

    Examples:
        >>> import jax, tempfile, nyscaled as nys
        >>> model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
        >>> _ = nys.lora.apply(model, 2, targets=".*", key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_peft(model, folder, base_model="mine")
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if isinstance(modules_to_save, str):
        raise ValueError(f"modules_to_save is {modules_to_save!r}; expected a sequence of paths")
    adapted = inject.adapted_layers(model)
    layers = {p: m for p, m in adapted.items() if name in m.adapters}
    others = foreign.find(model, alpha)
    if not others or adapted:
        inject.require_name(adapted, name)
    adapters = {path: layer.adapters[name] for path, layer in layers.items()}
    for path, adapter in adapters.items():
        if adapter.merged:
            raise ValueError(f"{path}: {name!r} is merged into the kernel; expected it unmerged")
        updates.sides(path, layers[path])
    stabilized = not others and all(
        a.rank_stabilized and a.start is None for a in adapters.values()
    )
    to_name = resolve(names, model)
    saved, owners = own_updates(layers, adapters, to_name, stabilized)
    for other in others:
        _add_foreign(saved, other, to_name)
    peft.write(
        folder,
        saved,
        base_model=base_model,
        others=_other_names(model, to_name, saved),
        whole=whole_modules.tensors(model, modules_to_save or (), to_name),
        rank_stabilized=stabilized,
        # One field for all layers, which matters in training only.
        dropout=max((a.dropout.rate for a in adapters.values() if a.dropout), default=0.0),
        task_type=task_type,
        metadata={"nyscaled": nyscaled.__version__, "starts": records.write(owners)},
    )


def own_updates(
    layers: Mapping[str, Any], adapters: Mapping[str, Adapter], to_name: Namer, stabilized: bool
) -> tuple[dict[str, peft.Update], dict[str, Adapter]]:
    """The updates of adapters of `apply`, and the adapter of each, by PEFT's names."""
    saved: dict[str, peft.Update] = {}
    owners: dict[str, Adapter] = {}
    for path, adapter in adapters.items():
        modules = {to_name(path, index): index for index in np.ndindex(adapter.stack)}
        if len(modules) < math.prod(adapter.stack) or not owners.keys().isdisjoint(modules):
            raise ValueError(f"{path}: its name {next(iter(modules))!r} is another layer's already")
        of_path = updates.to_updates(layers[path], adapter, modules, stabilized)
        saved |= of_path
        owners |= dict.fromkeys(of_path, adapter)
    return saved, owners


def _other_names(model: nnx.Module, to_name: Namer, saved: Mapping[str, peft.Update]) -> set[str]:
    """What PEFT calls the layers of which nothing is saved."""
    layers = ((inject.dotted(parts), layer) for parts, layer in nnx.iter_modules(model))
    names = (_names(path, layer, to_name) for path, layer in layers)
    return {name for of_layer in names for name in of_layer} - saved.keys()


def _names(path: str, layer: nnx.Module, to_name: Namer) -> list[str]:
    """What PEFT calls the matrices of a layer; none if it cannot carry adapters or has no name."""
    if not isinstance(layer, ADAPTABLE):
        return []
    try:
        return [to_name(path, index) for index in np.ndindex(view_of(layer).stack)]
    except ValueError:
        return []


def _add_foreign(saved: dict[str, peft.Update], other: foreign.Foreign, to_name: Namer) -> None:
    """Add the updates of an adapter of flax or qwix."""
    a, b = other.matrices()
    for index in np.ndindex(a.shape[:-2]):
        module = to_name(other.path, index)
        if module in saved:
            raise ValueError(f"{other.path}: its name {module!r} is another layer's already")
        saved[module] = peft.Update(a[index].T, b[index].T, other.scaling * a.shape[-1])


def load_peft(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    names: Names = None,
    key: Key[Array, ""] | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, Any]:
    """Put the adapter of a PEFT folder into the layers of a model, in place.

    Modules that were saved whole, and what PEFT saves of the base (embeddings, rows of tokens,
    heads, biases), replace those of the model, for all its adapters. `save_peft` then writes of
    them only what its `modules_to_save` names, and no biases of adapted layers, which
    `nys.models.save` keeps after `merge` and `remove`. A head that is the embedding gets its own
    weights where PEFT would separate the two. PEFT only warns of a tensor without a layer and of a
    targeted layer without tensors. Here these are errors, as is a configuration of more than plain
    LoRA, and then nothing has been changed.

    The layers of a stack share one rank and one scaling. Layers that the file leaves out get zero
    factors, smaller ranks get zero columns, and other scalings go into b. Zero factors and columns
    do not change in training.

    Args:
        model: the base.
        folder: a folder on disk with `adapter_model.safetensors` and `adapter_config.json`.
        name: name of the new set.
        names: what PEFT's model calls the layers, as in `save_peft`. Layers without a name are not
            adapted.
        key: PRNG key for dropout at the file's rate, to go on training; None for no dropout.
        dtype: a floating dtype, that of the factors.

    Returns:
        The layers that were adapted, by path.

    Raises:
        ValueError: on files that are missing, broken, of another base or not plain LoRA; on values
            that are not finite in `dtype` or in that of the layer's products; on a name in use; on
            modules saved whole of other shapes than the model's, or with adapters.

    Examples:
        >>> import jax, tempfile, nyscaled as nys
        >>> layer = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
        >>> first, second = (nnx.Sequential(nnx.clone(layer)) for _ in range(2))
        >>> _ = nys.lora.apply(first, 2, targets=".*", init="pissa", key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_peft(first, folder, base_model="mine")
        ...     layers = load_peft(second, folder)
        >>> layers["layers.0"].adapters["default"].lora_a.shape
        (6, 4)
    """
    inject.require_new_name(name)
    dtype = inject.floating(dtype)
    saved = peft.read(folder)
    to_name = resolve(names, model)
    head = whole_modules.own_head(model, saved, to_name)
    layers, modules = named_layers(model, to_name, head)
    paths = require_match(folder, saved, modules)
    replaced = whole_modules.replaced(folder, model, saved, to_name, head)
    origins = records.read(saved.metadata.get("starts", "[]"))
    for path in paths:
        # Twice the rank may exceed the layer's sides, so the rank is not checked here.
        inject.require_room(path, layers[path], 1, name)
    adapters = {
        path: to_adapter(path, layers[path], modules[path], saved, origins, key, dtype)
        for path in paths
    }
    for variable, value in replaced:
        variable[...] = value
    for layer in head.values():
        model.untie(layer)  # pyright: ignore[reportAttributeAccessIssue]
    return inject.attach(layers, adapters, name)


def require_match(
    folder: str | os.PathLike[str], saved: peft.Saved, modules: Mapping[str, Sequence[str]]
) -> list[str]:
    """The paths of the layers that have tensors in a folder.

    Raises:
        ValueError: on tensors without a layer, and on layers that should have tensors.
    """
    owners = {module: path for path, of_path in modules.items() for module in of_path}
    if strangers := [module for module in saved.updates if module not in owners]:
        raise ValueError(
            f"{folder} has tensors of {', '.join(strangers[:4])}, which no layer of the model is "
            f"called; it has {', '.join(list(owners)[:4]) or 'none with names'} (see `names`)"
        )
    paths = [p for p, of_path in modules.items() if not saved.updates.keys().isdisjoint(of_path)]
    for module, path in owners.items():
        targeted = saved.rules.is_targeted(module)
        expected = path in paths if targeted is None else targeted
        if expected and module not in saved.updates:
            raise ValueError(f"{folder} has no tensors of {module}, the layer {path}")
    return paths


def to_adapter(
    path: str,
    layer: Layer,
    modules: Sequence[str],
    saved: peft.Saved,
    origins: Mapping[str, Origin],
    key: Key[Array, ""] | None,
    dtype: DTypeLike,
) -> Adapter:
    """The adapter of a layer, whose matrices PEFT calls `modules`."""
    of_layer = [saved.updates.get(module) for module in modules]
    stabilized = saved.rank_stabilized
    weights, alpha = updates.from_updates(path, layer, of_layer, stabilized, dtype)
    return make_adapter(
        path,
        layer,
        weights,
        next((origins[module] for module in modules if module in origins), records.UNKNOWN),
        alpha=alpha,
        rank_stabilized=stabilized,
        dropout=dropout_of(saved.dropout, key, path, view_of(layer).stack),
    )


def named_layers(
    model: nnx.Module, to_name: Namer, head: Mapping[str, Any]
) -> tuple[dict[str, Layer], dict[str, list[str]]]:
    """The layers of a model and a new head that have names, and what PEFT calls their matrices."""
    layers, modules, owners = {}, {}, {}
    of_model = [(inject.dotted(parts), layer) for parts, layer in nnx.iter_modules(model)]
    for path, layer in [*of_model, *head.items()]:
        names = _names(path, layer, to_name)
        for module in names:
            if owners.setdefault(module, path) != path:
                raise ValueError(f"{path} and {owners[module]} have the same name, {module!r}")
        if names:
            layers[path], modules[path] = layer, names
    return layers, modules
