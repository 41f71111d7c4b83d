"""GSM8K and MetaMathQA: problems whose answer is a number at the end of a solution."""

from __future__ import annotations

from nyscaled.finetune.answers import number_after
from nyscaled.finetune.examples import Example
from nyscaled.finetune.records import Row
from nyscaled.finetune.task import Task, Template
from nyscaled.models import Tokenizer

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{question}\n\n### Response:"
)
TEMPLATES = {
    "pissa": Template(_ALPACA, "PiSSA (Meng et al., 2024), as of 2025-02", answer="{answer}\n"),
    "metamath": Template(
        _ALPACA + " Let's think step by step.",
        "MetaMath (Yu et al., 2023), evaluation",
        answer=" {answer}\n",
    ),
}


def _build(task: Task, template: str | None, row: Row, _: Tokenizer | None) -> Example:
    """Return an example of a row {question, answer}, {query, response} or LLM-Adapters' form."""
    solution = row.text("output", "response", "solution") if _has_solution(row) else None
    if solution is None:
        solution = row.text("answer")
        number = number_after(solution, "####")
        gold = None if number is None else str(number)
    elif row.fields.get("answer") is not None:
        gold = str(row.value("answer"))
    else:
        number = number_after(solution, "The answer is:")
        gold = None if number is None else str(number)
    if not solution.strip() and gold is None:
        raise ValueError(f"{row.source} has neither a solution nor an answer; expected one of them")
    form = task.template(template)
    return Example(
        form.fill(task.values(row)),
        form.answer.format(answer=solution) if solution.strip() else "",
        golds=() if gold is None else (gold,),
        source=row.source,
    )


def _has_solution(row: Row) -> bool:
    return any(row.fields.get(name) is not None for name in ("output", "response", "solution"))


def _task(name: str, source: str) -> Task:
    return Task(
        name=name,
        source=source,
        templates=TEMPLATES,
        build=_build,
        fields={"question": ("question", "query", "instruction")},
        label=(),
        trained_on="tokens",
        ends=True,
        metric="number",
        max_new_tokens=512,
    )


GSM8K = _task("gsm8k", "Cobbe et al., 2021")
METAMATH = _task("metamath", "MetaMathQA, Yu et al., 2023")
