"""The task of an adapter as a file beside it, which says its template and its classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypedDict

from nyscaled._files import replacing
from nyscaled.checkpoints import files
from nyscaled.finetune.task import Task
from nyscaled.models import Tokenizer

FILE = "task.json"


class Described(TypedDict):
    """What a model was trained to do.

    Attributes:
        task: name of the task.
        template: name of the template that the user gave, None for the default.
        classes: classes of an encoder's head, in its order; none for a causal language model.
        prompt: the template with its fields in braces and its source; None without one.
    """

    task: str
    template: str | None
    classes: list[str]
    prompt: dict[str, str | None] | None


def of_task(
    task: Task,
    template: str | None,
    *,
    encoder: bool,
    tokenizer: Tokenizer | None,
    own_prompts: bool = False,
) -> Described:
    """Return what a model is trained to do.

    Args:
        task: the task, with its classes.
        template: name of the template, None for the default.
        encoder: whether the model is an encoder with a head.
        tokenizer: the model's tokenizer, whose chat template may be the default.
        own_prompts: whether the rows have prompts of their own, so that no template was used.

    Examples:
        >>> from nyscaled.finetune import TASKS
        >>> of_task(TASKS["sst2"], None, encoder=False, tokenizer=None)["prompt"]["prompt"]
        '{sentence!t} It was'
    """
    name = None if encoder or own_prompts else task.template_name(template, tokenizer)
    prompt = None if name is None else {"name": name, **dataclasses.asdict(task.template(name))}
    classes = list(task.classes) if encoder else []
    return {"task": task.name, "template": template, "classes": classes, "prompt": prompt}


def write(folder: Path, described: Described) -> None:
    """Write the file of a task.

    Args:
        folder: folder of the adapter.
        described: what the model is trained to do.
    """
    with replacing(folder / FILE) as file:
        file.write((json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode())


def read(folder: Path) -> Described | None:
    """Return what an adapter was trained to do; None for one of another program.

    Args:
        folder: folder of the adapter.

    Raises:
        ValueError: on a file that has another form.
    """
    path = folder / FILE
    if not path.exists():
        return None
    values = files.read_object(path, "the task of an adapter")
    classes, template = values.get("classes"), values.get("template")
    if not isinstance(classes, list) or not isinstance(template, str | None):
        raise ValueError(f"{path} has no classes or no template; expected a file of this package")
    return {
        "task": str(values.get("task")),
        "template": template,
        "classes": [str(name) for name in classes],
        "prompt": values.get("prompt"),
    }


def with_classes(task: Task, described: Described | None) -> Task:
    """Return a task with the classes that a head was trained for, in their order.

    Args:
        task: the task, which may have classes of its own.
        described: what the head was trained for; None if that is not known.

    Raises:
        ValueError: if the task has other classes.
    """
    classes = tuple(described["classes"]) if described else ()
    if not classes or classes == task.classes:
        return task
    if task.labels:
        raise ValueError(
            f"the head has the classes {', '.join(classes)}; expected those of the task "
            f"{task.name}, {', '.join(task.classes)}"
        )
    return dataclasses.replace(task, labels=tuple((name,) for name in classes))
