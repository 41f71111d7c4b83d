"""The eight commonsense sets of Table 4, in the format of LLM-Adapters (Hu et al., 2023)."""

from __future__ import annotations

import re

from nyscaled.finetune.examples import Example
from nyscaled.finetune.records import Row
from nyscaled.finetune.task import Task, Template
from nyscaled.models import Tokenizer

_INDENT = " " * 16  # the lines of the published prompt are indented, but for the first
_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."

TEMPLATES = {
    # The prompt of training: that of the published evaluation has other white space, which a model
    # trained on this one has never seen.
    "llm-adapters": Template(
        f"{_TASK}. {_REQUEST}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n"
        f"{_INDENT}\n{_INDENT}### Response:\n{_INDENT}",
        "LLM-Adapters (Hu et al., 2023), finetune.py, as in BingcongLi/NoRA (2024-11-06)",
        answer="the correct answer is {answer}",
        with_input=f"{_TASK}, paired with an input that provides further context. {_REQUEST} \n\n"
        f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
        f"{_INDENT}### Input:\n{_INDENT}{{input}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}",
    ),
    "compact": Template("{instruction}\n", "this project: the instruction and the answer's word"),
}

# The words of each family of answers, in the order of LLM-Adapters' commonsense_evaluate.py.
_FAMILIES = {
    "true": ("true", "false"),
    "solution": ("solution1", "solution2"),
    "answer": tuple(f"answer{i}" for i in range(1, 6)),
    "ending": tuple(f"ending{i}" for i in range(1, 5)),
    "option": ("option1", "option2"),
}
_SETS = {
    "commonsense-boolq": ("true", "Clark et al., 2019"),
    "commonsense-piqa": ("solution", "Bisk et al., 2020"),
    "commonsense-siqa": ("answer", "Sap et al., 2019"),
    "commonsense-hellaswag": ("ending", "Zellers et al., 2019"),
    "commonsense-winogrande": ("option", "Sakaguchi et al., 2021"),
    "commonsense-arc-easy": ("answer", "Clark et al., 2018"),
    "commonsense-arc-challenge": ("answer", "Clark et al., 2018"),
    "commonsense-openbookqa": ("answer", "Mihaylov et al., 2018"),
}
_FORMAT = re.compile(r"Answer format:\s*(\w+(?:/\w+)+)")


def _build(task: Task, template: str | None, row: Row, _: Tokenizer | None) -> Example:
    instruction, answer = row.text("instruction"), row.text("answer").strip()
    if answer not in task.words:
        known = ", ".join(task.words)
        raise ValueError(f"{row.source}: answer is {answer!r:.80}; expected one of {known}")
    family = next(words for words in _FAMILIES.values() if answer in words)
    # The question says how many answers there are.
    match = _FORMAT.search(instruction)
    words = tuple(match[1].split("/")) if match else family
    if answer not in words or not set(words) <= set(family):
        words = family
    form = task.template(template)
    prompt = form.fill({"instruction": instruction, "input": str(row.fields.get("input") or "")})
    candidates = tuple(form.answer.format(answer=word) for word in words)
    label = words.index(answer)
    return Example(prompt, candidates[label], candidates, label, (answer,), source=row.source)


def _task(name: str, words: tuple[str, ...], source: str) -> Task:
    return Task(
        name=name,
        source=f"{source}; LLM-Adapters (Hu et al., 2023)",
        templates=TEMPLATES,
        build=_build,
        fields={"instruction": ("instruction",)},
        label=("answer",),
        words=words,
        trained_on="tokens",
        ends=True,
        metric="first_word",
        max_new_tokens=32,
    )


ALL = _task(
    "commonsense",
    tuple(word for words in _FAMILIES.values() for word in words),
    "the eight sets as one",
)
SETS = tuple(_task(name, _FAMILIES[family], source) for name, (family, source) in _SETS.items())
