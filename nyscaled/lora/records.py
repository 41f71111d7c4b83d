"""The record of where an adapter's start came from, in the metadata of its file."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nyscaled.lora.inits import KERNEL_INITS
from nyscaled.lora.layer import Adapter


class Record(NamedTuple):
    """What is known of a start.

    Attributes:
        init: the name of the init and its options, as `Adapter.init`.
        key: the words of the PRNG key.
    """

    init: tuple[str, tuple[tuple[str, Any], ...]]
    key: tuple[int, ...]


UNKNOWN = Record(("peft", ()), (0, 0))


def write(modules: Mapping[str, Adapter]) -> str:
    """The records of modules, by the names of these, as JSON; options left to their defaults too."""
    origins: dict[str, list[str]] = {}
    for module, adapter in modules.items():
        origins.setdefault(_origin(adapter), []).append(module)
    return json.dumps(
        [{**json.loads(origin), "modules": names} for origin, names in origins.items()]
    )


def _origin(adapter: Adapter) -> str:
    init, given = adapter.init
    options = dict(given)
    if init in KERNEL_INITS:
        parameters = inspect.signature(KERNEL_INITS[init]).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | options
    key = np.asarray(adapter.key[...])
    words = key.reshape(-1, key.shape[-1])[0].tolist()
    return json.dumps({"init": init, "options": options, "key": words}, default=repr)


def read(text: str) -> dict[str, Record]:
    """The records of `write`, by module.

    Raises:
        ValueError: on another text. What a record holds becomes part of a model's structure, which
            must be hashable and equal to itself.

    Examples:
        >>> read('[{"init": "nora", "options": {"scale": 0.2}, "key": [0, 1], "modules": ["fc"]}]')
        {'fc': Record(init=('nora', (('scale', 0.2),)), key=(0, 1))}
    """
    try:
        return {
            module: record
            for start in json.loads(text)
            for record in [_record(start["init"], start["options"], start["key"])]
            for module in start["modules"]
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the metadata 'starts' is not what save_peft writes: {error}") from error


def _record(init: Any, options: Any, key: Any) -> Record:
    if not isinstance(init, str):
        raise ValueError(f"init is {init!r}; expected a name")
    words = tuple(key) if isinstance(key, list) else ()
    sound = all(type(word) is int and 0 <= word < 2**32 for word in words)
    if not sound or not 1 <= len(words) <= 16:
        raise ValueError(f"key is {key!r}; expected the words of a PRNG key")
    frozen = ((name, _frozen(value)) for name, value in sorted(options.items()))
    return Record((init, tuple(frozen)), words)


def _frozen(value: Any) -> Any:
    """The value of an option, hashable; JSON has lists where there were tuples."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"an option is {value!r}; expected a finite number, a string or a list")
    return value
