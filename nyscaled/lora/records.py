"""The record of where an adapter's start came from, in the metadata of its file."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nyscaled.lora.adapter import Adapter
from nyscaled.lora.inits import KERNEL_INITS
from nyscaled.lora.recipe import Origin

UNKNOWN = Origin(("peft", ()), (0, 0))


def write(modules: Mapping[str, Adapter]) -> str:
    """Return the records of modules as JSON. Options that were left to their defaults are in it."""
    origins: dict[str, list[str]] = {}
    for module, adapter in modules.items():
        origins.setdefault(_as_json(adapter), []).append(module)
    return json.dumps(
        [{**json.loads(origin), "modules": names} for origin, names in origins.items()]
    )


def _as_json(adapter: Adapter) -> str:
    init, options = adapter.init[0], dict(adapter.init[1])
    if init in KERNEL_INITS:
        parameters = inspect.signature(KERNEL_INITS[init]).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | options
    key = np.asarray(adapter.key[...])
    words = key.reshape(-1, key.shape[-1])[0].tolist()
    return json.dumps({"init": init, "options": options, "key": words}, default=repr)


def read(text: str) -> dict[str, Origin]:
    """Return the records in what `write` returned, by module.

    Raises:
        ValueError: on another text. A record becomes part of a model's structure, which must be
            hashable and equal to itself.

    Examples:
        >>> read('[{"init": "nora", "options": {"scale": 0.2}, "key": [0, 1], "modules": ["fc"]}]')
        {'fc': Origin(init=('nora', (('scale', 0.2),)), key=(0, 1))}
    """
    try:
        return {
            module: record
            for start in json.loads(text)
            for record in [_origin(start["init"], start["options"], start["key"])]
            for module in start["modules"]
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the metadata 'starts' is not what save_peft writes: {error}") from error


def _origin(init: Any, options: Any, key: Any) -> Origin:
    if not isinstance(init, str):
        raise ValueError(f"init is {init!r}; expected a name")
    words = tuple(key) if isinstance(key, list) else ()
    sound = all(type(word) is int and 0 <= word < 2**32 for word in words)
    if not sound or not 1 <= len(words) <= 16:
        raise ValueError(f"key is {key!r}; expected the words of a PRNG key")
    frozen = ((name, _frozen(value)) for name, value in sorted(options.items()))
    return Origin((init, tuple(frozen)), words)


def _frozen(value: Any) -> Any:
    """The value of an option, hashable; JSON has lists where there were tuples."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"an option is {value!r}; expected a finite number, a string or a list")
    return value
