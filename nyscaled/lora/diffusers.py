"""Save adapters of Stable Diffusion as diffusers' files, and load them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

import nyscaled
from nyscaled.checkpoints import diffusers_lora
from nyscaled.checkpoints.diffusers_lora import TEXT, UNET
from nyscaled.checkpoints.peft import Saved, Update
from nyscaled.lora import inject, peft, records, updates
from nyscaled.lora.adapter import Adapted, Adapter
from nyscaled.lora.names import resolve
from nyscaled.lora.view import Layer

CLASSES = {UNET: "UNet2DConditionModel", TEXT: "CLIPTextModel"}
WHAT = {UNET: "U-Net", TEXT: "text encoder"}
TO_NAME = resolve(None, nnx.Module())  # module paths are the names in files


def save_diffusers(
    unet: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    text_encoder: nnx.Module | None = None,
    name: str = "default",
) -> None:
    """Write a set of adapters as `pytorch_lora_weights.safetensors`, which diffusers loads.

    Names are PEFT's, which are exact for all layers. The scaling α/r is inside of the second
    factor, so that readers that know no α compute the same; `load_diffusers` undoes it. An adapter
    whose start is subtracted (PiSSA, OLoRA) becomes plain LoRA of twice the rank, as in
    `save_peft`.

    Args:
        unet: a U-Net of `nys.diffusion` with adapters.
        folder: the folder; made if missing. Its file is replaced at the end.
        text_encoder: a text encoder of `nys.diffusion`, or None. The adapters may be in one of the
            two models only.
        name: name of the set.

    Raises:
        ValueError: on another model, a name that neither has an adapter of, an adapter that is
            merged, and entries that are not finite.
        OSError: if the file cannot be written.

    Examples:
        >>> import jax, tempfile, nyscaled as nys
        >>> unet = nnx.Dict(to_q=nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
        >>> _ = nys.lora.apply(unet, 2, targets=".*", key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_diffusers(unet, folder)
        ...     os.listdir(folder)
        ['pytorch_lora_weights.safetensors']
    """
    saved: dict[str, Mapping[str, Update]] = {}
    owners: dict[str, Adapter] = {}
    pointwise: set[str] = set()
    models = _components(unet, text_encoder)
    adapted = {component: inject.adapted_layers(model) for component, model in models.items()}
    every = {f"{c}.{path}": layer for c, own in adapted.items() for path, layer in own.items()}
    inject.require_name(every, name)
    for component, model in models.items():
        layers = {p: layer for p, layer in adapted[component].items() if name in layer.adapters}
        if tables := [path for path, layer in layers.items() if isinstance(layer, nnx.Embed)]:
            raise ValueError(
                f"{component}.{tables[0]} is an embedding; expected linear layers, as only those "
                "have names in diffusers' files"
            )
        adapters = {path: layer.adapters[name] for path, layer in layers.items()}
        for path, adapter in adapters.items():
            if adapter.merged:
                raise ValueError(
                    f"{component}.{path}: {name!r} is merged into the kernel; expected it unmerged"
                )
            updates.sides(f"{component}.{path}", layers[path])
        saved[component], own = peft.own_updates(layers, adapters, TO_NAME, stabilized=False)
        owners |= {f"{component}.{module}": adapter for module, adapter in own.items()}
        is_pointwise = getattr(model, "is_pointwise", None)
        pointwise |= {path for path in layers if is_pointwise and is_pointwise(path)}
    metadata = {"nyscaled": nyscaled.__version__, "starts": records.write(owners)}
    diffusers_lora.write(folder, saved, pointwise=pointwise, metadata=metadata)


def load_diffusers(
    unet: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    text_encoder: nnx.Module | None = None,
    name: str = "default",
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Adapted]:
    """Put the adapters of a file of diffusers, or of kohya's programs, into a U-Net, in place.

    All namings are read, key by key: PEFT's, those of diffusers' scripts, of its attention
    processors and of its text encoders in 2023, and kohya's with its α. α is that of the file: a
    tensor, the metadata of diffusers, or the rank. diffusers only warns of tensors without a layer,
    of one factor without the other, and of missing components in names. Here these are errors, and
    then nothing has been changed.

    Args:
        unet: a U-Net of `nys.diffusion`.
        folder: folder with `pytorch_lora_weights.safetensors`, or a file under any name.
        text_encoder: a text encoder of `nys.diffusion`, required if the file has adapters for it.
        name: name of the new set.
        dtype: a floating dtype, that of the factors.

    Returns:
        The layers that were adapted, by path; those of the text encoder after "text_encoder.".

    Raises:
        ValueError: on a file that is missing, broken, in another form or for another model, on
            adapters of convolutions, and on a name in use.

    Examples:
        >>> import jax, tempfile, nyscaled as nys
        >>> layer = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
        >>> first, second = (nnx.Dict(to_q=nnx.clone(layer)) for _ in range(2))
        >>> _ = nys.lora.apply(first, 2, targets=".*", init="pissa", key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_diffusers(first, folder)
        ...     layers = load_diffusers(second, folder)
        >>> layers["to_q"].adapters["default"].lora_a.shape
        (6, 4)
    """
    inject.require_new_name(name)
    dtype = inject.floating(dtype)
    models = _components(unet, text_encoder)
    owners = {c: peft.named_layers(model, TO_NAME, {}) for c, model in models.items()}
    saved = diffusers_lora.read(folder, {c: modules for c, (_, modules) in owners.items()})
    if lost := saved.keys() - models.keys():
        raise ValueError(f"{folder} has adapters of {', '.join(lost)}; expected the model to pass")
    pending = [
        (
            component,
            owners[component][0],
            _adapters(folder, component, part, *owners[component], name, dtype),
        )
        for component, part in saved.items()
    ]
    attached: dict[str, Adapted] = {}
    for component, layers, adapters in pending:
        prefix = "" if component == UNET else f"{component}."
        of_model = inject.attach(layers, adapters, name)
        attached |= {f"{prefix}{path}": layer for path, layer in of_model.items()}
    return attached


def _components(unet: nnx.Module, text_encoder: nnx.Module | None) -> dict[str, nnx.Module]:
    models = {UNET: unet} if text_encoder is None else {UNET: unet, TEXT: text_encoder}
    for component, model in models.items():
        if not isinstance(model, nnx.Module):
            raise ValueError(
                f"{component} is a {type(model).__name__}; expected a {WHAT[component]}"
            )
        known = getattr(getattr(model, "config_class", None), "class_name", CLASSES[component])
        if known != CLASSES[component]:
            raise ValueError(
                f"{component} is a {type(model).__name__}; expected a {CLASSES[component]}"
            )
    return models


def _adapters(
    folder: str | os.PathLike[str],
    component: str,
    saved: Saved,
    layers: Mapping[str, Layer],
    modules: Mapping[str, list[str]],
    name: str,
    dtype: DTypeLike,
) -> dict[str, Adapter]:
    """Return the adapters of a component."""
    paths = peft.require_match(folder, saved, modules)
    records_of = records.read(saved.metadata.get("starts", "[]"))
    own = {k.removeprefix(f"{component}."): v for k, v in records_of.items()}
    for path in paths:
        inject.require_room(path, layers[path], 1, name)
    return {
        path: peft.to_adapter(path, layers[path], modules[path], saved, own, None, dtype)
        for path in paths
    }
