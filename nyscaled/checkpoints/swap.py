"""Several files of a folder replaced as one, and several read as one.

A save is written into a hidden folder `.writing-…` beside the files. Renaming that folder to
`.nyscaled-save` is the save: from then on the new files count, and every process that opens the
folder or saves into it first moves them to their places. Each move removes its source, in a folder
that belongs to one save. So any number of processes may make the same moves at once, or finish
those of a process that was killed. No process waits for a lock. When all is done, the folder holds
plain files only.

Readers check all that they have read once more. If anything changed, they read again.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nyscaled.checkpoints import files

try:
    import fcntl
except ImportError:  # Windows, where what dead processes left stays
    fcntl = None

SAVE = ".nyscaled-save"
STAGING = ".writing-"
TRIES = 100

_NEW, _OLD, _PLAN, _PLACEHOLDER = "new", "old", "plan.json", "placeholder"

_MAX_GONE = 100  # patterns of files that go, each of which is held against each file

T = TypeVar("T")


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike[str],
    texts: Mapping[str, str | None],
    *,
    last: str,
    stale: Sequence[str] = (),
) -> Generator[Path, None, None]:
    """Yield a staging folder to write files into, which then replace those in `folder`.

    Nothing has changed if the body raises. If the process is killed, the next process that opens
    the folder with this package finds the old files or the new ones. Other programs find no sound
    `last` during the swap, so that they do not read files of two saves as one. Of two saves at the
    same time the later one stays.

    Args:
        folder: the folder; made if missing. Other files in it are not changed.
        texts: further files, by their names. None stands for a file to be removed, or a folder if
            the name ends with a slash.
        last: the name in `texts` of the file without which the others are not read.
        stale: names of further files to be removed, which belonged to what is replaced; with the
            wildcards of `fnmatch`.

    Yields:
        The staging folder.

    Raises:
        ValueError: if a directory has the name of a file, or the folder is not a path; nothing has
            changed.
        OSError: if a file cannot be written, and nothing has changed; or if a file cannot be moved,
            and the new files are kept until the folder is opened again.
    """
    folder = files.as_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    with _staging_folder(folder) as staging:
        inner = staging / staging.name.removeprefix(STAGING)
        new = inner / _NEW
        (inner / _OLD).mkdir(parents=True)
        new.mkdir()
        yield new
        for name, text in texts.items():
            if text is not None:
                (new / name).write_text(text, encoding="utf-8")
        names = sorted(file.name for file in new.iterdir())
        folders = {name.removesuffix("/") for name in texts if name.endswith("/")}
        files_gone = (name for name in texts if name not in names and not name.endswith("/"))
        gone = [*map(glob.escape, (*files_gone, *folders)), *stale]
        for name in {*names, *_matching(folder, gone)} - folders:
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                raise ValueError(f"{folder / name} is a directory; expected a file, or nothing")
        plan = {"last": last, "new": names, "gone": gone}
        (inner / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
        (inner / _PLACEHOLDER).write_text(f"{last} is being replaced, see {SAVE}\n")
        for file in (*new.iterdir(), inner / _PLAN, inner / _PLACEHOLDER):
            # safetensors lets only their owner read its files.
            shutil.copymode(new / last, file)
            files.flush(file)
        for part in (new, inner, staging):
            files.flush(part)
        _commit(staging, folder)
    try:
        finish(folder)
        files.flush(folder)
    except OSError as error:
        raise OSError(
            f"{error}; the new files are whole in {folder / SAVE}: opening {folder}, or saving "
            "into it, ends what began"
        ) from error


def consistent(folder: Path, read: Callable[[], T]) -> T:
    """Return what `read` returns when all the files that it reads are of one save.

    A save that was killed in its swap is finished first, if the folder can be written to.

    Args:
        folder: the folder whose files are read.
        read: the function that reads. It is called again if a file changed meanwhile. The files
            that it opens through `nyscaled.checkpoints.files` are checked; open files and maps
            stay what they were.

    Raises:
        ValueError: if the files changed in each of `TRIES` readings, or if a save has begun to
            replace them that cannot be finished, as in a folder that cannot be written to.
    """
    if files.SEEN.get() is not None:  # part of a larger reading, which checks all of it
        return read()
    for attempt in range(TRIES):
        with contextlib.suppress(OSError):
            finish(folder)
        seen: dict[Path, files.Signature] = {}
        token = files.SEEN.set(seen)
        value, refusal = None, None
        try:
            value = read()
        except (ValueError, OSError) as error:
            refusal = error
        finally:
            files.SEEN.reset(token)
        # In this order: if no save had begun, and then all was as it had been read, it was so
        # at the moment in between.
        whole = False
        with contextlib.suppress(OSError):  # the save of somebody else
            whole = not _begun(folder)
        if whole and all(files.signature(path) == then for path, then in seen.items()):
            if refusal is not None:
                raise refusal
            return value  # pyright: ignore[reportReturnType]
        time.sleep(min(0.001 * attempt, 0.05))
    raise ValueError(
        f"{folder} changed each time that it was read, or a save in it has not ended ({SAVE} in "
        "it); expected a folder at rest, or one that can be written to"
    )


def finish(folder: Path) -> None:
    """Finish the save that has begun to replace files of a folder; remove what dead ones left.

    Raises:
        ValueError: on a `.nyscaled-save` that was not left by a save.
        OSError: if a file cannot be moved.
    """
    _tidy(folder)
    save = folder / SAVE
    for name in _begun(folder):
        _move_all(save / name, folder)
    with _unless(errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
        os.rmdir(save)


def _begun(folder: Path) -> list[str]:
    """The save that has begun to replace files, if there is one."""
    _require_own(folder / SAVE)
    try:
        return os.listdir(folder / SAVE)
    except (FileNotFoundError, NotADirectoryError):  # the folder may be a GGUF file
        return []


def _commit(staging: Path, folder: Path) -> None:
    """Rename the staging folder, once no other save is making its moves."""
    for _ in range(TRIES):
        with _unless(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(staging, folder / SAVE)
            return
        finish(folder)
    raise OSError(f"{folder} has other saves without an end; expected few at once")


def _move_all(inner: Path, folder: Path) -> None:
    """Move the files of a save that are not yet in their places."""
    for part in (inner, inner / _NEW, inner / _OLD):
        _require_own(part)
    try:
        last, new, gone = _read_plan(inner / _PLAN)
    except FileNotFoundError:  # all was moved
        shutil.rmtree(inner, ignore_errors=True)
        return
    names = set(new)
    _move(inner / _PLACEHOLDER, folder / last)
    for name in _matching(folder, gone):
        if name not in names:
            _move(folder / name, inner / _OLD / name)
    for name in (*(n for n in new if n != last), last):
        _move(inner / _NEW / name, folder / name)
    shutil.rmtree(inner / _OLD, ignore_errors=True)
    for remove, part in ((os.rmdir, _NEW), (os.unlink, _PLAN), (os.rmdir, "")):
        with _unless(errno.ENOENT):
            remove(inner / part)


def _require_own(path: Path) -> None:
    """Raise ValueError on a link: with it a folder could have files elsewhere moved or removed."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link; expected what a save leaves (remove it)")


def _move(source: Path, target: Path) -> None:
    """Move a file, if nobody else has done so."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(source, target)


def _read_plan(path: Path) -> tuple[str, list[str], list[str]]:
    """The plan of a save: the last of its files, all of its files, and patterns of files that go.

    Raises:
        ValueError: on anything that could name files elsewhere.
        FileNotFoundError: without it.
    """
    files.require_regular(path)
    last, new, gone = "", [], []
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        plan = json.loads(path.read_text(encoding="utf-8"))
        last, new, gone = plan["last"], plan["new"], plan["gone"]
    lists = isinstance(new, list) and isinstance(gone, list) and len(gone) <= _MAX_GONE
    if not lists or last not in new or not all(map(_is_name, [*new, *gone])):
        raise ValueError(
            f"{path} is not what a save writes; expected names of files (if nothing in "
            f"{path.parent} is needed, remove {path.parent.parent})"
        )
    return last, new, gone


def _is_name(value: object) -> bool:
    """Whether a value is the name of a file, or a pattern, that leads to no other folder."""
    return isinstance(value, str) and Path(value).name == value != ".." and "\0" not in value


def _matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The names in a folder, except hidden ones, that match a pattern."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


@contextlib.contextmanager
def _staging_folder(folder: Path) -> Generator[Path, None, None]:
    """A new folder, locked while its process lives: others do not remove it as a leftover."""
    for _ in range(TRIES):
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=STAGING))
        descriptor = None
        # Some file systems have no locks; leftovers stay there.
        with contextlib.suppress(OSError):
            descriptor = _lock(staging, wait=True)
        if staging.is_dir():  # else it was removed before it was locked
            break
        _unlock(descriptor)
    else:
        raise OSError(f"{folder} loses each folder that is made in it")
    with contextlib.ExitStack() as stack:
        stack.callback(_unlock, descriptor)
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        yield staging


def _tidy(folder: Path) -> None:
    """Remove what dead processes left."""
    if fcntl is None:
        return
    for staging in folder.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):  # it is locked, or of somebody else
            descriptor = _lock(staging, wait=False)
            try:
                shutil.rmtree(staging, ignore_errors=True)
            finally:
                _unlock(descriptor)


def _lock(path: Path, *, wait: bool) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def _unless(*numbers: int) -> Generator[None, None, None]:
    """Suppress an OSError of these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
