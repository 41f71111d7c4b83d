"""The options of every script, and how a script is run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The options that every script has."""

    out: Path = Path("figures")
    """Folder for the picture and its record."""
    seed: int = 0
    """Seed of all random numbers."""
    quick: bool = False
    """Run the small version that the description names."""


C = TypeVar("C")


def command_line(main: Callable[[C], None], config: type[C]) -> None:
    """Run a script with the options of the command line; a ValueError ends it with one line.

    Args:
        main: takes the options.
        config: the dataclass of the options.
    """
    try:
        main(tyro.cli(config))
    except ValueError as error:
        sys.exit(f"error: {error}")
