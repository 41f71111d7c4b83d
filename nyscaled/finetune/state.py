"""Checkpoints of a run, by orbax: a folder per step, which exists whole or not at all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TypeVar, cast

import jax
import orbax.checkpoint as ocp
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike

from nyscaled.checkpoints.files import brief
from nyscaled.finetune import processes

T = TypeVar("T")
Facts = Mapping[str, float | str | None]
"""Numbers and texts of the host, as JSON has them."""


class Checkpoints:
    """The newest checkpoints in a folder, which the first process writes and reads.

    A checkpoint is written to a folder of another name, which gets its own name at the end. So a
    process that is killed, or a disk that is full, leaves the checkpoints that were there.

    Args:
        folder: the folder; made at the first checkpoint.
        keep: number of checkpoints to keep.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(Path(folder) / "checkpoints")
        ...     checkpoints.save(3, {"x": np.arange(2)}, {"best": 0.5})
        ...     checkpoints.restore({"x": np.zeros(2, int)})
        (3, {'x': array([0, 1])}, {'best': 0.5})
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder.resolve(), keep

    @contextlib.contextmanager
    def _manager(self) -> Generator[ocp.CheckpointManager, None, None]:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep,
            create=False,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0} if processes.are_several() else None
            ),
        )
        with _quiet(), ocp.CheckpointManager(self.folder, options=options) as manager:
            yield manager

    def save(self, step: int, tree: object, facts: Facts) -> None:
        """Write a checkpoint, and remove the oldest beyond the number to keep.

        Args:
            step: number of steps that were made. A checkpoint of this step is replaced.
            tree: arrays.
            facts: numbers and texts.

        Raises:
            OSError: if it cannot be written; the older ones are still there.
        """
        processes.from_first(lambda: self._save(step, tree, facts))

    def _save(self, step: int, tree: object, facts: Facts) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = ocp.args.Composite(
            arrays=ocp.args.StandardSave(_named(tree)), facts=ocp.args.JsonSave(dict(facts))
        )
        with self._manager() as manager:
            try:
                if step in manager.all_steps():  # of a run that was ended after it
                    manager.delete(step)
                manager.save(step, args=arguments, force=True)
            except (ValueError, RuntimeError) as error:  # of tensorstore, on a full disk
                raise OSError(f"{self.folder} cannot take a checkpoint: {error}") from error

    def restore(self, tree: T) -> tuple[int, T, Facts] | None:
        """Return the step of the newest checkpoint, its arrays and its facts; None without one.

        Args:
            tree: arrays of the structure, shapes and dtypes of the saved ones.

        Raises:
            ValueError: on a checkpoint of other arrays, and one that cannot be read.
        """
        if not processes.are_several():
            return self._restore(tree)
        saved = processes.together(lambda: self._restore(tree) if processes.is_first() else None)
        said = processes.gathered(None if saved is None else (saved[0], dict(saved[2])))[0]
        if said is None:
            return None
        if saved is not None:
            tree = jax.tree.map(lambda x, value: jax.device_put(value, x.sharding), tree, saved[1])
        return said[0], processes.same(tree), said[1]

    def _restore(self, tree: T) -> tuple[int, T, Facts] | None:
        if not self.folder.is_dir():
            return None
        with self._manager() as manager:
            step = manager.latest_step()
            if step is None:
                return None
            named = _named(tree)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, named)
            arguments = ocp.args.Composite(
                arrays=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
            )
            try:
                restored = cast(ocp.args.Composite, manager.restore(step, args=arguments))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self.folder / str(step)} has other arrays: {error}") from error
            except (OSError, ValueError) as error:  # of many kinds, on files that were changed
                raise ValueError(
                    f"{self.folder / str(step)} cannot be read: {brief(error)}; expected a whole "
                    "checkpoint (without this folder, the run goes on from the one before)"
                ) from error
        values = [restored.arrays[name] for name in named]
        return step, jax.tree.unflatten(jax.tree.structure(tree), values), restored.facts


def _named(tree: object) -> dict[str, ArrayLike]:
    if processes.are_several():  # orbax then takes an array for a part of one
        tree = jax.device_get(tree)
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep orbax's notes on each file out of the terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
