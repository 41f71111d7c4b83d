"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import IO


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk.

    Args:
        path: its path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Generator[IO[bytes], None, None]:
    """Yield an open file, whose contents then become those of `path` at one moment.

    Nothing has changed if the body raises, or if the process is killed.

    Args:
        path: path of the file that is made or replaced; its folder must exist.
    """
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(name, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink()
        raise
    flush(path.parent)
