"""The settings of a run that belong to its method."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Literal, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

import numpy as np

from nyscaled.finetune.methods import method

OWN = ("scale", "damping", "ratio", "clip", "weight_decay")
"""Numbers of methods that are settings themselves."""


_NAMES: dict[type, str] = {
    bool: "True or False",
    float: "a number",
    int: "an integer",
    str: "a text",
    Path: "a path",
    Mapping: "a mapping of names to values",
    type(None): "None",
}


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


def require_kind(config: object, kind: type[object], expected: str) -> None:
    """Refuse settings of the other kind of runs, and what is not settings.

    Args:
        config: the settings.
        kind: their class.
        expected: its public name, and who takes the other kind.

    Raises:
        ValueError: on another class.
    """
    if not isinstance(config, kind):
        own = type(config)
        raise ValueError(f"config is a {own.__module__}.{own.__name__}; expected a {expected}")


def require_types(config: Settings) -> None:
    """Refuse values that are not of the types of their settings.

    Names of files become paths, and NumPy's numbers become Python's.

    Args:
        config: the settings.

    Raises:
        ValueError: on such a value, which is seen otherwise when the settings are written, and on
            an empty name of a file.
    """
    for name, hint in get_type_hints(type(config)).items():
        value, types = getattr(config, name), _types(hint)
        if name == "model" or Path in types:
            value = _as_name(name, value, Path if Path in types else str)
        elif name == "method_options":
            value = _as_options(value)
        else:
            value = _as_python(value)
        object.__setattr__(config, name, value)
        allowed = types | {int} if float in types else types
        # For Python, True is an int.
        if not isinstance(value, tuple(allowed)) or isinstance(value, bool) > (bool in types):
            expected = " or ".join(_NAMES[cls] for cls in _NAMES if cls in types)
            raise ValueError(f"{name} is {value!r:.80}; expected {expected}")


def _as_name(name: str, value: object, kind: type[Path | str]) -> object:
    """The name of a file or of a model, as it is kept; other values as they are."""
    if value == "":  # a path would be the current folder
        raise ValueError(f"{name} is ''; expected a name ('.' is the current folder)")
    return kind(value) if isinstance(value, str | os.PathLike) else value


def _as_python(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _as_options(options: object) -> object:
    """Options as a file of settings can hold them."""
    if not isinstance(options, Mapping):
        return options
    return {name: _as_python(value) for name, value in options.items()}


def _types(hint: object) -> set[type]:
    """The classes of the values that a hint allows."""
    origin = get_origin(hint)
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    if origin in (Union, UnionType):
        return {cls for part in get_args(hint) for cls in _types(part)}
    cls = origin if isinstance(origin, type) else hint
    assert isinstance(cls, type)
    return {cls}


def require_options(options: Mapping[str, int | float | str]) -> None:
    """Refuse `method_options` that are not numbers and words, or are settings themselves.

    Args:
        options: the options by name.

    Raises:
        ValueError: on such options.
    """
    for name, value in options.items():
        known = isinstance(value, int | float | str) and not isinstance(value, bool)
        if not known or value != value:  # NaN
            raise ValueError(f"method_options.{name} is {value!r:.80}; expected a number or a word")
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
