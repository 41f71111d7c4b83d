"""PEFT's adapter folders: `adapter_model.safetensors` and `adapter_config.json`.

A folder holds an update α/r · up @ down (α/√r, if rank-stabilized) for each of some modules of a
base model, and whole modules that were trained beside them (`modules_to_save`), such as heads. PEFT itself only warns where a tensor has no module or a module no tensor, and then
computes something else; here whatever cannot be read as just that update is an error.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from nyscaled.checkpoints import files

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Tasks for which PEFT itself adds the head to `modules_to_save`, and then needs its tensors.
HEADED = "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"
TASKS = "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_WHOLE = re.compile(r"base_model\.model\.(?P<name>(?P<module>.+)\.(?:weight|bias))")

# What is read of a configuration (lora/config.py of PEFT 0.21 says what each field means).
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "bias", "init_lora_weights"),
    "modules_to_save",
}
# What has no bearing on a saved update: where it came from, PEFT's bookkeeping, options of starts
# (`init_lora_weights` decides on those) and of variants that are refused by their own switch.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "megatron_core", "qalora_group_size"),
}
# Starts that leave the base weights alone. With the others (PiSSA, OLoRA, CorDA, LoftQ) PEFT
# changes the base as it loads the adapter, so that the file alone does not say the update.
_STARTS = True, False, None, "gaussian", "eva", "orthogonal"


class Update(NamedTuple):
    """The update of one module, in torch's layout.

    Attributes:
        down: `lora_A.weight`, (r, in).
        up: `lora_B.weight`, (out, r).
        alpha: α.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float


class Saved(NamedTuple):
    """What a folder holds.

    Attributes:
        updates: by module name.
        rank_stabilized: whether the scaling is α/√r.
        dropout: rate in training.
        config: the configuration file, for `is_targeted`.
        metadata: of the safetensors file.
        whole: `<module>.weight` and `<module>.bias` of modules that are saved whole.
    """

    updates: dict[str, Update]
    rank_stabilized: bool
    dropout: float
    config: dict[str, Any]
    metadata: dict[str, str]
    whole: dict[str, np.ndarray]


def write(
    folder: str | os.PathLike[str],
    updates: Mapping[str, Update],
    *,
    base_model: str,
    whole: Mapping[str, np.ndarray] | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    task_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter folder that PEFT loads.

    Each file is whole whenever it is there, and never beside another adapter's. A process that is
    killed may leave a hidden folder `.writing-…`, which may be deleted, and no configuration.

    Args:
        folder: made if missing; other files in it are left alone.
        updates: by full module name.
        base_model: name or path of the base, for the reader's information.
        whole: tensors of modules that are saved whole, by full name.
        rank_stabilized: whether the scaling is α/√r.
        dropout: for the record.
        task_type: one of `TASKS`, or None.
        metadata: more strings for the safetensors file.

    Raises:
        ValueError: on unsound tensors, an unknown task, or a task whose head is missing.

    Example:
        >>> import numpy as np, tempfile
        >>> update = Update(down=np.ones((2, 3), "f"), up=np.ones((4, 2), "f"), alpha=2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder, {"layers.0.q_proj": update}, base_model="mine")
        ...     list(read(folder).updates)
        ['layers.0.q_proj']
    """
    if task_type is not None and task_type not in TASKS:
        raise ValueError(f"task_type is {task_type!r}; wanted None or one of {', '.join(TASKS)}")
    if task_type in HEADED and not whole:
        raise ValueError(
            f"task_type is {task_type!r}, for which PEFT reads the head from the adapter's folder; "
            "wanted it in modules_to_save"
        )
    whole = dict(whole or {})
    _require_sound(updates, whole)
    tensors = {f"base_model.model.{name}": value for name, value in whole.items()}
    for module, update in updates.items():
        for side, value in (("A", update.down), ("B", update.up)):
            key = f"base_model.model.{module}.lora_{side}.weight"
            tensors[key] = value
    ranks = {module: update.down.shape[0] for module, update in updates.items()}
    alphas = {module: update.alpha for module, update in updates.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        "use_rslora": rank_stabilized,
        "rank_pattern": {_exactly(m): v for m, v in ranks.items() if v != r},
        "alpha_pattern": {_exactly(m): _number(v) for m, v in alphas.items() if v != alpha},
        "target_modules": sorted(updates),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    metadata = {"format": "pt", **(metadata or {})}
    with files.replacing(folder, {CONFIG: files.as_json(config)}, last=CONFIG) as aside:
        files.write_tensors(aside / TENSORS, tensors, metadata)


def read(folder: str | os.PathLike[str]) -> Saved:
    """Reads an adapter folder, written by PEFT or here.

    Args:
        folder: on disk.

    Returns:
        The updates, whose ranks are those of the tensors and of the configuration.

    Raises:
        ValueError: on a missing or broken file, a key that is not a module's `lora_A.weight` or
            `lora_B.weight` nor of `modules_to_save`, one without the other, tensors and
            configuration that disagree, or a configuration that asks for more.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    tensors, metadata = _read_tensors(folder / TENSORS)
    sides: dict[str, dict[str, np.ndarray]] = {}
    whole = {}
    for key, value in tensors.items():
        if match := _KEY.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = value
        elif (match := _WHOLE.fullmatch(key)) and is_whole(config, match["module"]):
            whole[match["name"]] = value
        else:
            raise ValueError(
                f"{folder / TENSORS} holds {key}; wanted only base_model.model.<module>.lora_A.weight "
                "and .lora_B.weight, and what modules_to_save names"
            )
    for module, pair in sides.items():
        if len(pair) != 2:
            raise ValueError(f"{folder / TENSORS} has only lora_{next(iter(pair))} of {module}")
    alphas = _by_pattern(config, "alpha_pattern", config["lora_alpha"], sides)
    updates = {m: Update(pair["A"], pair["B"], alphas[m]) for m, pair in sides.items()}
    _require_sound(updates, whole)
    ranks = _by_pattern(config, "rank_pattern", config["r"], sides)
    for module, update in updates.items():
        if update.down.shape[0] != ranks[module]:
            raise ValueError(
                f"{module} has tensors of rank {update.down.shape[0]}, and {ranks[module]} in {CONFIG}"
            )
        if is_targeted(config, module) is False:
            raise ValueError(
                f"{folder / TENSORS} has tensors of {module}, which is not among the "
                f"target_modules of {CONFIG}"
            )
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(_matches([target], module) for module in updates):
            raise ValueError(f"{CONFIG} has {target!r} in target_modules, without any tensor")
    stabilized, dropout = bool(config.get("use_rslora")), config.get("lora_dropout") or 0.0
    return Saved(updates, stabilized, float(dropout), config, metadata, whole)


def is_targeted(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether PEFT would adapt the module; None where that depends on the model's classes."""
    targets = config.get("target_modules")
    if targets in (None, "all-linear"):
        return None
    excluded = _matches(config.get("exclude_modules"), module) or is_whole(config, module)
    return _matches(targets, module) and not excluded


def is_whole(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would save the module whole: it, or one that it is in, is in modules_to_save."""
    names = config.get("modules_to_save") or ()
    return any(f".{name}." in f".{module}." for name in names)


def _matches(wanted: Any, module: str) -> bool:
    """PEFT's rule: an expression for the whole name, or a list of names and ends of names."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == w or module.endswith(f".{w}") for w in wanted or ())


def _exactly(module: str) -> str:
    """The pattern for one module alone; PEFT puts `(.*\\.)?` before it and `$` after."""
    return f"^{re.escape(module)}"


def _by_pattern(
    config: Mapping[str, Any], field: str, default: float, modules: Mapping[str, Any]
) -> dict[str, float]:
    """The value of each module: of the first pattern that matches, or the default."""
    patterns = config.get(field) or {}
    used, values = set(), {}
    for module in modules:
        hits = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
        pattern = next(hits, None)
        used.add(pattern)
        values[module] = default if pattern is None else patterns[pattern]
    if unused := sorted(set(patterns) - used):
        raise ValueError(f"{CONFIG} has {unused} in {field}, which apply to none of the modules")
    return values


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _require_sound(updates: Mapping[str, Update], whole: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless there are modules, each with finite (r, in) and (out, r)."""
    if not updates:
        raise ValueError("the adapter has no modules; wanted at least one")
    for module, (down, up, _) in updates.items():
        shapes = f"lora_A {down.shape} and lora_B {up.shape}"
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            raise ValueError(f"{module} has {shapes}; wanted (r, in) and (out, r)")
    values = [(module, value) for module, update in updates.items() for value in update[:2]]
    for module, value in [*values, *whole.items()]:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{module} has {value.dtype} tensors; wanted floating ones")
        if not np.isfinite(value).all():
            raise ValueError(f"{module} has NaN or Inf in its tensors; wanted finite ones")


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        why = " (adapter_model.bin is a pickle, which can run code: not read)" if pickled else ""
        raise ValueError(f"there is no {path}{why}; wanted a folder with {CONFIG} and {TENSORS}")
    file = files.open_tensors(path)
    tensors = {key: files.read_tensor(file, path, key) for key in file.keys()}  # noqa: SIM118
    return tensors, file.metadata() or {}


def _read_config(path: Path) -> dict[str, Any]:
    config = files.read_object(path, f"a folder with {CONFIG} and {TENSORS}")
    try:
        _require_supported(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _require_supported(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the configuration is of a plain LoRA update, soundly typed."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}; wanted 'LORA'")
    for field, value in config.items():
        # Zero is a value here: `layers_to_transform: 0` is the first layer.
        off = value is None or value is False or value in ("", [], {})
        if not off and field not in _READ | _WITHOUT_EFFECT:
            raise ValueError(f"{field} is {value!r}; only plain LoRA is supported, without it")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias is {config['bias']!r}; wanted 'none'")
    if config.get("init_lora_weights", True) not in _STARTS:
        raise ValueError(
            f"init_lora_weights is {config['init_lora_weights']!r}, with which the update depends "
            "on the base; wanted an adapter that PEFT converted to plain LoRA as it saved it "
            "(`path_initial_model_for_weight_conversion`)"
        )
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"use_rslora is {config['use_rslora']!r}; wanted true or false")
    ranks, alphas = (config.get(f"{field}_pattern") or {} for field in ("rank", "alpha"))
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise ValueError("rank_pattern and alpha_pattern: wanted objects")
    for rank in (config.get("r"), *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"a rank is {rank!r}; wanted a positive integer in r, rank_pattern")
    numbers: list[Any] = [config.get("lora_alpha"), *alphas.values()]
    for number in (*numbers, config.get("lora_dropout") or 0.0):
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(
                f"a number is {number!r}; wanted a finite one in lora_alpha, alpha_pattern, lora_dropout"
            )
    for field in ("target_modules", "exclude_modules"):
        value = config.get(field)
        sound = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not (value is None or isinstance(value, str) or sound):
            raise ValueError(f"{field} is {value!r}; wanted a list of strings, a string or null")
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"modules_to_save is {names!r}; wanted a list of strings or null")
    expressions = [
        v for v in (config.get("target_modules"), config.get("exclude_modules")) if type(v) is str
    ]
    for expression in (*ranks, *alphas, *expressions):
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{expression!r} is not a regular expression: {error}") from error
