"""A user's own data: instructions, prompts with completions, conversations, and classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from nyscaled.finetune.examples import Example
from nyscaled.finetune.records import Row
from nyscaled.finetune.task import Task, Template
from nyscaled.models import Tokenizer

_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{{instruction}}\n\n{}### Response:\n"
)
TEMPLATES = {
    "chat": Template("", "the tokenizer's chat template"),
    "alpaca": Template(
        _ALPACA.format("", ""),
        "Stanford Alpaca (Taori et al., 2023)",
        with_input=_ALPACA.format(
            ", paired with an input that provides further context", "### Input:\n{input}\n\n"
        ),
    ),
    "plain": Template(
        "{instruction}\n",
        "this project: the instruction, then the input",
        with_input="{instruction}\n{input}\n",
    ),
}
_FORMS = "messages; prompt and completion; or instruction, input and output"

Messages = list[Mapping[str, object]]


def _build(task: Task, template: str | None, row: Row, tokenizer: Tokenizer | None) -> Example:
    messages, question = row.fields.get("messages"), row.fields.get("prompt")
    if template not in (None, "chat") and (messages is not None or question is not None):
        form = "messages" if messages is not None else "a prompt"
        raise ValueError(
            f"{row.source} has {form}, and the template is {template}; expected the template chat, "
            "or rows with instruction and output"
        )
    if messages is not None:
        return _chat(row, _messages(row, "messages"), tokenizer)
    if question is not None:
        if not isinstance(row.value("prompt"), str):
            both = _messages(row, "prompt") + _messages(row, "completion")
            return _chat(row, both, tokenizer)
        question, answer = row.text("prompt"), row.text("completion")
        if template != "chat":
            return dataclasses.replace(_free(row, question, answer), own_prompt=True)
        return _chat(row, _turns(question, answer), tokenizer)
    if row.fields.get("instruction") is None:
        raise ValueError(f"{row.source} has the fields {row.names:.200}; expected {_FORMS}")
    question, answer = row.text("instruction"), row.text("output")
    extra = row.text("input") if row.fields.get("input") else ""
    if template is None:
        template = task.template_name(None, tokenizer)
    if template == "chat":
        question = f"{question}\n\n{extra}" if extra else question
        return _chat(row, _turns(question, answer), tokenizer)
    prompt = task.template(template).fill({"instruction": question, "input": extra})
    return _free(row, prompt, answer)


def _turns(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _free(row: Row, prompt: str, answer: str) -> Example:
    if not answer.strip():
        raise ValueError(f"{row.source} has an empty answer; expected a text")
    return Example(prompt, answer, golds=(answer.strip(),), source=row.source)


def _messages(row: Row, name: str) -> Messages:
    value = row.value(name)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{row.source}: {name} is {value!r:.80}; expected a list of messages")
    messages = cast("Sequence[object]", value)
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"{row.source}: a message is {message!r:.80}; expected one with role and content"
            )
    return cast("Messages", list(messages))


def _chat(row: Row, messages: Messages, tokenizer: Tokenizer | None) -> Example:
    """Return the example of a conversation: its last message is the answer.

    Earlier messages of the assistant are trained on too, where the template only appends.
    """
    if tokenizer is None:
        raise ValueError(f"{row.source} is a conversation; expected a model with a tokenizer")
    *earlier, last = messages
    if last["role"] != "assistant" or not earlier:
        raise ValueError(
            f"{row.source} ends with a message of role {last['role']!r:.40} after {len(earlier)} "
            "others; expected an answer of the assistant after one message at least"
        )
    content = row.as_text("content", last.get("content"))
    if not content.strip():
        raise ValueError(f"{row.source} has an empty answer; expected a text")
    tools = cast("Sequence[object] | None", row.fields.get("tools") or None)
    chat = functools.partial(tokenizer.chat, tools=tools)
    try:
        prompt = chat(earlier, add_generation_prompt=True)
        whole = chat(messages)
        turns = tuple(_earlier_answers(earlier, prompt, chat))
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from error
    if not whole.startswith(prompt):
        raise ValueError(
            f"{row.source}: with the answer, the chat template gives another text before it than "
            "without; expected a template that only appends (prompt and completion fields take "
            "texts that you made yourself)"
        )
    for message in earlier:
        _require_text(row, message, prompt)
    answer = whole.removeprefix(prompt)
    return Example(prompt, answer, golds=(content.strip(),), turns=turns, source=row.source)


def _require_text(row: Row, message: Mapping[str, object], prompt: str) -> None:
    """Refuse content that is missing, and content that a chat template writes as Python does.

    A template may take parts of a content, and calls of tools in its place.
    """
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if content is None or isinstance(content, str) or str(content) in prompt:
        row.as_text("content", content)


def _earlier_answers(
    messages: Messages, prompt: str, chat: Callable[..., str]
) -> Iterator[tuple[int, int]]:
    """The first and last character of each answer of the assistant in a prompt."""
    for i, message in enumerate(messages):
        if i and message["role"] == "assistant":
            try:
                before = chat(messages[:i], add_generation_prompt=True)
                after = chat(messages[: i + 1])
            except ValueError:  # some templates refuse such a beginning of a conversation
                continue
            if prompt.startswith(after) and after.startswith(before):
                yield len(before), len(after)


INSTRUCTIONS = Task(
    name="instructions",
    source="a user's own data",
    templates=TEMPLATES,
    build=_build,
    label=(),
    trained_on="tokens",
    ends=True,
    metric="f1",
    max_new_tokens=256,
    splits=("train",),
)
_FIRST = "sentence", "sentence1", "text"
CLASSIFICATION = Task(
    name="classification",
    source="a user's own data",
    sentences=(_FIRST, ("sentence2",)),
    layouts=tuple((first, *second, "label") for second in ((), ("sentence2",)) for first in _FIRST),
    splits=("train",),
)
