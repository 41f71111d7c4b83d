"""Several processes of one run: how each is started, and what they say to each other.

All processes make the same calls in the same order. What is said goes through the service by which
JAX's processes know each other, and so needs no device.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

T = TypeVar("T")

AUTO = "auto"
FORM = (
    "the address of the first process, their number and the index of this one, as in "
    "10.0.0.1:8476,2,0"
)
PATIENCE = 86_400_000
"""Most milliseconds to wait for another process: a day, since one may score many examples."""

_numbers = itertools.count()


def parsed(text: str) -> tuple[str, int, int] | None:
    """Return the address of the first process, their number, and the index of this one.

    Args:
        text: these with commas between them, or "auto", for which it is None.

    Raises:
        ValueError: on another form.

    Examples:
        >>> parsed("10.0.0.1:8476,2,1")
        ('10.0.0.1:8476', 2, 1)
    """
    if text == AUTO:
        return None
    address, *numbers = (part.strip() for part in text.split(","))
    if len(numbers) == 2 and all(x.isdecimal() for x in numbers):
        count, index = map(int, numbers)
        if index < count and address.rpartition(":")[2].isdecimal() and ":" in address:
            return address, count, index
    raise ValueError(f"processes is {text!r}; expected {AUTO}, or {FORM}")


def start(text: str | None) -> None:
    """Make this process one of several, unless it is one; nothing for None.

    Args:
        text: as in `parsed`; for "auto", JAX asks the cluster.

    Raises:
        ValueError: on another form, and where no cluster is known.
    """
    if text is None or jax.distributed.is_initialized():
        return
    given = parsed(text)
    if given is not None:
        jax.distributed.initialize(given[0], num_processes=given[1], process_id=given[2])
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"processes is {AUTO!r}, and JAX knows no cluster here ({error}); expected {FORM}"
        ) from error


def are_several() -> bool:
    """Return whether there is another process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process is the one that writes files."""
    return jax.process_index() == 0


def gathered(value: T) -> list[T]:
    """Return the values of all processes, after all of them have called this.

    Args:
        value: that of this process, as JSON has it.
    """
    if not are_several():
        return [value]
    client, name = multihost.get_jax_distributed_client(), f"nyscaled/{next(_numbers)}"
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    names = (f"{name}/{index}" for index in range(jax.process_count()))
    return [json.loads(client.blocking_key_value_get(name, PATIENCE)) for name in names]


def require_same(what: str, value: object) -> None:
    """Refuse a run whose processes differ.

    Args:
        what: what is compared, in the plural.
        value: that of this process; strings stand for what JSON does not have.

    Raises:
        ValueError: in all processes, if the values differ.
    """
    texts = gathered(json.dumps(value, sort_keys=True, default=str))
    for index, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"process {index} has other {what} than process 0; expected the same command and "
                "data in each"
            )


def is_any(value: bool, *, ask: bool) -> bool:
    """Return whether a value is true in any process.

    Args:
        value: that of this process.
        ask: whether to ask the others. The value is false where they are not asked.
    """
    return any(gathered(value)) if are_several() and ask else value and not are_several()


def together(make: Callable[[], T]) -> T:
    """Return what a function returns in this process, if it raises in none of them.

    Args:
        make: the function.

    Raises:
        ValueError: if it raises in another process. An error of this one is raised as it is.
    """
    if not are_several():
        return make()
    try:
        value = make()
    except Exception as error:
        gathered(str(error) or repr(error))
        raise
    for index, error in enumerate(gathered("")):
        if error:
            raise ValueError(f"process {index} stopped: {error}")
    return value


def from_first(make: Callable[[], T]) -> T:
    """Return what a function returns in the first process, the only one that calls it.

    Args:
        make: a function whose value is one that JSON has.

    Raises:
        ValueError: in the other processes, if it raises in the first.
    """
    if not are_several():
        return make()
    value = together(lambda: make() if is_first() else None)
    return gathered(value)[0]  # pyright: ignore[reportReturnType]


def same(tree: T) -> T:
    """Return the arrays of the first process, on the devices of this one.

    Args:
        tree: arrays, of equal shapes in all processes.
    """
    if not are_several():
        return tree
    values = multihost_utils.broadcast_one_to_all(jax.device_get(tree))
    return jax.tree.map(lambda x, value: jax.device_put(value, x.sharding), tree, values)


@contextlib.contextmanager
def written(folder: Path) -> Generator[Path, None, None]:
    """Yield a folder in the first process, and one that is removed in the others.

    Args:
        folder: the folder.
    """
    if is_first():
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
