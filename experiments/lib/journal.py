"""A record of runs, one JSON object a line, so that a script goes on where it stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Journal:
    """Runs that were made, by what identifies each.

    A line is written by one call, so that a reader and a second writer never see half of one. A
    line that was cut, by a machine that stopped, is left out. So is one without all keys, which is
    said.

    Args:
        path: the file; it need not exist.
        keys: the fields that identify a run.

    Examples:
        >>> import tempfile
        >>> journal = Journal(Path(tempfile.mkdtemp()) / "runs.jsonl", ("seed",))
        >>> run = lambda: {"loss": 0.5}
        >>> journal.once({"seed": 1}, run)
        {'seed': 1, 'loss': 0.5}
        >>> Journal(journal.path, ("seed",)).once({"seed": 1}, None)["loss"]
        0.5
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys
        self.lines: dict[tuple[Any, ...], Line] = {}
        if path.exists():
            for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue
                if isinstance(line, dict) and all(name in line for name in keys):
                    self.lines[self._key(line)] = line
                else:
                    expected = f"expected an object with {', '.join(keys)}"
                    print(f"{path}:{number} is left out; {expected}", file=sys.stderr)

    def once(self, identity: Mapping[str, Any], run: Callable[[], Line] | None) -> Line:
        """Return the line of a run, which is made and written if there is none.

        Args:
            identity: values of the keys.
            run: makes the rest of the line; None for a run that must be there.

        Raises:
            KeyError: if the run is not there and there is nothing to make it with.
        """
        key = self._key(identity)
        if key not in self.lines:
            if run is None:
                raise KeyError(key)
            line = {**identity, **run()}
            self._append(line)
            self.lines[key] = line
        return self.lines[key]

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the line of a run is there.

        Args:
            identity: values of the keys.
        """
        return self._key(identity) in self.lines

    def _key(self, line: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in self.keys)

    def _append(self, line: Line) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, (("\n" if cut else "") + json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)
