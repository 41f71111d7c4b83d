"""What a target of the fuzzer is, and what arrays mean."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TESTS = Path(__file__).parents[1]


class Target(NamedTuple):
    """A kind of files.

    Attributes:
        make: writes sound ones into a folder.
        files: the names of those that are changed.
        read: what they mean, by the inner door; if asked for, also by the outermost.
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path, bool], Any]


def array(value: Any) -> Any:
    """What tells apart arrays."""
    value = np.asarray(value)
    return str(value.dtype), value.shape, hashlib.sha1(value.tobytes()).hexdigest()


def arrays(opened: Any) -> Any:
    """The same of all tensors of open files, by name."""
    return {name: array(opened.read(name)) for name in sorted(opened.names)}
