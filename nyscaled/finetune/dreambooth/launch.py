"""A run from settings to a folder with a tested adapter."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from nyscaled import lora
from nyscaled._files import replacing
from nyscaled.finetune import folders, identity, meshes, training
from nyscaled.finetune.chosen import require_kind
from nyscaled.finetune.dreambooth import images
from nyscaled.finetune.dreambooth.base import of_pipeline
from nyscaled.finetune.dreambooth.config import EXPECTED, NOT_THE_RUN, Config, as_options
from nyscaled.finetune.dreambooth.denoiser import Denoiser
from nyscaled.finetune.dreambooth.loop import train
from nyscaled.finetune.dreambooth.plan import Plan
from nyscaled.finetune.dreambooth.preparation import Prepared, opened, prepare
from nyscaled.finetune.dreambooth.priors import class_pictures
from nyscaled.finetune.dreambooth.samples import sampler
from nyscaled.finetune.dreambooth.step import LOSS, Grid
from nyscaled.finetune.launch import count
from nyscaled.finetune.progress import timed
from nyscaled.finetune.saving import ADAPTER, compare, require_close
from nyscaled.finetune.trackers import package_of


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        out: folder of the run; `nys.lora.load_diffusers` reads its `adapter`.
        steps: number of steps.
        base_loss: mean squared error on fixed times and noises before the first step.
        loss: that after the last step.
        difference: largest difference between predictions of the trained model and of the saved
            one.
        parameters: number of trained numbers.
        seconds: time of the training.
    """

    out: Path
    steps: int
    base_loss: float
    loss: float
    difference: float
    parameters: int
    seconds: float


def run(config: Config) -> Result:
    """Fine-tune a pipeline, and write an adapter that was read again and compared.

    The folder gets `config.yaml`, `run.json` (versions and command), `metrics.jsonl`, `adapter`,
    `result.json` and `checkpoints`, and `samples` and `class_images` if they are asked for. The
    adapter is that of the last step. With `resume`, a run goes on after its newest checkpoint, and
    ends as it would have without the interruption.

    Args:
        config: the settings.

    Raises:
        ValueError: on settings, images and models that do not go together, a folder that has a run
            already, a run of other settings, one that goes on in another process, and a loss that
            is not finite.
        OSError: if a file cannot be written.
        KeyboardInterrupt: after Ctrl-C, when the state is saved.

    Examples:
        >>> config = Config(model="sd", images=Path("absent"), prompt="a sks", out=Path("run"))
        >>> try:
        ...     run(config)
        ... except ValueError as error:
        ...     print(str(error)[:40])
        images is 'absent', which does not exist
    """
    require_kind(config, Config, EXPECTED)
    if config.dry_run:
        raise ValueError(
            "dry_run is True; expected False (nys.finetune.dreambooth.preview says what a run will "
            "do)"
        )
    if config.sweep is not None:
        raise ValueError(f"sweep is {config.sweep!r}; expected None (nys.finetune.sweep has it)")
    _require_known(config)
    options = folders.begun(config.out, resume=config.resume)
    result = None
    if options is not None:
        now = as_options(config)
        result = folders.finished(config.out, options, now, NOT_THE_RUN, Config, Result)
    if result is None:
        with meshes.using(config.mesh):
            result = _made(config)
    return Result(**(result | {"out": config.out}))  # pyright: ignore[reportArgumentType]


def _require_known(config: Config) -> None:
    """Refuse what can be refused before a model is read."""
    for name in ("images", "class_images"):
        folder: Path | None = getattr(config, name)
        if folder is None:
            continue
        images.files_of(name, folder)
        if folder.resolve() in (config.out.resolve(), *config.out.resolve().parents):
            raise ValueError(
                f"out is '{config.out}', which is in {name}, '{folder}'; expected a folder "
                "elsewhere, so that there are only images"
            )
    if config.log is not None:
        package_of(config.log)


def _made(config: Config) -> dict[str, object]:
    """Make a run whose settings were looked at, and return what `result.json` holds."""
    pipe = opened(config)
    base = of_pipeline(config.model, pipe)
    prepared = prepare(config, pipe)
    with folders.held(config.out):
        # After all that may be refused, so that the mended command has the folder.
        _claim(prepared, base)
        plan, sampling = prepared.plan, sampler(prepared, pipe)
        if config.class_prompt is not None:
            plan = prepared.with_class(class_pictures(prepared, pipe))
        del pipe  # and its text encoder, unless images are generated
        grid = plan.data.grid(plan.objective)
        began = time.perf_counter()
        trained = train(plan, config.out, grid, sampling)
        seconds = time.perf_counter() - began
        training.update(prepared.model, trained.variables)
        with timed("writing the adapter, and reading it again"):
            difference = save(prepared.model, plan, grid, config.out / ADAPTER)
        if importlib.util.find_spec("matplotlib") is not None:
            from nyscaled.finetune import curves

            curves.write(config.out, LOSS)
        result = Result(
            config.out,
            config.steps,
            trained.base_loss,
            trained.loss,
            difference,
            count(plan.parts.params),
            round(seconds, 3),
        )
        values: dict[str, object] = {**dataclasses.asdict(result), "out": str(config.out)}
        folders.write_json(config.out / folders.RESULT, values)
        return values


def _claim(prepared: Prepared, base: identity.Base) -> None:
    """Write the settings of a run that begins; compare those of one that goes on."""
    out, digests = prepared.config.out, prepared.digests
    if folders.begun(out, resume=prepared.config.resume) is None:
        identity.write_base(out, base)
        folders.begin(out, as_options(prepared.config), {"images": digests}, "pillow")
        return
    if (out / identity.FILE).exists():
        identity.require_same_base(out, base)
    else:
        identity.write_base(out, base)
    before = images.read_record(out)["images"]
    for name, now in digests.items():
        what = f"the files in {name}"
        images.require_same(what, out, before[name], now, "the same files")


def save(model: Denoiser, plan: Plan, grid: Grid, folder: Path) -> float:
    """Write the adapters, read them again, and return the largest difference of predictions.

    Args:
        model: the models, with the trained variables.
        plan: what it was trained on.
        grid: times and noises at which predictions are compared.
        folder: folder of the adapter.

    Raises:
        ValueError: if the saved adapters compute something else.
    """
    lora.save_diffusers(model.unet, folder, text_encoder=model.text_encoder)
    with replacing(folder / identity.FILE) as file:
        file.write((folder.parent / identity.FILE).read_bytes())
    read = nnx.clone(model)
    lora.remove(read)
    lora.load_diffusers(read.unet, folder, text_encoder=read.text_encoder)
    predictions = [_predictions(each, plan, grid) for each in (read, model)]
    return require_close(folder, *compare(*predictions), plan.config.dtype)


def _predictions(model: Denoiser, plan: Plan, grid: Grid) -> np.ndarray:
    parts = training.split(model, nnx.LoRAParam)
    predictions = plan.evaluate(parts.params, parts, grid)[1]
    return np.asarray(jax.device_get(predictions), np.float32).reshape(len(predictions), -1)
