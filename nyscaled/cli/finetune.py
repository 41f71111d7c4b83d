"""Fine-tune a language model with adapters, and write one that was tested.

DATA is a file or a folder with train, dev and test files (.json, .jsonl, .tsv). OUT gets what was
trained, metrics, settings and checkpoints. Adapters are in PEFT's format; full and linear-probe
write a whole model, prefix a file prefix.safetensors.

The task dreambooth fine-tunes Stable Diffusion on images, and has options of its own: see
nyscaled finetune --task dreambooth --help

examples:
  nyscaled finetune --model MODEL --data glue/rte --task rte --method nora+ --out runs/rte
  nyscaled finetune --model MODEL --data glue/rte --task rte --method nora+ --out runs/rte --resume
  nyscaled finetune --model MODEL --data glue/rte --task rte --out runs/rte --dry-run
  nyscaled finetune --config run.yaml --sweep learning_rate=1e-4,3e-4,1e-3 --out sweep
  nyscaled finetune --config run.yaml --learning-rate 1e-4 --out runs/2   # flags override the file
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from nyscaled.finetune.config import Config as Config
from nyscaled.finetune.launch import Result
from nyscaled.finetune.launch import run as fine_tune
from nyscaled.finetune.loop import Stopped
from nyscaled.finetune.preview import preview
from nyscaled.finetune.sweeping import S, configs, require_possible, sweep

INTERRUPTED = 130


def run(config: Config) -> int:
    """Fine-tune; return 0, or 130 after an interruption that saved the state.

    Args:
        config: the settings.

    Raises:
        ValueError: on settings, data and models that do not go together.
        OSError: if a file cannot be read or written.
    """
    return made(config, preview, lambda config: _line(fine_tune(config)))


def made(config: S, preview: Callable[[S], Iterator[str]], run: Callable[[S], str]) -> int:
    """Make a run or a sweep, or say what it will do; return the status of the program.

    Args:
        config: the settings.
        preview: yields what a run will do.
        run: makes a run, and returns what to say of it.

    Raises:
        ValueError: as `preview` and `run` do.
        OSError: if a file cannot be read or written.
    """
    _keep_programs()
    if config.dry_run:
        runs = [({}, config)] if config.sweep is None else list(configs(config))
        if config.sweep is not None:
            require_possible(runs)
        for line in preview(runs[0][1]):
            print(line, flush=True)
        if config.sweep is not None:
            print(f"the sweep has {len(runs)} runs, of which this is the first")
        return 0
    try:
        print(run(config) if config.sweep is None else sweep(config))
    except Stopped as stopped:
        return _interrupted(stopped)
    return 0


def _interrupted(stopped: Stopped) -> int:
    """Say how a run goes on, and return the status of an interruption."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    again = shlex.join(["nyscaled", *words, "--resume"])
    print(f"{stopped}; go on with: {again}", file=sys.stderr)
    return INTERRUPTED


def _keep_programs() -> None:
    """Keep compiled programs on disk between runs, unless JAX was told where."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "nyscaled" / "programs"))


def _line(result: Result) -> str:
    accuracy = "" if result.accuracy is None else f", accuracy {result.accuracy:.3f}"
    return (
        f"{result.out / 'adapter'}: {result.steps} steps in {result.seconds:.1f} s; best at step "
        f"{result.best_step}: validation loss {result.validation_loss:.4f}{accuracy}; the saved "
        f"adapter was read again, and its scores differ by {result.difference:.1g}"
    )
