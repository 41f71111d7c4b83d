"""What every model's configuration has, and how it is read from `config.json` and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from nyscaled.checkpoints.files import JsonObject

TokenId = int | tuple[int, ...] | None

LARGEST = 2**31 - 1  # of a size, and of a token's id
# Where numbers have a meaning: an eps beyond the squares that it is added to makes zeros of all,
# below 1e-30 it is gone in float32, and rotations that overflow are NaN.
EPS, OTHERS = (1e-30, 1.0), (1e-6, 1e6)
RANGES = {
    "rms_norm_eps": EPS,
    "layer_norm_eps": EPS,
    "rope_theta": (1.1, 1e15),
    "factor": (1.0, 1e6),
}
LEAST = {"max_window_layers": 0}  # of integers that need not be positive
ELSEWHERE = {"generation"}  # fields that are not in `config.json`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The base of configurations, whose fields have their names in `config.json`.

    Attributes:
        bos_token_id: token that begins a text.
        eos_token_id: token that ends a text, or several such tokens.
        pad_token_id: token that fills up a batch.
        tie_word_embeddings: whether the head is the embedding.
        generation: what `generation_config.json` has beside token ids, as JSON; written back by
            `nyscaled.models.save`.
    """

    model_type: ClassVar[str]
    # Settings with one supported meaning: the values that stand for it, what is written first.
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]]

    bos_token_id: TokenId = None
    eos_token_id: TokenId = None
    pad_token_id: TokenId = None
    tie_word_embeddings: bool = False
    generation: str = "{}"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, sound(field, getattr(self, field.name)))

    @classmethod
    def from_json(cls, config: JsonObject) -> Any:
        """Return the configuration of a file; what may be missing has transformers' defaults.

        Args:
            config: what `config.json` holds.

        Raises:
            ValueError: on a missing, ill-typed or unsupported setting.
        """
        for name, values in cls.fixed.items():
            if name in config and config[name] not in values:
                raise ValueError(
                    f"{name} is {config[name]!r}; for {cls.model_type} only "
                    f"{' or '.join(map(repr, values))} is supported"
                )
        settings = cls.settings(config)
        for field in dataclasses.fields(cls):
            if field.name in settings:
                settings[field.name] = sound(field, settings[field.name])
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} is missing; expected it for {cls.model_type}")
        return cls(**settings)

    @classmethod
    def settings(cls, config: JsonObject) -> JsonObject:
        """Return the fields that a file has; families add what follows from other settings.

        Args:
            config: what `config.json` holds.
        """
        names = {f.name for f in dataclasses.fields(cls)} - ELSEWHERE
        return {name: config[name] for name in names if name in config}

    def to_json(self) -> JsonObject:
        """Return what `config.json` is to hold, for transformers too."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ELSEWHERE]
        fields = {name: getattr(self, name) for name in names}
        return {
            "model_type": self.model_type,
            **{name: values[0] for name, values in self.fixed.items()},
            **fields,
        }


def sound(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value of a field, checked against its annotation.

    Args:
        field: the field, whose annotation may be an int, a float, a bool or token ids.
        value: its value.

    Raises:
        ValueError: on another value, or a number that is not positive or out of its range, where
            it has a meaning and float32 holds it.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if field.type == "TokenId":
        several = isinstance(value, list | tuple)
        ids = value if several else [] if value is None else [value]
        # -1 stands for none, as in early conversions of LLaMA.
        if all(type(i) is int and -1 <= i <= LARGEST for i in ids):
            return tuple(value) if several else value
        expected = f"an integer, a list of them or null, from -1 to {LARGEST}"
    elif field.type == "bool":
        if type(value) is bool:
            return value
        expected = "true or false"
    elif field.type == "int | None" and value is None:
        return value
    elif field.type in ("int", "int | None"):
        least = LEAST.get(field.name, 1)
        if type(value) is int and least <= value <= LARGEST:
            return value
        expected = f"{'a positive integer' if least else 'an integer from 0'} up to {LARGEST}"
    elif field.type == "float":
        low, high = RANGES.get(field.name, OTHERS)
        if type(value) in (int, float) and low <= value <= high:  # which NaN is not
            return float(value)
        expected = f"a positive number from {low:g} to {high:g}"
    else:
        return value
    raise ValueError(f"{field.name} is {value!r:.80}; expected {expected}")
