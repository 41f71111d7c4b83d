"""diffusers' adapter files, `pytorch_lora_weights.safetensors`, in all namings that are in use.

A file holds updates of the modules of a U-Net, of a text encoder, or of both. What is written has
PEFT's names, which are exact for all layers, and the scaling α/r inside of the second factor: many
readers know no α. The scalings are recorded in the metadata, and undone here.

diffusers converts the names of a file by its first key, and only warns of tensors that it then does
not find a module for. Here each key is converted by itself, and what is left over is an error.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from nyscaled.checkpoints import files, swap
from nyscaled.checkpoints.peft import Saved, Update, require_sound
from nyscaled.checkpoints.peft_config import Rules

FILE = "pytorch_lora_weights.safetensors"
UNET, TEXT = "unet", "text_encoder"
TEXT_PREFIX = "text_model."
CONFIG, SCALINGS = "lora_adapter_metadata", "scalings"  # in the metadata

_KEYS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight"),
    re.compile(r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight"),
    # The attention processors of 2023, and the text encoder's attention then.
    re.compile(r"(?P<module>.+?)(\.processor)?(?P<layer>\.to_\w+)_lora\.(?P<side>down|up)\.weight"),
)
# How the text encoder calls its layers that had the U-Net's names in 2023.
_TEXT_LAYERS = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"}
# Of programs beside diffusers; dots of the module became underscores.
_FLAT = re.compile(
    r"lora_(?P<component>unet|te)_(?P<module>.+)\.(?P<side>lora_down\.weight|lora_up\.weight|alpha)"
)
_DOWN = "A", "down", "lora_down.weight"


def write(
    folder: str | os.PathLike[str],
    updates: Mapping[str, Mapping[str, Update]],
    *,
    pointwise: Collection[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter file that diffusers loads.

    Args:
        folder: the folder; made if missing. Other files in it are not changed.
        updates: for each of the components "unet" and "text_encoder", updates by the names of their
            modules.
        pointwise: modules of the U-Net that diffusers has as convolutions with a kernel of one
            pixel.
        metadata: further strings for the file.

    Raises:
        ValueError: on unsound tensors.
        OSError: if the file cannot be written.

    Examples:
        >>> import numpy as np, tempfile
        >>> update = Update(down=np.ones((2, 3), "f"), up=np.ones((4, 2), "f"), alpha=4.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder, {"unet": {"mid.to_q": update}})
        ...     saved = read(folder, {"unet": ["mid.to_q"]})["unet"]
        >>> saved.updates["mid.to_q"].alpha, float(saved.updates["mid.to_q"].up[0, 0])
        (4.0, 1.0)
    """
    tensors: dict[str, np.ndarray] = {}
    scalings: dict[str, float] = {}
    for component, of_component in updates.items():
        if not of_component:
            continue
        require_sound(of_component, {})
        for module, update in of_component.items():
            scaling = update.alpha / update.down.shape[0]
            # A narrow dtype may not hold the product, and would round it.
            wide = np.promote_types(update.up.dtype, np.float32)
            with np.errstate(over="ignore"):
                up = (update.up.astype(np.float64) * scaling).astype(wide)
            require_sound({module: update._replace(up=up)}, {})
            prefix = f"{component}.{TEXT_PREFIX if component == TEXT else ''}{module}"
            window = (1, 1) if component == UNET and module in pointwise else ()
            tensors[f"{prefix}.lora_A.weight"] = update.down.reshape(*update.down.shape, *window)
            tensors[f"{prefix}.lora_B.weight"] = up.reshape(*up.shape, *window)
            scalings[f"{component}.{module}"] = scaling or 1.0  # of α = 0 the factor is zero
    header = {"format": "pt", **(metadata or {}), SCALINGS: json.dumps(scalings)}
    with swap.replacing(folder, {}, last=FILE) as staging:
        files.write_tensors(staging / FILE, tensors, header)


def read(
    folder: str | os.PathLike[str], modules: Mapping[str, Collection[str]]
) -> dict[str, Saved]:
    """Return what an adapter file holds, by component.

    Args:
        folder: folder with the file, or the file itself under any name.
        modules: names of the modules that may carry adapters, by component.

    Raises:
        ValueError: on a broken file, on names in another form or of two forms at once, on one
            factor without the other, and on tensors of a convolution with more than one pixel.
    """
    path = files.as_folder(folder)
    path = path if path.is_file() else path / FILE
    return swap.consistent(path.parent, functools.partial(_read, path, modules))


def _read(path: Path, modules: Mapping[str, Collection[str]]) -> dict[str, Saved]:
    if not files.exists(path):
        raise ValueError(f"there is no {path}; expected a folder with {FILE}, or such a file")
    file = files.open_tensors(path)
    metadata: dict[str, str] = file.metadata() or {}
    flat = {c: {name.replace(".", "_"): name for name in names} for c, names in modules.items()}
    sides: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    prefixes: set[bool] = set()
    for key in file.keys():  # noqa: SIM118  the file is no mapping
        component, module, side, prefixed = _parsed(path, key, flat)
        prefixes.add(prefixed)
        pair = sides.setdefault(component, {}).setdefault(module, {})
        if side in pair:
            raise ValueError(f"{path} has the factor {side} of {component}.{module} twice")
        pair[side] = files.read_tensor(file, path, key)
    if not sides:
        raise ValueError(f"{path} has no tensors; expected an adapter")
    if len(prefixes) > 1:
        raise ValueError(
            f"{path} has names with a component in front (unet., text_encoder.) and names without; "
            "expected one of the two"
        )
    return {c: _saved(path, c, pairs, metadata) for c, pairs in sides.items()}


def _parsed(
    path: Path, key: str, flat: Mapping[str, Mapping[str, str]]
) -> tuple[str, str, str, bool]:
    """Return component, module and side of a key, and whether it has its component in front."""
    if match := _FLAT.fullmatch(key):
        component = UNET if match["component"] == "unet" else TEXT
        name = match["module"].removeprefix("text_model_" if component == TEXT else "")
        module = flat.get(component, {}).get(name)
        if module is None:
            raise ValueError(f"{path} has {files.brief(key)}, for which the model has no layer")
        side = "alpha" if match["side"] == "alpha" else "A" if match["side"] in _DOWN else "B"
        return component, module, side, True
    match = next((m for m in (form.fullmatch(key) for form in _KEYS) if m), None)
    if match is None or key.startswith("base_model."):
        raise ValueError(
            f"{path} has {files.brief(key)}, which is not a name of an adapter of diffusers or "
            "kohya (folders of PEFT are read by `load_peft`)"
        )
    layer = match.groupdict().get("layer") or ""
    if match["module"].startswith(f"{TEXT}."):
        layer = _TEXT_LAYERS.get(layer, layer)
    module = match["module"] + layer
    module = f"{module}.0" if module.endswith(".to_out") else module
    component, dot, rest = module.partition(".")
    if component == "text_encoder_2":
        raise ValueError(f"{path} has {files.brief(key)}, of SDXL, which is not supported")
    side = "A" if match["side"] in _DOWN else "B"
    if dot and component == TEXT:
        return TEXT, rest.removeprefix(TEXT_PREFIX), side, True
    return (UNET, rest, side, True) if component == UNET else (UNET, module, side, False)


def _saved(
    path: Path,
    component: str,
    pairs: Mapping[str, Mapping[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> Saved:
    """Return the updates of a component, each with the α that the file says."""
    rules = _rules(path, component, metadata)
    scalings = _scalings(path, metadata)
    updates: dict[str, Update] = {}
    for module, pair in pairs.items():
        what = f"{component}.{module}"
        if not {"A", "B"} <= pair.keys():
            raise ValueError(f"{path} has only {', '.join(sorted(pair))} of {what}; expected A, B")
        down, up = (_matrix(path, what, pair[side]) for side in "AB")
        rank, scaling = max(len(down), 1), scalings.get(what)
        if "alpha" in pair:
            alpha = float(pair["alpha"].reshape(-1)[0]) if pair["alpha"].size == 1 else math.nan
        elif scaling is not None:
            alpha, up = scaling * rank, (up.astype(np.float64) / scaling).astype(up.dtype)
        else:
            alpha = float(rules.alpha(module)) if rules else float(rank)
        if not math.isfinite(alpha):
            raise ValueError(f"{path} has an α of {what} that is not a number; expected one")
        if rules and rules.rank(module) != rank:
            raise ValueError(
                f"{path} has {what} of rank {rank}; expected {rules.rank(module)}, by its metadata"
            )
        updates[module] = Update(down, up, alpha)
    require_sound(updates, {})
    if rules is None:
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(updates)}
        rules = Rules(config)
    stabilized = bool(rules.config.get("use_rslora"))
    return Saved(updates, stabilized, 0.0, rules, dict(metadata), {}, {})


def _matrix(path: Path, what: str, value: np.ndarray) -> np.ndarray:
    if value.ndim < 2:
        raise ValueError(f"{path} has a factor of {what} of shape {value.shape}; expected a matrix")
    if any(length != 1 for length in value.shape[2:]):
        raise ValueError(
            f"{path} has {what} of shape {value.shape}, a convolution with more than one pixel; "
            "only linear layers are adapted here"
        )
    return value.reshape(value.shape[:2])


def _rules(path: Path, component: str, metadata: Mapping[str, str]) -> Rules | None:
    if CONFIG not in metadata:
        return None
    try:
        fields = json.loads(metadata[CONFIG])
        prefix = f"{component}."
        own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
        if component == TEXT:
            own = {name: _unprefixed(value) for name, value in own.items()}
        return Rules({"peft_type": "LORA", **own}) if own else None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}, {CONFIG}: {files.brief(error)}") from None


def _unprefixed(value: object) -> object:
    """Omit what names of transformers 4 begin with, also inside of expressions."""
    if isinstance(value, str):
        return re.sub(r"text_model\\?\.", "", value)
    if isinstance(value, list):
        return [_unprefixed(x) for x in value]
    return {_unprefixed(k): x for k, x in value.items()} if isinstance(value, dict) else value


def _scalings(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    try:
        scalings = json.loads(metadata.get(SCALINGS, "{}"))
        sound = {k: float(v) for k, v in scalings.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        sound = {"": math.nan}
    if not all(math.isfinite(v) and v != 0 for v in sound.values()):
        raise ValueError(f"{path} has metadata {SCALINGS!r} that are not what is written here")
    return sound
