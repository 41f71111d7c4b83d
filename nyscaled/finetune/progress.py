"""What a run says while it goes on: a bar, a line of metrics per step, and why it stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

from nyscaled._files import replacing
from nyscaled.finetune import processes
from nyscaled.finetune.trackers import Tracked

METRICS = "metrics.jsonl"
VALIDATION = "validation loss"
"""Name of the loss of the examples for validation; with underscores it is its column."""

Line = dict[str, float]
"""A line of the metrics."""
Handler = Callable[[int, FrameType | None], object] | int | None


@runtime_checkable
class Measured(Protocol):
    """What a step measured, a tuple with names; the other entries are metrics too."""

    @property
    def loss(self) -> Float[Array, ""]:
        """The loss."""
        ...

    @property
    def finite(self) -> Bool[Array, ""]:
        """False if the step was not made, since a loss or a gradient was not finite."""
        ...

    def _asdict(self) -> dict[str, Array]: ...


class NotFiniteError(ValueError):
    """A run has a loss or a gradient that is not finite."""


class Progress:
    """The bar and `metrics.jsonl` of a run.

    Lines of steps have loss, learning_rate, gradient_norm and tokens; lines of evaluations have
    a loss under its own name, such as validation_loss. A run that goes on removes the lines after
    its checkpoint first.

    Args:
        folder: folder of the run.
        start: number of steps that were made before.
        steps: number of steps of the run.
        visible: whether to draw the bar; None for where stderr is a terminal.
        tracked: gets the lines too.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        steps: int,
        visible: bool | None = None,
        tracked: Tracked | None = None,
    ) -> None:
        self._tracked = tracked
        self.path = folder / METRICS
        keep_until(self.path, start)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._began, self._tokens = time.perf_counter(), 0
        hidden = (None if visible is None else not visible) if processes.is_first() else True
        self._bar = tqdm(
            total=steps, initial=start, unit="step", file=sys.stderr, disable=hidden, leave=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._file.close()

    def steps(self, lines: Sequence[Line]) -> None:
        """Write the lines of some steps, and move the bar.

        Args:
            lines: metrics of each step, with its number, and its tokens if it reads texts.
        """
        seconds = time.perf_counter() - self._began
        self._tokens += sum(line.get("tokens", 0) for line in lines)
        self._write([{**line, "seconds": round(seconds, 3)} for line in lines])
        self._bar.update(len(lines))
        rate = f", {self._tokens / max(seconds, 1e-9):.0f} tokens/s" if self._tokens else ""
        self._bar.set_postfix_str(f"loss {lines[-1]['loss']:.4f}{rate}")

    def evaluation(
        self, step: int, loss: float, accuracy: float | None = None, *, name: str = VALIDATION
    ) -> None:
        """Write the line of an evaluation.

        Args:
            step: number of steps before it.
            loss: its loss.
            accuracy: its accuracy, if there are candidates.
            name: what the loss is called.
        """
        line, text = {"step": step, column(name): loss}, f"{name} {loss:.4f}"
        if accuracy is not None:
            line, text = line | {"accuracy": accuracy}, f"{text}, accuracy {accuracy:.3f}"
        self._write([line])
        self.say(f"step {step}: {text}")

    def measured(
        self,
        pending: Sequence[tuple[int, Measured]],
        rate: Callable[[int], np.float32],
        sources: Callable[[int], Sequence[str]],
        dtype: str,
    ) -> str | None:
        """Write the lines of steps; return what to say of the first one that is not finite.

        Args:
            pending: steps, and what they measured.
            rate: learning rate by the number of steps before.
            sources: files and lines of the examples of a step, by the number of steps before.
            dtype: dtype of the base.
        """
        lines: list[Line] = []
        message = None
        for step, measured in jax.device_get(pending):
            learning_rate = float(f"{rate(step - 1):.6g}")
            if not measured.finite:
                own, loss = sources(step - 1), float(measured.loss)
                message = not_finite(step, loss, own, learning_rate, dtype)
                break
            values = {k: v.item() for k, v in measured._asdict().items() if k != "finite"}
            lines.append({"step": step, "learning_rate": learning_rate, **values})
        if lines:
            self.steps(lines)
        return message

    def say(self, text: str) -> None:
        """Write a line above the bar, to stderr, in the first process."""
        if processes.is_first():
            self._bar.write(text, file=sys.stderr)

    def _write(self, lines: Sequence[Line]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tracked is not None:
            for line in lines:
                self._tracked.write(line)


def column(name: str) -> str:
    """Return the name of a loss in `metrics.jsonl`.

    Args:
        name: its name for people.
    """
    return name.replace(" ", "_")


def read_metrics(path: Path) -> list[Line]:
    """Return the whole lines of `metrics.jsonl`; a process may have been killed in the last.

    Args:
        path: path of the file.
    """
    if not path.exists():
        return []
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def keep_until(path: Path, step: int) -> None:
    """Remove the lines after a step from `metrics.jsonl`.

    Args:
        path: path of the file.
        step: the last step to keep.
    """
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        with replacing(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


class Interruption:
    """Whether the user or the system asked the run to stop: Ctrl-C, or SIGTERM.

    The first signal only sets `asked`, so that the run stops between two steps; the second one
    interrupts as usual.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruption:
        self._old: dict[int, Handler] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def timed(name: str) -> Generator[None, None, None]:
    """Say on stderr what is done and how long it took, in the first process.

    Args:
        name: what is done.
    """
    if not processes.is_first():
        yield
        return
    began = time.perf_counter()
    print(f"{name} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f" {time.perf_counter() - began:.1f} s", file=sys.stderr)


def say(text: str) -> None:
    """Write a line to stderr, in the first process.

    Args:
        text: the line.
    """
    if processes.is_first():
        print(text, file=sys.stderr, flush=True)


def not_finite(
    step: int, loss: float, sources: Sequence[str], learning_rate: float, dtype: str
) -> str:
    """Return what a run says that stops at a loss or a gradient which is not finite.

    Args:
        step: the step, counted from 1.
        loss: its loss.
        sources: files and lines of its examples.
        learning_rate: its learning rate.
        dtype: dtype of the base.
    """
    what = "the gradient is not finite" if abs(loss) < float("inf") else f"the loss is {loss}"
    return (
        f"{what} at step {step}, of the examples {', '.join(filter(None, sources)) or 'unknown'}; "
        f"expected finite numbers (try {_advice(learning_rate, dtype)}). The checkpoint has the "
        "state before this step"
    )


def not_finite_in_evaluation(
    step: int, loss: float, learning_rate: float, dtype: str, *, name: str = VALIDATION
) -> str:
    """Return what a run says that stops at an evaluation whose loss is not finite.

    Args:
        step: number of steps before the evaluation.
        loss: its loss.
        learning_rate: learning rate of the last step.
        dtype: dtype of the base.
        name: what the loss is called.
    """
    return (
        f"the {name} is {loss} after step {step}; expected a finite number (try "
        f"{_advice(learning_rate, dtype)}). A checkpoint, if there is one, is of a state before it"
    )


def _advice(learning_rate: float, dtype: str) -> str:
    advice = f"a lower --learning-rate (it was {learning_rate:.3g}), or a lower --clip"
    return advice if dtype == "float32" else f"{advice}, or --dtype float32 in place of {dtype}"
