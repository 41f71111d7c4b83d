"""What `experiments/tier_b.py` and `tier_c.py` have in common: a small language model."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.lib import made_up
from experiments.lib.adapter_data import Setting
from experiments.lib.tier_methods import METHODS
from experiments.lib.tier_study import Study, TierConfig
from experiments.lib.tier_summary import check, make_and_compare

MODEL = "build/weights/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = {"sst2": (40, 80), "commonsense-arc-easy": (96, 128, 192)}
"""Lengths of batches in tokens, by task; longer prompts lose their middle."""
LOWER = 0.32
"""Learning rates are these times those of the encoder's grid."""


def run(
    config: TierConfig, task: str, names: Sequence[str], file: str, *, upper: int | None = None
) -> None:
    """Make the runs that are missing, and compare all.

    Args:
        config: the options.
        task: name of the task.
        names: names of the methods.
        file: name of the record, the table and the picture.
        upper: how many upper layers have adapters, None for all.

    Raises:
        ValueError: on a task without lengths.
    """
    check(config)
    if task not in LENGTHS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(LENGTHS)}")
    methods = {name: (METHODS[name][0], METHODS[name][1].times(LOWER)) for name in names}
    setting = Setting(
        config.model,
        config.data,
        task,
        r".*\.(q_proj|v_proj)",
        batch_size=config.batch_size,
        lengths=LENGTHS[task],
        upper=upper,
    )
    with tempfile.TemporaryDirectory() as folder:
        if config.quick:
            setting = dataclasses.replace(
                setting,
                model=made_up.write_model(Path(folder) / "llama", "llama"),
                data=made_up.write_sentences(Path(folder) / "sentences"),
                task="sst2",
                rank=2,
                alpha=4.0,
                examples=(40, 16, 16),
                lengths=(16,),
                upper=None if upper is None else 1,
            )
            methods = {name: METHODS[name] for name in list(names)[:2]}
            config = dataclasses.replace(
                config, steps=20, screening_steps=5, seeds=3, updates=Path(folder)
            )
        make_and_compare(Study(config, setting, methods, file))
