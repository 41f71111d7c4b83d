"""What Tables 4 and 9 share: runs of instruction tuning by method and seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nyscaled as nys
from experiments.lib.config import BaseConfig
from experiments.lib.score_table import fine_tuned, folder_of


@dataclasses.dataclass(frozen=True)
class InstructionConfig(BaseConfig):
    """Settings of the runs of a table."""

    model: str = ""
    """Model: a folder, a GGUF file or a hub id."""
    methods: tuple[str, ...] = ("lora", "nora", "lora-p-normalized", "nora+")
    """Methods, the rows. The published lora-p is lora-p-normalized here."""
    seeds: int = 1
    """Seeds of each method."""
    learning_rate: float = 3e-4
    """Largest learning rate."""
    scale: float = 0.02
    """Size ξ of NoRA's start."""
    epochs: float = 3
    """Passes through the examples."""
    steps: int | None = None
    """Steps, in place of epochs."""
    batch_size: int = 16
    """Examples in a step."""
    rank: int = 32
    """Rank of the adapters; α is twice the rank."""
    dtype: str = "bfloat16"
    """Dtype of the base."""
    runs: Path = Path("build")
    """Folder of the runs."""


def instructed(
    config: InstructionConfig, data: Path, task: str, method: str, seed: int, **settings: Any
) -> nys.finetune.Result:
    """Return the result of a run, which begins, goes on, or is finished already.

    Args:
        config: settings of the table.
        data: file of the examples to train on.
        task: their task.
        method: the method.
        seed: the seed.
        **settings: further settings of `nys.finetune.Config`.
    """
    has_size = "scale" in nys.finetune.method(method).options
    return fine_tuned(
        nys.finetune.Config(
            model=config.model,
            data=data,
            task=task,
            out=config.runs / folder_of(Path(config.model).name, data.stem, method, seed),
            method=method,
            rank=config.rank,
            alpha=2.0 * config.rank,
            scale=config.scale if has_size else None,
            learning_rate=config.learning_rate,
            epochs=config.epochs,
            steps=config.steps,
            batch_size=config.batch_size,
            dtype=config.dtype,
            seed=seed,
            **settings,
        )
    )
