"""PEFT's adapter folders: `adapter_model.safetensors` and `adapter_config.json`.

A folder holds an update α/r · up @ down (α/√r, if rank-stabilized) for each of some modules of a
base model. It may hold whole modules that were trained beside these (`modules_to_save`), such as
heads, and tensors of the base that PEFT also saves (embeddings, heads, biases). PEFT itself only
warns of a tensor without a module and of a module without tensors, and then computes something
else. Here all that cannot be read as just that update is an error.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from nyscaled.checkpoints import files, swap
from nyscaled.checkpoints.peft_config import CONFIG, Rules, ends, is_inside

TENSORS = "adapter_model.safetensors"
MAX_KEY = 500  # characters of a tensor's name, which messages repeat
# Tasks for which PEFT itself adds the head to `modules_to_save`, and then needs its tensors.
HEADED = "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"
TASKS = "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<row>[AB]))"
)
# With embeddings, PEFT saves what is inside its own wrappers too.
_WHOLE = re.compile(
    r"base_model\.model\.(?P<module>.+?)"
    r"(?:\.(?P<wrapper>base_layer|modules_to_save|original_module))?\.(?P<end>weight|bias)"
)
_TOKENS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


T = TypeVar("T")


class Update(NamedTuple):
    """The update of one module, in torch's layout.

    Attributes:
        down: `lora_A.weight`, (r, in); of an embedding `lora_embedding_A`, (r, tokens).
        up: `lora_B.weight`, (out, r); of an embedding `lora_embedding_B`, (width, r).
        alpha: α.
        embedding: whether the module is an embedding.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float
    embedding: bool = False


class Saved(NamedTuple):
    """What a folder holds.

    Attributes:
        updates: updates by the names of their modules.
        rank_stabilized: whether the scaling is α/√r.
        dropout: rate of dropout in training.
        rules: which modules the configuration means.
        metadata: metadata of the safetensors file.
        whole: `<module>.weight` and `<module>.bias` of the base, and of modules saved whole.
        tokens: by module, the rows of an embedding that were trained themselves.
    """

    updates: dict[str, Update]
    rank_stabilized: bool
    dropout: float
    rules: Rules
    metadata: dict[str, str]
    whole: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]


def write(
    folder: str | os.PathLike[str],
    updates: Mapping[str, Update],
    *,
    base_model: str | os.PathLike[str],
    others: Collection[str] = (),
    whole: Mapping[str, np.ndarray] | None = None,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    task_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter folder that PEFT loads.

    The two files are replaced together. If the process is killed, the next reader of the folder
    finds the old adapter or the new one (`nyscaled.checkpoints.swap`).

    Args:
        folder: the folder; made if missing. Other files in it are not changed.
        updates: updates by the full names of their modules.
        base_model: name or path of the base, which PEFT may look up.
        others: names of the modules without updates. PEFT takes an end of a name for the name, and
            so the configuration excludes modules whose names end with that of an updated one.
        whole: tensors of modules that are saved whole, by full name.
        rank_stabilized: whether the scaling is α/√r.
        dropout: rate of dropout, which the configuration records.
        task_type: one of `TASKS`, or None.
        metadata: further strings for the safetensors file.

    Raises:
        ValueError: on unsound tensors, an unknown task, a task whose head is missing, or an update
            of a module that is saved whole.

    Examples:
        >>> import numpy as np, tempfile
        >>> update = Update(down=np.ones((2, 3), "f"), up=np.ones((4, 2), "f"), alpha=2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder, {"layers.0.q_proj": update}, base_model="mine")
        ...     list(read(folder).updates)
        ['layers.0.q_proj']
    """
    if task_type is not None and task_type not in TASKS:
        raise ValueError(f"task_type is {task_type!r}; expected None or one of {', '.join(TASKS)}")
    if task_type in HEADED and not whole:
        raise ValueError(
            f"task_type is {task_type!r}, for which PEFT reads the head from the adapter's folder; "
            "expected it in modules_to_save"
        )
    whole = dict(whole or {})
    require_sound(updates, whole)
    modules_to_save = {name.rpartition(".")[0] for name in whole}
    if lost := sorted(module for module in updates if is_inside(module, modules_to_save)):
        raise ValueError(
            f"{lost[0]} of modules_to_save has an adapter, or is inside of what has the name of a "
            "module there, and PEFT leaves its update out; expected one of the two"
        )
    rank, rank_pattern = _commonest({m: u.down.shape[0] for m, u in updates.items()})
    alpha, alpha_pattern = _commonest({m: _number(u.alpha) for m, u in updates.items()})
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": (
            os.fspath(base_model) if isinstance(base_model, os.PathLike) else base_model
        ),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rank_stabilized,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(updates),
        "modules_to_save": sorted(modules_to_save) or None,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    if excluded := sorted(m for m in others if not updates.keys().isdisjoint(ends(m))):
        config["exclude_modules"] = excluded
    metadata = {"format": "pt", **(metadata or {})}
    with swap.replacing(folder, {CONFIG: files.as_json(config)}, last=CONFIG) as staging:
        files.write_tensors(staging / TENSORS, _named_tensors(updates, whole), metadata)


def _named_tensors(
    updates: Mapping[str, Update], whole: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors of a folder, by PEFT's names."""
    tensors = {f"base_model.model.{name}": value for name, value in whole.items()}
    for module, update in updates.items():
        for side, value in (("A", update.down), ("B", update.up)):
            end = f"lora_embedding_{side}" if update.embedding else f"lora_{side}.weight"
            tensors[f"base_model.model.{module}.{end}"] = value
    return tensors


def _commonest(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The commonest of the values of modules, and the other values by patterns for the modules."""
    commonest = Counter(values.values()).most_common(1)[0][0]
    return commonest, {_exactly(m): v for m, v in values.items() if v != commonest}


def read(folder: str | os.PathLike[str]) -> Saved:
    """Read an adapter folder that PEFT or `write` has written.

    Args:
        folder: a folder on disk.

    Returns:
        What the folder holds, all of one save. Ranks of tensors agree with the configuration.

    Raises:
        ValueError: on a missing or broken file, an unknown key, one factor without the other,
            tensors and configuration that disagree, or a configuration of more than plain LoRA.
    """
    path = files.as_folder(folder)
    return swap.consistent(path, functools.partial(_read, path))


def _read(folder: Path) -> Saved:
    rules = _read_rules(folder / CONFIG)
    tensors, metadata = _read_tensors(folder / TENSORS)
    sides: dict[str, dict[str, np.ndarray]] = {}
    whole, tokens, embeddings = {}, {}, set()
    for key, value in tensors.items():
        if match := _KEY.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"] or match["row"]] = value
            embeddings |= {match["module"]} if match["row"] else set()
        elif match := _TOKENS.fullmatch(key):
            tokens[match["module"]] = value
        elif match := _WHOLE.fullmatch(key):
            if match["wrapper"] == "original_module" and rules.is_whole(match["module"]):
                continue  # what the adapter does not use
            name = f"{match['module']}.{match['end']}"
            if name in whole and not np.array_equal(whole[name], value):
                raise ValueError(f"{folder / TENSORS} holds {name} twice, with other values")
            whole[name] = value
        else:
            raise ValueError(
                f"{folder / TENSORS} holds {key}; expected only base_model.model.<module>"
                ".lora_A.weight and .lora_B.weight (or lora_embedding_A and B), and whole weights "
                "and biases"
            )
    for module, pair in sides.items():
        if len(pair) != 2:
            raise ValueError(f"{folder / TENSORS} has only lora_{next(iter(pair))} of {module}")
    updates = {
        m: Update(pair["A"], pair["B"], rules.alpha(m), m in embeddings)
        for m, pair in sides.items()
    }
    require_sound(updates, whole | tokens)
    _require_configured(folder, updates, rules)
    stabilized = bool(rules.config.get("use_rslora"))
    dropout = float(rules.config.get("lora_dropout") or 0.0)
    return Saved(updates, stabilized, dropout, rules, metadata, whole, tokens)


def _require_configured(folder: Path, updates: Mapping[str, Update], rules: Rules) -> None:
    """Raise ValueError unless the updates have the ranks and targets of the configuration."""
    for module, update in updates.items():
        if update.down.shape[0] != rules.rank(module):
            raise ValueError(
                f"{module} has tensors of rank {update.down.shape[0]}, and {rules.rank(module)} in "
                f"{CONFIG}"
            )
        if rules.is_targeted(module) is False:
            raise ValueError(
                f"{folder / TENSORS} has tensors of {module}, which is not among the "
                f"target_modules of {CONFIG}"
            )


def _exactly(module: str) -> str:
    """The pattern of a single module; PEFT puts `(.*\\.)?` before it and `$` after."""
    return f"^{re.escape(module)}"


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def require_sound(updates: Mapping[str, Update], whole: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless there are modules, each with finite (r, in) and (out, r)."""
    if not updates:
        raise ValueError("the adapter has no modules; expected at least one")
    for module, (down, up, *_) in updates.items():
        shapes = f"lora_A {down.shape} and lora_B {up.shape}"
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            raise ValueError(f"{module} has {shapes}; expected (r, in) and (out, r)")
    values = [(module, value) for module, update in updates.items() for value in update[:2]]
    for module, value in [*values, *whole.items()]:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{module} has {value.dtype} tensors; expected floating ones")
        if not np.isfinite(value).all():
            raise ValueError(f"{module} has NaN or Inf in its tensors; expected finite ones")


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not files.exists(path):
        pickled = path.with_suffix(".bin").is_file()
        why = " (adapter_model.bin is a pickle, which can run code: not read)" if pickled else ""
        raise ValueError(f"there is no {path}{why}; expected a folder with {CONFIG} and {TENSORS}")
    file = files.open_tensors(path)
    keys = list(file.keys())
    if (longest := max(map(len, keys), default=0)) > MAX_KEY:
        raise ValueError(f"{path} has a name of {longest} characters; expected at most {MAX_KEY}")
    tensors = {key: files.read_tensor(file, path, key) for key in keys}
    return tensors, file.metadata() or {}


def _read_rules(path: Path) -> Rules:
    config = files.read_object(path, f"a folder with {CONFIG} and {TENSORS}")
    try:
        return Rules(config)
    except (ValueError, RecursionError) as error:  # RecursionError: a deep value in a message
        raise ValueError(f"{path}: {files.brief(error)}") from None
