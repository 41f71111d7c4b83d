"""All tasks, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nyscaled.finetune import arithmetic, commonsense, instructions, mezo
from nyscaled.finetune.task import Task

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            *(mezo.SST2, mezo.RTE, mezo.CB, mezo.BOOLQ, mezo.WSC, mezo.WIC, mezo.MULTIRC),
            *(mezo.COPA, mezo.RECORD, mezo.SQUAD, mezo.DROP),
            *(commonsense.ALL, *commonsense.SETS),
            *(arithmetic.GSM8K, arithmetic.METAMATH),
            *(instructions.INSTRUCTIONS, instructions.CLASSIFICATION),
        )
    }
)
"""The tasks by their names."""


def by_name(name: str) -> Task:
    """Return the task of this name; ValueError on an unknown one.

    Args:
        name: name of a task, such as "rte".

    Examples:
        >>> by_name("sst2").words
        (' terrible', ' great')
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]
