"""`adapter_config.json` of PEFT: which fields are supported, and which modules they mean.

The rules are those of PEFT 0.21 (`tuners/tuners_utils.py: check_target_module_exists`,
`utils/other.py: get_pattern_key`), whose lora/config.py says what each field means.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from nyscaled.checkpoints.expressions import Budget, Expression

CONFIG = "adapter_config.json"

# What is read of a configuration.
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "bias", "init_lora_weights"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices"),
    "ensure_weight_tying",
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
_PATTERN = r"(.*\.)?({})$"  # what PEFT puts a key of rank_pattern or alpha_pattern into


class Rules:
    """What a configuration says of each module, by its name.

    Args:
        config: the object in the file.

    Raises:
        ValueError: if the configuration is of more than plain LoRA, is not soundly typed, or has an
            expression that cannot be read. The methods raise it if expressions take too long.

    Examples:
        >>> config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
        >>> rules = Rules(config | {"rank_pattern": {r"layers\\.0\\..*": 4}})
        >>> rules.rank("layers.0.q_proj"), rules.is_targeted("layers.1.v_proj")
        (4, False)
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        _require_supported(config)
        budget = Budget()
        self.config = config
        self.rank: Callable[[str], int] = _by_pattern(config, "rank_pattern", "r", budget)
        self.alpha: Callable[[str], float] = _by_pattern(
            config, "alpha_pattern", "lora_alpha", budget
        )
        targets = config.get("target_modules")
        everything = isinstance(targets, str) and targets.lower() == "all-linear"
        self._knows_targets = targets is not None and not everything
        self._targets = set() if isinstance(targets, str) else set(targets or ())
        self._target = _expression(targets, budget) if self._knows_targets else None
        excluded = config.get("exclude_modules")
        self._exclusion = _expression(excluded, budget)
        self._excluded = set() if isinstance(excluded, str) else set(excluded or ())
        self._whole: set[str] = set(config.get("modules_to_save") or ())
        indices = config.get("layers_to_transform")
        self._layers = (
            None if indices in (None, []) else {indices} if type(indices) is int else set(indices)
        )
        patterns = config.get("layers_pattern") or []
        self._layer_names = [
            Expression(pattern, r"(?:.*\.)?(?:{})", budget)
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]

    def is_targeted(self, module: str) -> bool | None:
        """Return whether PEFT would adapt the module; None if that depends on its class."""
        if self._exclusion is not None and self._exclusion.fullmatch(module):
            return False
        if not self._excluded.isdisjoint(ends(module)) or is_inside(module, self._whole):
            return False
        if not self._knows_targets:
            return None
        if self._target is not None:
            return self._target.fullmatch(module)
        if module in self._targets:
            return True
        return not self._targets.isdisjoint(ends(module)) and self._is_in_layers(module)

    def is_whole(self, module: str) -> bool:
        """Return whether PEFT saves the module whole."""
        return is_whole(module, self._whole)

    def tokens(self, module: str) -> list[int] | None:
        """Return the tokens whose rows of an embedding PEFT trains, or None if it trains none."""
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            return next((i for m, i in indices.items() if m in ends(module)), None)
        return indices or None

    def _is_in_layers(self, module: str) -> bool:
        if self._layers is None:
            return True
        parts = module.split(".")
        for i, part in enumerate(parts[:-1]):
            if not part.isdecimal():
                continue
            before = ".".join(parts[:i])
            if any(e.fullmatch(before) for e in self._layer_names) or (
                not self._layer_names and i >= 2
            ):
                return int(part) in self._layers
        return False


def ends(module: str) -> list[str]:
    """Return a module's name, and what is after each dot in it.

    Examples:
        >>> ends("layers.0.fc")
        ['layers.0.fc', '0.fc', 'fc']
    """
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def is_whole(module: str, names: Collection[str]) -> bool:
    """Return whether modules_to_save has an end of a module's name, or of one around it.

    Args:
        module: name of the module.
        names: what modules_to_save has.

    Examples:
        >>> is_whole("layers.0.input_layernorm", {"norm"}), is_whole("norm.0", {"norm"})
        (True, True)
    """
    # PEFT asks for the end of the text.
    around = list(itertools.accumulate(module.split("."), "{}.{}".format))
    return bool(names) and any(name[i:] in names for name in around for i in range(len(name)))


def is_inside(module: str, names: Collection[str]) -> bool:
    """Return whether PEFT leaves out the update of a module, as modules_to_save has a part of it.

    Args:
        module: name of the module.
        names: what modules_to_save has.

    Examples:
        >>> is_inside("decoder.head.fc", {"head"}), is_inside("decoder.pre_head", {"head"})
        (True, False)
    """
    parts = module.split(".")
    runs = itertools.combinations(range(len(parts) + 1), 2)
    return bool(names) and any(".".join(parts[i:j]) in names for i, j in runs)


def _expression(value: Any, budget: Budget) -> Expression | None:
    return Expression(value, budget=budget) if isinstance(value, str) and value else None


def _by_pattern(config: Mapping[str, Any], field: str, default: str, budget: Budget) -> Any:
    """The value of a module: of the first pattern that matches, or the default."""
    patterns = config.get(field) or {}
    expressions = [(Expression(p, _PATTERN, budget), value) for p, value in patterns.items()]

    def value_of(module: str) -> Any:
        hits = (value for expression, value in expressions if expression.match(module))
        return next(hits, patterns.get(module, config[default]))

    return value_of


def _require_supported(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless the configuration is of a plain LoRA update, soundly typed."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}; expected 'LORA'")
    for field, value in config.items():
        # Zero is a value here: `layers_to_transform: 0` is the first layer.
        off = value is None or value is False or value in ("", [], {})
        if not off and field not in _READ | _WITHOUT_EFFECT:
            raise ValueError(f"{field} is {value!r}; only plain LoRA is supported, without it")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {config['bias']!r}; expected 'none', 'all' or 'lora_only'")
    if config.get("init_lora_weights", True) not in _STARTS:
        raise ValueError(
            f"init_lora_weights is {config['init_lora_weights']!r}, with which the update depends "
            "on the base; expected an adapter that PEFT converted to plain LoRA as it saved it "
            "(`path_initial_model_for_weight_conversion`)"
        )
    for field in ("use_rslora", "ensure_weight_tying"):
        if not isinstance(config.get(field, False), bool):
            raise ValueError(f"{field} is {config[field]!r}; expected true or false")
    _require_numbers(config)
    _require_names(config)


def _require_numbers(config: Mapping[str, Any]) -> None:
    ranks, alphas = (config.get(f"{field}_pattern") or {} for field in ("rank", "alpha"))
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise ValueError("rank_pattern and alpha_pattern: expected objects")
    for rank in (config.get("r"), *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"a rank is {rank!r}; expected a positive integer in r, rank_pattern")
    for number in (config.get("lora_alpha"), *alphas.values()):
        if not _is_finite(number):
            raise ValueError(
                f"a number is {number!r}; expected a finite one in lora_alpha, alpha_pattern"
            )
    dropout = config.get("lora_dropout") or 0.0
    if not _is_finite(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {dropout!r}; expected a number in [0, 1)")


def _require_names(config: Mapping[str, Any]) -> None:
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(field)
        if not (value is None or isinstance(value, str) or _are(str, value)):
            raise ValueError(f"{field} is {value!r}; expected a list of strings, a string or null")
    indices = config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    if not all(_are(int, values) and len(set(values)) == len(values) for values in lists):
        raise ValueError(
            f"trainable_token_indices is {indices!r}; expected lists of distinct integers"
        )
    names = config.get("modules_to_save") or []
    if not _are(str, names):
        raise ValueError(f"modules_to_save is {names!r}; expected a list of strings or null")
    layers = config.get("layers_to_transform")
    if not (layers is None or type(layers) is int or _are(int, layers)):
        raise ValueError(
            f"layers_to_transform is {layers!r}; expected integers, an integer or null"
        )
    if layers not in (None, []) and isinstance(config.get("target_modules"), str):
        raise ValueError(
            "layers_to_transform is set; expected a list in target_modules, as in PEFT"
        )
    if layers in (None, []) and config.get("layers_pattern"):
        raise ValueError(
            "layers_pattern is set; expected layers_to_transform beside it, as in PEFT"
        )


def _are(type_: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is type_ for value in values)


def _is_finite(number: Any) -> bool:
    """Whether the value is a number that a float can hold; an integer may be too large."""
    try:
        return type(number) in (int, float) and math.isfinite(number)
    except OverflowError:
        return False
