"""Options of a subcommand: a YAML or TOML file, and flags over it, into a frozen dataclass."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

import tyro

from nyscaled._pytree import build
from nyscaled.checkpoints.files import brief, read_text

C = TypeVar("C")
Value = int | float | str
Option = bool | Value | Path | Mapping[str, Value] | None


def parse(config: type[C], words: Sequence[str], program: str, description: str | None) -> C | None:
    """Return the options of a command line; None if it asked for help, which was printed.

    Args:
        config: a frozen dataclass of options. Its option `config` names a file of options.
        words: the command line.
        program: what the help calls the command.
        description: what the help says of it.

    Raises:
        ValueError: on words that are not options of this command, and on a file of options that
            cannot be read.
    """
    path = _flag("config", words)
    _require_paths(config, words)
    options = {} if path is None else read_options(Path(path), config)
    words, entries = _entries(config, words)
    for name, values in entries.items():
        before = options.get(name, {})
        assert isinstance(before, Mapping)
        options[name] = {**before, **values}
    default = _defaults(config, options)
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            return tyro.cli(
                config, args=words, prog=program, description=description, default=default
            )
    except SystemExit as end:
        if not end.code:
            return None
        raise ValueError(_reason(refused.getvalue(), program)) from None


def _require_paths(config: type[C], words: Sequence[str]) -> None:
    """Refuse empty paths, which would be the current folder."""
    for name, hint in get_type_hints(config).items():
        flag = name.replace("_", "-")
        if Path in (get_args(hint) or (hint,)) and _flag(flag, words) == "":
            raise ValueError(f"--{flag} is ''; expected a path")


def word_of(name: str, words: Sequence[str]) -> str | None:
    """Return the value of an option that decides which others there are; None without a text.

    Args:
        name: name of the option.
        words: the command line. Its flag overrides the file of options.

    Raises:
        ValueError: on a file of options that cannot be read.
    """
    path, flag = _flag("config", words), _flag(name, words)
    value = flag if flag is not None or not path else _read(Path(path)).get(name)
    return value if isinstance(value, str) else None


def _flag(name: str, words: Sequence[str]) -> str | None:
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument(f"--{name}", nargs="?", dest="value")
    return scan.parse_known_args(list(words))[0].value


def read_options(path: Path, config: type[C]) -> dict[str, Option]:
    """Return the options in a TOML or YAML file.

    Args:
        path: path of the file, which ends in .toml, .yaml or .yml.
        config: the dataclass of options.

    Raises:
        ValueError: on a file that cannot be read, an option that does not exist, and a value of
            another type.
    """
    options = _read(path)
    types_of = {key: hint for key, hint in get_type_hints(config).items() if key != "config"}
    for key in options:
        if key not in types_of:
            known = ", ".join(types_of)
            raise ValueError(f"{path} has {brief(repr(key))}; expected options among: {known}")
    return {key: _as(types_of[key], value, f"{path} has {key}") for key, value in options.items()}


def _read(path: Path) -> Mapping[str, object]:
    """What a file of options holds."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a file of options")
    text = read_text(path)
    try:
        if path.suffix == ".toml":
            options: object = tomllib.loads(text.removeprefix("\ufeff"))  # a mark of some editors
        elif path.suffix in (".yaml", ".yml"):
            options = _from_yaml(text)
        else:
            raise ValueError(f"its name ends in {path.suffix!r}; expected .toml, .yaml or .yml")
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of many classes, on texts of other formats
        raise ValueError(f"{path} is not a file of options: {brief(error)}") from error
    if not isinstance(options, Mapping):
        raise ValueError(f"{path} holds a {type(options).__name__}; expected options by name")
    return options


def _from_yaml(text: str) -> object:
    """What a YAML file holds, without names that stand there twice, which its reader takes."""
    import yaml

    root = yaml.compose(text, yaml.SafeLoader)
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    for mapping in (root, *(value for _, value in entries)):
        if isinstance(mapping, yaml.MappingNode):
            names = collections.Counter(str(name.value) for name, _ in mapping.value)
            for name in names:
                if names[name] > 1:
                    raise ValueError(f"it has {name!r} {names[name]} times; expected it once")
    return yaml.safe_load(text)


def _entries(
    config: type[C], words: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, Value]]]:
    """Take the entries of mappings, `--option.entry value`, out of a command line."""
    hints = get_type_hints(config)
    mappings = [name for name, hint in hints.items() if get_origin(hint) is Mapping]
    kept: list[str] = []
    entries: dict[str, dict[str, Value]] = {name: {} for name in mappings}
    rest = iter(words)
    for word in rest:
        flag, mark, value = word.partition("=")
        name, dot, entry = flag.removeprefix("--").replace("-", "_").partition(".")
        if not word.startswith("--") or not dot or not entry or name not in mappings:
            kept.append(word)
            continue
        text = value if mark else next(rest, None)
        if text is None:
            raise ValueError(f"{word} has no value; expected a number or a text after it")
        entries[name][entry] = _value(text)
    return kept, {name: values for name, values in entries.items() if values}


def _value(text: str) -> Value:
    """A number where the text is one."""
    for reader in (int, float):
        with contextlib.suppress(ValueError):
            return reader(text)
    return text


def _as(hint: object, value: object, name: str) -> Option:
    """The value of an option in the type of the dataclass."""
    if get_origin(hint) is Mapping:
        return _mapping(value, name)
    classes = get_args(hint) or (hint,)
    if value is None and type(None) in classes:
        return None
    if isinstance(value, str) and value in [word for cls in classes for word in get_args(cls)]:
        return value  # of a literal type
    reader, expected = next(_READERS[cls] for cls in _READERS if cls in classes)
    try:
        return reader(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} = {brief(repr(value))}; expected {expected}") from None


def _mapping(value: object, name: str) -> Mapping[str, Value]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} = {brief(repr(value))}; expected a mapping of names to values")
    entries: dict[str, Value] = {}
    for key, entry in value.items():
        if not isinstance(key, str) or not isinstance(entry, Value) or isinstance(entry, bool):
            shown = brief(repr({key: entry}))
            raise ValueError(f"{name} with {shown}; expected numbers or texts by name")
        entries[key] = _value(entry) if isinstance(entry, str) else entry
    return entries


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _number(value: object) -> float:
    # A text too, because YAML reads 1e-3 as one.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _integer(value: object) -> int:
    number = int(_number(value))
    if number != _number(value):
        raise ValueError
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _path(value: object) -> Path:
    if not _text(value):
        raise ValueError
    return Path(_text(value))


_READERS: dict[object, tuple[Callable[[object], Option], str]] = {
    bool: (_truth, "true or false"),
    int: (_integer, "an integer"),
    float: (_number, "a number"),
    str: (_text, "a text"),
    Path: (_path, "a path"),
}


def _defaults(config: type[C], options: Mapping[str, Option]) -> C:
    """An instance for tyro, in which options without a value are marked as missing."""
    missing = dataclasses.MISSING
    values = {
        field.name: field.default_factory()
        if field.default_factory is not missing
        else tyro.MISSING
        if field.default is missing
        else field.default
        for field in dataclasses.fields(config)  # pyright: ignore[reportArgumentType]
    }
    return build(config, **(values | dict(options)))  # its types would not allow what is missing


def _reason(text: str, program: str) -> str:
    """What tyro says in a box, between the title and the next rule, as one line."""
    parts = re.split(r"[─-]{5,}", text)
    words = re.sub("[│╭╮╰╯]", " ", parts[min(1, len(parts) - 1)]).split()
    reason = " ".join(words).removeprefix("Error parsing Config: ")
    return f"{reason} (see {program} --help)"
