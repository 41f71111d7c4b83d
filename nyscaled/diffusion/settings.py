"""Configurations in the form of diffusers, read from `config.json` and written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, TypeVar

from nyscaled.checkpoints import files
from nyscaled.checkpoints.files import JsonObject
from nyscaled.models.config import LARGEST

INTEGERS, TEXTS = "tuple[int, ...]", "tuple[str, ...]"
# Of integers that need not be positive.
LEAST = {"steps_offset": 0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# Other classes of diffusers, by what they are called.
FOREIGN = {
    "ControlNetModel": "ControlNet",
    "UNet2DModel": "a U-Net without a text",
    "StableDiffusionXLPipeline": "SDXL",
    "StableDiffusionInpaintPipeline": "inpainting",
    "StableDiffusionControlNetPipeline": "ControlNet",
}


S = TypeVar("S", bound="Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of configurations, whose fields have their names in `config.json`.

    Attributes:
        class_name: name of the class in diffusers or transformers.
        fixed: settings with one supported meaning: the values that stand for it, of which the
            first is written.
        reasons: what values of fixed settings are used for that is not supported.
    """

    class_name: ClassVar[str]
    fixed: ClassVar[Mapping[str, tuple[object, ...]]]
    reasons: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _sound(field, getattr(self, field.name)))

    @classmethod
    def from_json(cls: type[S], config: JsonObject) -> S:
        """Return the configuration of a file; a missing setting has its default in diffusers.

        Args:
            config: what `config.json` holds.

        Raises:
            ValueError: on another class, and on an ill-typed, unsupported or unknown setting.
        """
        cls.require_class(config)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in config.items():
            if name.startswith("_") or name in fields:
                continue
            if name not in cls.fixed and value is not None:
                raise ValueError(
                    f"{files.brief(repr(name))} is not a setting that is known here; expected the "
                    f"settings of {cls.class_name} in diffusers 0.42 or before"
                )
            values = cls.fixed.get(name, (None,))
            # 1 and 1.0 are the same setting, 1 and true are not.
            booleans = isinstance(value, bool)
            if not any(value == x and booleans == isinstance(x, bool) for x in values):
                reason = f" ({cls.reasons[name]} is not supported)" if name in cls.reasons else ""
                raise ValueError(
                    f"{name} is {value!r:.80}; expected {' or '.join(map(repr, values))}{reason}"
                )
        own = fields.keys() & config.keys()
        return cls(**{name: _sound(fields[name], config[name]) for name in own})

    @classmethod
    def require_class(cls, config: JsonObject) -> None:
        """Require the name of the class in a file.

        Args:
            config: what `config.json` holds.

        Raises:
            ValueError: on another one.
        """
        require_class(config, cls.class_name)

    @property
    def layers(self) -> int:
        """The number of layers that have tensors in a file."""
        return 0

    def to_json(self) -> JsonObject:
        """Return what `config.json` is to hold, for diffusers too."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fixed = {name: values[0] for name, values in self.fixed.items()}
        return {"_class_name": self.class_name, **fixed, **fields}


def require_class(config: JsonObject, class_name: str) -> None:
    """Require that a file is of a class of diffusers.

    Args:
        config: what the JSON file holds.
        class_name: name of the class.

    Raises:
        ValueError: on another `_class_name`.
    """
    named = config.get("_class_name")
    if named != class_name:
        foreign = FOREIGN.get(named) if isinstance(named, str) else None
        reason = f" ({foreign} is not supported)" if foreign else ""
        raise ValueError(f"_class_name is {named!r:.80}; expected {class_name!r}{reason}")


def _sound(field: dataclasses.Field[object], value: object) -> object:
    """Return the value of a field, checked against its annotation; lists become tuples."""
    kinds = {kind.strip() for kind in str(field.type).split("|")}
    if value is None and "None" in kinds:
        return value
    if isinstance(value, list | tuple) and kinds & {INTEGERS, TEXTS}:
        if TEXTS in kinds:
            sound, expected = all(isinstance(x, str) for x in value), "texts"
        else:
            sound, expected = all(map(_is_size, value)), "positive integers"
        if value and sound:
            return tuple(value)
        raise ValueError(f"{field.name} is {value!r:.80}; expected a list of {expected}")
    if kinds & {INTEGERS, TEXTS} and "int" not in kinds:
        raise ValueError(f"{field.name} is {value!r:.80}; expected a list")
    if "str" in kinds:
        if not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r:.80}; expected a text")
        return value
    if "bool" in kinds:
        sound, expected = type(value) is bool, "true or false"
    elif "float" in kinds:
        sound = isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf
        expected = "a positive number"
    else:
        least = LEAST.get(field.name, 1)
        sound = _is_size(value, least)
        expected = f"an integer from {least} to {LARGEST}"
    if not sound:
        raise ValueError(f"{field.name} is {value!r:.80}; expected {expected}")
    return value


def _is_size(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and type(value) is int and least <= value <= LARGEST
