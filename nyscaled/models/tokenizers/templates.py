"""Chat templates, rendered in a separate process with limits.

A template is a program of unknown origin: one line can loop without end or ask for all memory,
inside an operation that this process could not interrupt. So a separate process renders it, in
Jinja's sandbox. The process is ended if it takes longer than `SECONDS`, more memory than `MEMORY`
(not on Windows and macOS, which have no such limit), or writes more than `CHARACTERS`. It is
started for the first template and kept for later ones.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nyscaled.models.tokenizers.template_process import EXHAUSTED, LENGTH, TEXT

SECONDS = 5.0  # on the clock, per rendering
MEMORY = 2**30  # bytes of address space of the process
CHARACTERS = 2**24  # in the text

_START_SECONDS = 60.0
_PROGRAM = Path(__file__).with_name("template_process.py")


def render(template: str, context: Mapping[str, Any]) -> str:
    """Return what a template makes of JSON values.

    Args:
        template: template in Jinja.
        context: values by the names that the template uses.

    Raises:
        ValueError: if the template is not valid, refuses the values, or goes beyond a limit.
        ImportError: without the package jinja2.
        OSError: if no process can be started.

    Examples:
        >>> render("{{ name }}!", {"name": "Nyström"})
        'Nyström!'
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("chats need jinja2: pip install 'nyscaled[models]'")
    limits = {"seconds": SECONDS, "memory": MEMORY, "characters": CHARACTERS}
    request = pickle.dumps({"template": template, "context": dict(context), **limits})
    with _state.lock:
        if _state.process is None or _state.process.popen.poll() is not None:
            _state.process = _Process()
        try:
            kind, text = _state.process.ask(request, SECONDS)
        except BaseException:
            _state.process.end()
            _state.process = None
            raise
        if kind == EXHAUSTED:
            _state.process.end()
            _state.process = None
            raise ValueError(f"the chat template takes more than {MEMORY} bytes of memory")
    if kind != TEXT:
        raise ValueError(f"the chat template refuses the messages: {text}")
    return text


class _Process:
    """A process that renders templates."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # so that an interruption from the keyboard does not reach it
        )
        try:
            self._read(_START_SECONDS)
        except ValueError as error:
            self.end()
            raise OSError(f"the process for chat templates does not start: {error}") from error

    def ask(self, request: bytes, seconds: float) -> tuple[int, str]:
        """Return the kind of the answer, and its text.

        Args:
            request: what to render.
            seconds: limit of the time.
        """
        return self._read(seconds, LENGTH.pack(len(request)) + request)

    def _read(self, seconds: float, request: bytes = b"") -> tuple[int, str]:
        stdin, stdout = self.popen.stdin, self.popen.stdout
        assert stdin is not None
        assert stdout is not None
        # Ending the process ends a read or a write that waits for it, on every system.
        timer = threading.Timer(seconds, self.popen.kill)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(request)
            stdin.flush()
            header = stdout.read(1 + LENGTH.size)
            size = LENGTH.unpack(header[1:])[0] if len(header) == 1 + LENGTH.size else -1
            content = stdout.read(size) if 0 <= size <= 4 * CHARACTERS else b""
        except OSError:  # a pipe that broke
            size, header, content = -1, b"", b""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if len(content) != size:
            why = f"takes longer than {seconds:g} s" if late else "ends its process"
            raise ValueError(f"the chat template {why}")
        if late:  # the answer came in the same moment
            self.popen.wait()
        return header[0], content.decode("utf-8", "surrogatepass")

    def end(self) -> None:
        """Kill the process, and wait for it."""
        self.popen.kill()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # with a request in its buffer
                    pipe.close()
        self.popen.wait()


class _State:
    """The process that is kept, and the lock of its user."""

    def __init__(self) -> None:
        self.process: _Process | None = None
        self.lock = threading.Lock()


_state = _State()
_forgotten: list[_State] = []


def _forget() -> None:
    """After a fork, leave the process to the parent."""
    global _state
    _forgotten.append(_state)  # else its end would wait for a process that is not its own
    _state = _State()


def _end() -> None:
    if _state.process is not None:
        _state.process.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_end)
