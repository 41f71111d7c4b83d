"""The settings of a run that belong to its method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

from nyscaled.finetune.methods import method

OWN = ("scale", "damping", "ratio", "clip", "weight_decay")
"""Numbers of methods that are settings themselves."""


@runtime_checkable
class Settings(Protocol):
    """What configurations of runs have in common."""

    @property
    def method(self) -> str:
        """Name of the method."""
        ...

    @property
    def scale(self) -> float | Literal["auto"] | None:
        """Size ξ of the start."""
        ...

    @property
    def damping(self) -> float | None:
        """Damping λ of the updates."""
        ...

    @property
    def ratio(self) -> float | None:
        """Learning rate of b over that of a."""
        ...

    @property
    def method_options(self) -> Mapping[str, int | float | str]:
        """Further numbers and names."""
        ...


def require_booleans(config: Settings) -> None:
    """Refuse other values in the place of True and False, of which most count as True.

    Args:
        config: the settings.

    Raises:
        ValueError: on such a value.
    """
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ValueError(f"{field.name} is {value!r:.80}; expected True or False")


def require_options(options: Mapping[str, int | float | str]) -> None:
    """Refuse `method_options` that are not numbers and words, or are settings themselves.

    Args:
        options: the options by name.

    Raises:
        ValueError: on such options.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"method_options is {options!r}; expected a mapping of names to values")
    for name, value in options.items():
        if isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"method_options.{name} is {value}; expected a number or a word")
    if twice := [name for name in options if name in OWN]:
        raise ValueError(
            f"method_options has {twice[0]!r}; expected the setting {twice[0]} in its place"
        )


def require_method(config: Settings) -> None:
    """Refuse a method that does not exist, and settings that it does not have.

    Args:
        config: the settings.

    Raises:
        ValueError: on such settings.
    """
    chosen = method(config.method)
    chosen.require_known(*method_options(config))
    if config.scale == "auto" and "side" not in chosen.options:
        raise ValueError(
            f"scale is 'auto'; expected a number for {config.method}, as 'auto' is for nora and "
            "nora+"
        )


def method_options(config: Settings) -> tuple[dict[str, int | float | str], dict[str, float]]:
    """Return the settings of a method's start, and those of its updates.

    Args:
        config: the settings.

    Raises:
        ValueError: on a word where a number is expected.
    """
    chosen, hyperparameters = method(config.method), _given(config, "damping", "ratio")
    options: dict[str, int | float | str] = {**_given(config, "scale")}
    for name, value in config.method_options.items():
        if not isinstance(value, str):
            (hyperparameters if name in chosen.hyperparameters else options)[name] = value
        elif isinstance(chosen.options.get(name, value), str):
            options[name] = value
        else:
            raise ValueError(f"method_options has {name} = {value!r}; expected a number")
    return options, hyperparameters


def _given(config: Settings, *names: str) -> dict[str, float]:
    """The settings of these names that were set."""
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
