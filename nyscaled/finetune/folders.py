"""The folder of a run: which files say how it began, and whether another command may go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Generator, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import yaml
from filelock import FileLock, Timeout

import nyscaled
from nyscaled._files import replacing
from nyscaled.checkpoints.files import JsonObject, read_object, read_text

CONFIG, RECORD, RESULT = "config.yaml", "run.json", "result.json"
LOCK = "run.lock"
ADAPTER = "adapter"
LATER = "metrics.jsonl", "checkpoints", "best", ADAPTER, RESULT
"""What a run writes when its settings are written."""
SWEEP = "sweep.json"
"""The table of a sweep, whose runs are in folders of their own."""
PACKAGES = "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint"


def begun(out: Path, *, resume: bool) -> JsonObject | None:
    """Return the settings of the run in a folder, None for a run that begins.

    Args:
        out: the folder.
        resume: whether a run is to go on.

    Raises:
        ValueError: if the folder has a run that is not to go on, none that is, or parts of one, or
            is a file.
    """
    path = out / CONFIG
    if path.exists():
        if not resume:
            raise ValueError(f"{out} has a run; expected --resume, or another --out")
        try:
            saved = yaml.safe_load(read_text(path))
        except yaml.YAMLError:
            saved = None
        if not isinstance(saved, dict) or "model" not in saved:
            raise ValueError(f"{path} has no settings of a run; expected those that it began with")
        return saved
    if resume:
        raise ValueError(f"{out} has no run; expected a folder with {CONFIG}, or no --resume")
    for path in (out, *out.parents):
        if path.is_file():
            raise ValueError(f"out is '{out}', and '{path}' is a file; expected a folder")
    # A run that begins would go on from them.
    if left := [name for name in (*LATER, SWEEP) if (out / name).exists()]:
        raise ValueError(
            f"{out} has {', '.join(left)} and no {CONFIG}; expected a folder without parts of "
            "another run"
        )
    return None


def finished(
    out: Path,
    saved: JsonObject,
    options: JsonObject,
    besides: Sequence[str],
    kind: type[object],
    made: type[object],
) -> JsonObject | None:
    """Return what `result.json` of the run in a folder holds, None for one that is to go on.

    Args:
        out: the folder.
        saved: the settings with which that run began.
        options: the settings now.
        besides: names of those that may differ.
        kind: dataclass of the settings. One that an earlier version did not save had its default.
        made: dataclass of the result.

    Raises:
        ValueError: if others differ, or the result of a finished run is not whole.
    """
    saved = _defaults(kind) | saved
    names = [name for name in options if name in saved and name not in besides]
    if changed := [name for name in names if not _same(saved[name], options[name])]:
        shown = ", ".join(f"{k} was {saved[k]} and is {options[k]}" for k in changed)
        raise ValueError(f"{out} has a run of other settings: {shown}")
    path = out / RESULT
    # Without its adapter, it goes on from the last checkpoint and writes it again.
    if not (path.exists() and (out / ADAPTER).exists()):
        return None
    result = read_object(path, "the result of a run")
    names = [field.name for field in dataclasses.fields(made)]  # pyright: ignore[reportArgumentType]
    if missing := [name for name in names if name not in result]:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; expected the result of a run (without the file, "
            "--resume writes it again)"
        )
    return {name: result[name] for name in names}


def _same(before: object, now: object) -> bool:
    """Whether two values of a setting are equal, or two names of one file."""
    if isinstance(before, str) and isinstance(now, str) and before and now:
        return before == now or (
            os.path.exists(before) and os.path.exists(now) and os.path.samefile(before, now)
        )
    return before == now


def _defaults(kind: type[object]) -> JsonObject:
    """The settings that have a default."""
    values: JsonObject = {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def begin(out: Path, options: JsonObject, record: JsonObject, *packages: str) -> None:
    """Write how a run begins. The folder is the run's from then on.

    Args:
        out: the folder.
        options: the settings.
        record: what else `run.json` is to hold.
        packages: names of packages whose versions it is to hold too.
    """
    versions = {name: version(name) for name in (*PACKAGES, *packages)}
    write_json(
        out / RECORD,
        {
            "command": shlex.join(sys.argv),
            "python": platform.python_version(),
            # Of a clone too, which need not be installed.
            "versions": {"nyscaled": nyscaled.__version__, **versions},
            "devices": [str(device) for device in jax.devices()],
            **record,
        },
    )
    with replacing(out / CONFIG) as file:
        file.write(yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode())


@contextlib.contextmanager
def held(out: Path) -> Generator[None, None, None]:
    """Make the folder of a run, and refuse it to other processes in the body of a `with`.

    The lock ends with this process, also if it is killed; its file may stay. No process is refused
    on file systems without locks.

    Args:
        out: the folder.

    Raises:
        ValueError: if another process has the run.
    """
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(out / LOCK, timeout=0))
        except Timeout:
            raise ValueError(
                f"{out} has a run that goes on in another process; expected to wait for its "
                "end, or another --out"
            ) from None
        except (NotImplementedError, OSError):  # of a file system without locks
            pass
        yield


def write_json(path: Path, values: object) -> None:
    """Write a file of JSON for people.

    Args:
        path: its path.
        values: what it is to hold.
    """
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
