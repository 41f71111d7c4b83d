"""A run of fine-tuning: from settings to a folder with a tested adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from nyscaled.checkpoints import files
from nyscaled.finetune import folders, identity, loop, meshes, processes, training
from nyscaled.finetune.chosen import require_kind
from nyscaled.finetune.config import NOT_THE_RUN, Config, as_options
from nyscaled.finetune.evaluation import Evaluation, evaluate
from nyscaled.finetune.examples import Example
from nyscaled.finetune.folders import RECORD, RESULT, write_json
from nyscaled.finetune.methods import method
from nyscaled.finetune.preparation import Prepared, prepare
from nyscaled.finetune.progress import say, timed
from nyscaled.finetune.records import HUB, find_splits
from nyscaled.finetune.saving import save, unchanged
from nyscaled.finetune.tasks import by_name
from nyscaled.finetune.trackers import package_of

EVALUATION = "evaluation.json"
MOSTLY = 0.5
"""Share of numbers from which on a run says that a narrow dtype rounds their updates away."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        out: folder of the run; its `adapter` is in PEFT's format, a whole model or a prefix.
        steps: number of steps.
        best_step: number of steps before the validation with the lowest loss.
        validation_loss: that loss; the adapter is that of this step.
        accuracy: accuracy in that validation, None without candidates.
        scores: means on the test examples, or of generated answers, by name.
        difference: largest difference between scores of the trained model and of the saved one.
        parameters: number of trained numbers.
        seconds: time of the training, since it last went on.
    """

    out: Path
    steps: int
    best_step: int
    validation_loss: float
    accuracy: float | None
    scores: dict[str, float]
    difference: float
    parameters: int
    seconds: float


def run(config: Config) -> Result:
    """Fine-tune a model, and write an adapter that was read again and compared.

    The folder gets `config.yaml`, `run.json` (versions and command), `metrics.jsonl`, `adapter`,
    `result.json` and `checkpoints`. With `resume`, a run goes on after its newest checkpoint, and
    ends as it would have without the interruption.

    Args:
        config: the settings.

    Raises:
        ValueError: on settings, data and models that do not go together, a folder that has a run
            already, a run of other settings, one that goes on in another process, and a loss that
            is not finite.
        OSError: if a file cannot be written.
        KeyboardInterrupt: after Ctrl-C, when the state is saved.

    Examples:
        >>> from nyscaled.finetune import Config
        >>> config = Config(model="model", data=Path("absent"), task="rte", out=Path("run"))
        >>> try:
        ...     run(config)
        ... except ValueError as error:
        ...     print(str(error)[:38])
        data is 'absent', which does not exist
    """
    require_kind(
        config,
        Config,
        "nys.finetune.Config (nys.finetune.dreambooth.run takes settings of DreamBooth)",
    )
    if config.dry_run:
        raise ValueError(
            "dry_run is True; expected False (nyscaled.finetune.preview.preview says what a run "
            "will do)"
        )
    if config.sweep is not None:
        raise ValueError(f"sweep is {config.sweep!r}; expected None (nys.finetune.sweep has it)")
    processes.start(config.processes)
    own = ("processes", "out", "config")
    settings = {k: v for k, v in as_options(config).items() if k not in own}
    processes.require_same("settings", settings)
    processes.together(partial(_require_known, config))
    finished = processes.from_first(lambda: _read_finished(config))
    if finished is None:
        with meshes.using(config.mesh):
            finished = _made(config)
    return Result(**(finished | {"out": config.out}))  # pyright: ignore[reportArgumentType]


def _require_known(config: Config) -> None:
    """Refuse what can be refused before a folder is made or a model is read."""
    method(config.method)
    task = by_name(config.task)
    if config.template is not None:
        task.template(config.template)
    if config.log is not None:
        package_of(config.log)
    if not str(config.data).startswith(HUB):
        find_splits(config.data)
    size = config.micro_batch_size or config.batch_size
    parts = meshes.parts_of(config.mesh)
    if size % parts:
        raise ValueError(
            f"a micro-batch has {size} examples; expected a multiple of {parts}, so that each "
            "process and each part of the mesh has as many"
        )


def _made(config: Config) -> dict[str, object]:
    """Make a run whose settings were looked at, and return what `result.json` holds."""
    prepared = processes.together(lambda: prepare(config))
    processes.require_same("examples", prepared.digests)
    if processes.are_several():
        processes.require_same("weights", identity.of_base(config.model))
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(folders.held(config.out))
            claim(prepared)

        # After all that may be refused, so that the mended command has the folder.
        processes.from_first(take)
        return _trained(prepared)


def _trained(prepared: Prepared) -> dict[str, object]:
    """Train in a folder of this run, and return what `result.json` holds."""
    config, began = prepared.config, time.perf_counter()
    trained = loop.train(prepared.plan, config.out)
    seconds = time.perf_counter() - began
    share = unchanged(prepared.plan.parts, trained.variables)
    if share > MOSTLY and config.dtype != "float32":
        say(
            f"{share:.0%} of the trained numbers are the same in {config.dtype} as before, which "
            "rounds their updates away; --dtype float32 keeps them"
        )
    training.update(prepared.model, trained.variables)
    parts = training.split(prepared.model, prepared.trained)
    validation = dataclasses.replace(prepared.plan, parts=parts).validate(parts.params)
    return processes.from_first(lambda: _written(prepared, trained, validation, seconds))


def _written(
    prepared: Prepared, trained: loop.Trained, validation: training.Validation, seconds: float
) -> dict[str, object]:
    """Write what was trained and its scores, and return what `result.json` holds."""
    config = prepared.config
    with timed("writing the adapter, and reading it again"):
        difference = save(prepared)
    result = Result(
        config.out,
        trained.steps,
        trained.best.step,
        validation.loss,
        validation.accuracy,
        _evaluate(prepared),
        difference,
        count(prepared.plan.parts.params),
        round(seconds, 3),
    )
    if importlib.util.find_spec("matplotlib") is not None:
        from nyscaled.finetune import curves

        curves.write(config.out)
    values: dict[str, object] = {**dataclasses.asdict(result), "out": str(config.out)}
    write_json(config.out / RESULT, values)
    return values


def _evaluate(prepared: Prepared) -> dict[str, float]:
    """The scores on the test examples; they are written with the predictions."""
    config, examples = prepared.config, prepared.examples
    if not examples.test:
        return {}
    with timed(f"scoring {len(examples.test)} examples"):
        evaluation = scored(prepared, examples.test)
    scores = {name: score._asdict() for name, score in evaluation.scores.items()}
    predictions = [dataclasses.asdict(prediction) for prediction in evaluation.predictions]
    write_json(
        config.out / EVALUATION,
        {"split": examples.scored, "scores": scores, "predictions": predictions},
    )
    return {name: score.value for name, score in evaluation.scores.items()}


def scored(prepared: Prepared, examples: Sequence[Example]) -> Evaluation:
    """Return the scores of a run's model.

    Args:
        prepared: the run.
        examples: the examples to score.
    """
    config = prepared.config
    return evaluate(
        prepared.model,
        prepared.tokenizer,
        examples,
        prepared.examples.task,
        batch_size=config.micro_batch_size or prepared.plan.config.batch_size,
        max_length=config.max_length,
        allow_cut=config.allow_cut,
    )


def _read_finished(config: Config) -> dict[str, object] | None:
    """Return what `result.json` of a finished run holds, None for one to begin or to go on.

    Args:
        config: the settings.

    Raises:
        ValueError: if the folder has a run and is not to go on, or has one of other settings.
    """
    options = folders.begun(config.out, resume=config.resume)
    if options is None:
        return None
    return folders.finished(config.out, options, as_options(config), NOT_THE_RUN, Config, Result)


def claim(prepared: Prepared) -> None:
    """Write the settings of a run that begins into its folder; compare those of one that goes on.

    Args:
        prepared: the run, to which the folder is held.

    Raises:
        ValueError: if the run in the folder began with another base or other examples, or while
            this one was prepared.
    """
    config = prepared.config
    if folders.begun(config.out, resume=config.resume) is not None:
        identity.require_base(config.out, config.model)
        if not (config.out / identity.FILE).exists():
            identity.write_base(config.out, identity.of_base(config.model))
        record = files.read_object(config.out / RECORD, "the record of a run, or another --out")
        saved = identity.recorded(config.out / RECORD, record)
        identity.require_examples(config.out, saved, prepared.digests)
        return
    identity.write_base(config.out, identity.of_base(config.model))
    folders.begin(config.out, as_options(config), {"examples": prepared.digests})


def digest_of_test(adapter: Path) -> identity.Digest | None:
    """Return what identifies the test examples that the run of an adapter scored.

    Args:
        adapter: folder of the adapter.

    Returns:
        None if there were none, or if the folder is not in that of its run any more.
    """
    path = adapter.resolve().parent / RECORD
    if not path.exists():
        return None
    return identity.recorded(path, files.read_object(path, "the record of a run")).get("test")


def count(params: training.Tree) -> int:
    """Return how many numbers are trained.

    Args:
        params: the trained variables.
    """
    return sum(x.size for x in jax.tree.leaves(params))
