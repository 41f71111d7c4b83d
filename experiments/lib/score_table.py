"""Tables of scores by task and method over seeds, from runs of `nys.finetune` in their folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import nyscaled as nys
from experiments.lib.curves import Curve
from experiments.lib.files import write_atomically
from experiments.lib.record import save
from experiments.lib.style import COLOURS, MARKERS
from nyscaled.finetune import inputs

Scores = Mapping[str, Mapping[str, list[float]]]
"""Scores of each seed by task and method."""


def fine_tuned(config: nys.finetune.Config) -> nys.finetune.Result:
    """Return the result of a run, which begins, goes on, or is finished already.

    Args:
        config: its settings; the folder `out` is its record.
    """
    begun = (config.out / "config.yaml").exists()
    return nys.finetune.run(dataclasses.replace(config, resume=begun))


def scored(
    model: str,
    adapter: Path,
    file: Path,
    task: str,
    *,
    dtype: str,
    examples: int | None = None,
    generated: bool = False,
) -> dict[str, float]:
    """Return the scores of a model with an adapter on the examples of a file.

    Args:
        model: the base.
        adapter: folder of the adapter.
        file: the file.
        task: name of the task.
        dtype: dtype of the base.
        examples: most examples, the first ones; None for all.
        generated: whether answers of a task with candidates are read from generated text.
    """
    base, tokenizer = nys.models.load(model, dtype=dtype)
    nys.lora.load_peft(base, adapter)
    tokenizer = inputs.require_tokenizer(model, tokenizer)
    chosen = nys.finetune.TASKS[task]
    rows = nys.finetune.read_split(file, "test", chosen.layouts)[:examples]
    asked = chosen.examples(rows, encoder=False, tokenizer=tokenizer)
    scores = nys.finetune.evaluate(base, tokenizer, asked, chosen, generated=generated).scores
    return {name: score.value for name, score in scores.items()}


def folder_of(*parts: object) -> Path:
    """Return a relative path with a folder for each part, such as a method and a learning rate."""
    return Path(*(str(part).replace("/", "_") for part in parts))


def markdown(scores: Scores) -> str:
    """Return the table of means and standard deviations over seeds.

    Args:
        scores: scores by task and method.

    Examples:
        >>> print(markdown({"sst2": {"lora": [0.90, 0.92]}}), end="")
        | method | sst2 | seeds |
        | --- | --- | --- |
        | lora | 0.910 ± 0.014 | 2 |
    """
    methods = list(dict.fromkeys(m for of_task in scores.values() for m in of_task))
    rows = [["method", *scores, "seeds"], ["---"] * (len(scores) + 2)]
    for method in methods:
        cells = [method]
        counts: set[int] = set()
        for of_task in scores.values():
            values = of_task.get(method, [])
            counts.add(len(values))
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        rows.append([*cells, " to ".join(map(str, sorted(counts)))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(out: Path, name: str, config: Any, scores: Scores, **notes: Any) -> None:
    """Write the table, its picture and its record.

    Args:
        out: the folder.
        name: name of the table.
        config: the options of the script.
        scores: scores by task and method.
        **notes: further entries of the record.
    """
    write_atomically(out / f"{name}.md", markdown(scores).encode())
    curves = {
        task: {method: Curve(np.arange(len(values)), values) for method, values in row.items()}
        for task, row in scores.items()
    }
    figure, all_axes = plt.subplots(
        1, len(scores), figsize=(2.6 * len(scores) + 1.2, 3), squeeze=False, layout="constrained"
    )
    for axes, (task, row) in zip(all_axes[0], scores.items(), strict=True):
        for place, values in enumerate(row.values()):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            axes.plot(np.full(len(values), place), values, marker, color=colour, mfc="none")
            axes.plot(place, np.mean(values), "_", color="0.1", ms=14)
            axes.set_title(task)
        axes.set_xticks(range(len(row)), row, rotation=40, ha="right")
    all_axes[0, 0].set_ylabel("score by seed, and mean")
    save(out, name, figure, curves, config, columns=("seed", "score"), **notes)
