"""Runs that differ in one setting or two, and the table that compares them."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from nyscaled._files import replacing
from nyscaled.checkpoints.files import read_object
from nyscaled.finetune import dreambooth, identity
from nyscaled.finetune.chosen import require_method
from nyscaled.finetune.config import Config
from nyscaled.finetune.dreambooth import images, preparation
from nyscaled.finetune.dreambooth.step import LOSS
from nyscaled.finetune.folders import CONFIG, RECORD, SWEEP
from nyscaled.finetune.launch import run
from nyscaled.finetune.preparation import prepare
from nyscaled.finetune.progress import VALIDATION, NotFiniteError, say

PICTURE = "sweep.png"
SWEPT = (
    *("learning_rate", "method", "rank", "alpha", "scale", "damping", "ratio", "schedule"),
    *("warmup_steps", "weight_decay", "clip", "dropout", "seed"),
)
"""Settings that leave the number of steps as it is, and the examples; a seed chooses some."""

Value = int | float | str
Settings = Config | dreambooth.Config
S = TypeVar("S", Config, dreambooth.Config)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
        settings: the swept settings of the run.
        folder: its folder.
        loss: the loss by which runs are compared; None where one was not finite.
        accuracy: accuracy in that validation, None without candidates.
        best_step: number of steps before that loss.
        scores: means on the test examples.
        error: why the run stopped, None if it did not.
    """

    settings: dict[str, Value]
    folder: str
    loss: float | None = None
    accuracy: float | None = None
    best_step: int = 0
    scores: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Attributes:
        out: folder of the sweep; each run has a folder in it.
        runs: the runs.
        compared: what the loss is called by which they are compared.
    """

    out: Path
    runs: tuple[Run, ...]
    compared: str = VALIDATION

    @property
    def best(self) -> Run:
        """The run with the lowest loss."""
        return min(self.runs, key=lambda run: math.inf if run.loss is None else run.loss)

    def __str__(self) -> str:
        lines = [_line(run, self.compared, run is self.best) for run in self.runs]
        lines += [
            f"the best {name} is {self.best.settings[name]:g}, an end of the grid; try values "
            "beyond it"
            for name in _at_an_end(self)
        ]
        return "\n".join(lines)


def grid_of(text: str, kind: type[Settings] = Config) -> dict[str, tuple[Value, ...]]:
    """Return the settings of a sweep and their values.

    Args:
        text: a setting and its values as in "learning_rate=1e-4,3e-4"; a semicolon stands before a
            second one.
        kind: class of the settings.

    Raises:
        ValueError: on another form, a setting that is not in `SWEPT` or not of the class, a value
            of another type, and a value that stands there twice.

    Examples:
        >>> grid_of("learning_rate=1e-4,1e-3; method=lora,nora+")
        {'learning_rate': (0.0001, 0.001), 'method': ('lora', 'nora+')}
        >>> grid_of("scale=0.1,auto")
        {'scale': (0.1, 'auto')}
    """
    own = {field.name for field in dataclasses.fields(kind)}
    known = [name for name in SWEPT if name in own]
    grid: dict[str, tuple[Value, ...]] = {}
    for part in text.split(";"):
        name, mark, values = (x.strip() for x in part.partition("="))
        name = name.replace("-", "_")
        if not mark or name not in known or name in grid:
            raise ValueError(
                f"sweep is {text!r}; expected one setting or two, as in learning_rate=1e-4,3e-4 or "
                f"learning_rate=1e-4,3e-4;rank=4,8, of {', '.join(known)}"
            )
        grid[name] = tuple(_value(name, value.strip(), kind) for value in values.split(","))
        if len(set(grid[name])) < len(grid[name]):
            raise ValueError(f"sweep is {text!r}; expected each value of {name} once")
    if len(grid) > 2:
        raise ValueError(f"sweep is {text!r}, of {len(grid)} settings; expected one or two")
    return grid


def _value(name: str, text: str, kind: type[Settings]) -> Value:
    hint = get_type_hints(kind)[name]
    types = get_args(hint) or (hint,)
    if text in _words(types):
        return text
    read = next(cls for cls in (int, float, str) if cls in types)
    try:
        return read(text)
    except ValueError:
        raise ValueError(f"sweep has {name}={text!r}; expected {read.__name__} values") from None


def _words(types: tuple[object, ...]) -> set[object]:
    """The texts of literal types, such as "auto"."""
    return {word for cls in types for word in get_args(cls)}


def configs(config: S) -> Iterator[tuple[dict[str, Value], S]]:
    """Yield the swept settings and the configuration of each run.

    Args:
        config: settings with a `sweep`.

    Raises:
        ValueError: as `grid_of` does, and on values that a configuration refuses.
    """
    assert config.sweep is not None
    grid = grid_of(config.sweep, type(config))
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        folder = config.out / ",".join(f"{name}={value}" for name, value in settings.items())
        changes: Mapping[str, object] = {**settings, "out": folder, "sweep": None}
        goes_on = config.resume and (folder / CONFIG).exists()
        own = dataclasses.replace(config, **changes, resume=goes_on)  # pyright: ignore[reportArgumentType]
        require_method(own)
        yield settings, own


def require_possible(planned: Sequence[tuple[dict[str, Value], Settings]]) -> None:
    """Refuse before the first run of a sweep what a later one would refuse; no weight is read.

    Args:
        planned: the runs, as from `configs`.

    Raises:
        ValueError: as `run` does; the message begins with the settings of the run.
    """
    checked: set[tuple[object, ...]] = set()
    for settings, own in planned:
        # The configuration itself refuses other wrong settings. Seeds draw other examples.
        point = own.method, own.rank, own.warmup_steps, own.seed
        if own.resume or point in checked:
            continue
        checked.add(point)
        try:
            if isinstance(own, dreambooth.Config):
                pipe = preparation.opened(own, outline=True)
                preparation.prepare(own, pipe, outline=True)
            else:
                prepare(own, outline=True)
        except ValueError as error:
            raise ValueError(f"{_shown(settings)}: {error}") from error


def sweep(config: S) -> Sweep:
    """Make a run for each value of a setting, or for each pair of values of two, and compare them.

    All have the same data and the same number of steps; those of one seed have the same examples,
    in the same order. The folder gets `sweep.json`, a picture and a folder per run. A run whose
    loss is not finite is a row of the table like others. With `resume`, finished runs are kept, and
    the grid may have more values than before.

    Args:
        config: the settings, those of `dreambooth` or others, with a `sweep` such as
            "learning_rate=1e-4,3e-4,1e-3".

    Raises:
        ValueError: as `run` does, on another form of the sweep, on a folder that has a run, if the
            data have changed between two runs, and if no run has a finite loss.

    Examples:
        >>> config = Config(model="m", data=Path("d"), task="rte", out=Path("o"), sweep="steps=3")
        >>> try:
        ...     sweep(config)
        ... except ValueError as error:
        ...     print(str(error)[:40])
        sweep is 'steps=3'; expected one setting
    """
    if config.sweep is None:
        raise ValueError("sweep is None; expected a setting with values (or nys.finetune.run)")
    planned = list(configs(config))
    if (config.out / CONFIG).exists():
        raise ValueError(
            f"{config.out} has a run; expected another --out for a sweep, also with --resume (a "
            "run is not a part of a sweep)"
        )
    if (config.out / SWEEP).exists() and not config.resume:
        raise ValueError(f"{config.out} has a sweep; expected --resume, or another --out")
    require_possible(planned)
    done = Sweep(config.out, (), VALIDATION if isinstance(config, Config) else LOSS)
    for number, (settings, own) in enumerate(planned, 1):
        say(f"run {number} of {len(planned)}: {_shown(settings)}")
        done = dataclasses.replace(done, runs=(*done.runs, _run(settings, own)))
        first = next(other for _, other in planned if other.seed == own.seed)
        _require_same_examples(first.out, own.out)
        _write(done)
    if done.best.loss is None:
        raise ValueError(f"no run of the sweep has a finite loss: {done.best.error}")
    return done


def _run(settings: dict[str, Value], config: Settings) -> Run:
    row = Run(settings, config.out.name)
    try:
        if isinstance(config, dreambooth.Config):
            result = dreambooth.run(config)
            return dataclasses.replace(row, loss=result.loss, best_step=result.steps)
        result = run(config)
    except NotFiniteError as error:
        return dataclasses.replace(row, error=str(error))
    own = {name: getattr(result, name) for name in ("accuracy", "best_step", "scores")}
    return dataclasses.replace(row, loss=result.validation_loss, **own)


def _require_same_examples(first: Path, other: Path) -> None:
    """Refuse runs of other examples: a finished one does not read the data again."""
    one, two = (read_object(out / RECORD, "the record of a run") for out in (first, other))
    if "images" not in one:
        one, two = (identity.recorded(out / RECORD, x) for out, x in ((first, one), (other, two)))
        identity.require_examples(first, one, two)
        return
    before, now = (images.read_record(out)["images"] for out in (first, other))
    for name in ("images", "class_images"):
        what = f"the files in {name}"
        images.require_same(what, first, before[name], now[name], "the same files")


def _write(done: Sweep) -> None:
    runs = [dataclasses.asdict(run) for run in done.runs]
    with replacing(done.out / SWEEP) as file:
        table = {"best": done.best.folder, "compared": done.compared, "runs": runs}
        file.write((json.dumps(table, indent=2) + "\n").encode())
    if importlib.util.find_spec("matplotlib") is not None:
        from nyscaled.finetune.sweep_picture import draw

        with replacing(done.out / PICTURE) as file:
            draw(done.runs, done.compared).savefig(file, format="png", dpi=160)


def _shown(settings: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _line(run: Run, compared: str, best: bool) -> str:
    if run.loss is None:
        return f"{_shown(run.settings)}: {run.error}"
    accuracy = "" if run.accuracy is None else f", accuracy {run.accuracy:.3f}"
    mark = " (best)" if best else ""
    return f"{_shown(run.settings)}: {compared} {run.loss:.4f}{accuracy}{mark}"


def _at_an_end(done: Sweep) -> list[str]:
    """The settings of which the best value is the least or the greatest of several numbers."""
    names: list[str] = []
    for name, best in done.best.settings.items():
        values = [run.settings[name] for run in done.runs]
        numbers = {float(value) for value in values if not isinstance(value, str)}
        ends = {min(numbers), max(numbers)} - {0.0} if numbers else set[float]()
        if name != "seed" and len(numbers) > 1 and best in ends:  # nothing is below 0
            names.append(name)
    return names
