"""Metrics for TensorBoard and Weights & Biases, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol

EVENTS = "tensorboard"
"""Folder of TensorBoard's events, in that of a run."""
PROJECT = "nyscaled"
MODULES = {"tensorboard": ("tensorboardX", "torch.utils.tensorboard"), "wandb": ("wandb",)}
"""Modules that trackers need, of which the first that is installed is used."""

Settings = Mapping[str, object]


class Tracker(Protocol):
    """What takes the metrics of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take values of a step, by their names."""
        ...

    def close(self) -> None:
        """Write what is held back."""
        ...


class TensorBoard:
    """Events of TensorBoard, by tensorboardX or torch.

    Args:
        folder: folder of the run.
        settings: settings of the run.
        start: number of steps before; events after it are hidden.
    """

    def __init__(self, folder: Path, settings: Settings, start: int) -> None:
        module = package_of("tensorboard")
        self._writer = module.SummaryWriter(str(folder / EVENTS), purge_step=start + 1)
        self._writer.add_text("settings", "\n".join(f"- {k}: {v}" for k, v in settings.items()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take values of a step, by their names."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is held back."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, which the package's own settings send to its server or not.

    Args:
        folder: folder of the run.
        settings: settings of the run.
        start: number of steps before.
    """

    def __init__(self, folder: Path, settings: Settings, start: int) -> None:
        self._run = package_of("wandb").init(
            project=PROJECT, name=folder.name, dir=str(folder), config=dict(settings)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take values of a step, by their names."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is held back."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Settings, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}
"""Trackers by their names: functions of a folder, the settings and the steps before."""


class Tracked:
    """The tracker of a run, open in the body of a `with`; one that does nothing for None.

    Args:
        name: a name in `TRACKERS`, or None.
        folder: folder of the run.
        settings: settings of the run.
        start: number of steps before.

    Raises:
        ImportError: if its package is missing.
    """

    def __init__(self, name: str | None, folder: Path, settings: Settings, start: int) -> None:
        self._tracker = None if name is None else TRACKERS[name](folder, settings, start)

    def __enter__(self) -> Tracked:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tracker is not None:
            self._tracker.close()

    def write(self, line: Mapping[str, float]) -> None:
        """Take a line of the metrics.

        Args:
            line: values by their names, `step` among them.
        """
        if self._tracker is not None:
            values = {name: value for name, value in line.items() if name != "step"}
            self._tracker.write(int(line["step"]), values)


def package_of(name: str) -> ModuleType:
    """Return the module behind a tracker.

    Args:
        name: a name in `TRACKERS`.

    Raises:
        ImportError: if it is not installed.
    """
    for module in MODULES[name]:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
    package = MODULES[name][0]
    raise ImportError(f"log is {name!r}, which needs {package}: pip install {package}")
