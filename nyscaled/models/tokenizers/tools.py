"""Python functions as the JSON schemas in which chat templates take tools."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_OTHERS = {list: "array", tuple: "array", dict: "object"}
_TYPES = {kind: {"type": name} for kind, name in (_SCALARS | _OTHERS).items()}

_SECTIONS = r"(?:Returns:|Raises:|\Z)"
_SUMMARY = re.compile(r"(.*?)\s*(?:Args:|Returns:|Raises:|\Z)", re.DOTALL)
_ARGUMENTS = re.compile(rf"\n\s*Args:\n(.*?)\s*{_SECTIONS}", re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)\s*(?:Raises:|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"([ \t]*)(\w+):(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(tool: object) -> dict[str, Any]:
    """Return a tool as transformers hands it to a chat template.

    Args:
        tool: a JSON schema, which stays as it is, or a function with type hints and a docstring
            that describes each argument under `Args:`.

    Raises:
        ValueError: on something else, or a function without type hints or descriptions, or with
            a type that JSON has no word for.

    Examples:
        >>> def weather(city: str, days: int = 1) -> str:
        ...     '''Returns the weather.
        ...
        ...     Args:
        ...         city: its name.
        ...         days: how many.
        ...     '''
        >>> schema = tool_schema(weather)["function"]
        >>> schema["description"], schema["parameters"]["required"]
        ('Returns the weather.', ['city'])
        >>> schema["parameters"]["properties"]["days"]
        {'type': 'integer', 'description': 'how many.'}
    """
    if isinstance(tool, Mapping):
        return dict(tool)
    if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
        raise ValueError(f"a tool is {tool!r:.80}; expected a JSON schema or a Python function")
    try:
        return _of_function(tool)
    except (ValueError, NameError, TypeError) as error:  # NameError: hints that do not resolve
        raise ValueError(f"the tool {tool.__name__} has no schema: {error}") from error


def _of_function(function: Callable[..., Any]) -> dict[str, Any]:
    documentation = (inspect.getdoc(function) or "").strip()
    if not documentation:
        raise ValueError("it has no docstring; expected one that describes it and its arguments")
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    if first in ("self", "cls") and parameters[first].annotation is inspect.Parameter.empty:
        del parameters[first]
    hints = typing.get_type_hints(function)
    descriptions = _descriptions(documentation)
    properties: dict[str, Any] = {}
    for name in parameters:
        if name not in hints:
            raise ValueError(f"its argument {name} has no type hint")
        if name not in descriptions:
            raise ValueError(f"its docstring does not describe {name} under Args:")
        properties[name] = _described(_of_hint(hints[name]), descriptions[name])
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    if required:
        schema["required"] = required
    summary = _SUMMARY.match(documentation)
    output: dict[str, Any] = {
        "name": function.__name__,
        "description": summary[1].strip() if summary else None,
        "parameters": schema,
    }
    if "return" in hints:
        try:
            output["return"] = _of_hint(hints["return"])
        except ValueError:  # the model never writes it
            return {"type": "function", "function": output}
        returns = _RETURNS.search(documentation)
        if returns:
            output["return"]["description"] = returns[1].strip()
    return {"type": "function", "function": output}


def _descriptions(documentation: str) -> dict[str, str]:
    """The texts of the entries under `Args:`; deeper lines belong to the entry above."""
    block = _ARGUMENTS.search(documentation)
    entries: list[tuple[str, str, list[str]]] = []
    for line in block[1].split("\n") if block else []:
        start = _ARGUMENT.match(line)
        indent = entries[-1][0] if entries else None
        deeper = indent is not None and line.startswith((indent + " ", indent + "\t"))
        if start and not deeper:
            entries.append((start[1], start[2], [start[3].strip()]))
        elif entries and line.strip():
            entries[-1][2].append(line.strip())
    return {name: " ".join(filter(None, lines)) for _, name, lines in entries}


def _described(schema: dict[str, Any], text: str) -> dict[str, Any]:
    choices = _CHOICES.search(text)
    if choices:
        values = json.loads(choices[1])
        schema["enum"] = [v.strip() if isinstance(v, str) else v for v in values]
        text = text[: choices.start()].strip()
    schema["description"] = text
    return schema


def _of_hint(hint: Any) -> dict[str, Any]:
    """The schema of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _one_of([member.value for member in hint])
    if hint is Any:
        return {}
    if origin is None and isinstance(hint, type) and hint in _TYPES:
        return dict(_TYPES[hint])
    if origin in (typing.Union, types.UnionType):
        return _union(arguments)
    if origin is typing.Literal:
        return _one_of(list(arguments))
    if origin is list:
        return {"type": "array", "items": _of_hint(arguments[0])}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_of_hint(part) for part in arguments]}
    if origin is dict and len(arguments) == 2:
        return {"type": "object", "additionalProperties": _of_hint(arguments[1])}
    raise ValueError(f"{hint!r} has no JSON type; expected int, str, list[int], … or a schema")


def _union(arguments: tuple[Any, ...]) -> dict[str, Any]:
    parts = [_of_hint(part) for part in arguments if part is not type(None)]
    if len(parts) == 1:
        (schema,) = parts
    elif all(p.keys() == {"type"} and isinstance(p["type"], str) for p in parts):
        names = sorted({part["type"] for part in parts})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": parts}
    return schema | {"nullable": True} if type(None) in arguments else schema


def _one_of(values: list[Any]) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(f"the values are {values}; expected numbers, texts, bools or None")
    names = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
