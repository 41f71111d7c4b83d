"""Conversations as texts, by the chat templates of models, as transformers renders them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nyscaled.checkpoints import files
from nyscaled.models.tokenizers import templates
from nyscaled.models.tokenizers.tools import tool_schema

# Names under which messages have reasoning: a template may read any of them.
_REASONING = "reasoning_content", "thinking", "reasoning"
_MARK = "CONTINUED_FROM_HERE"
# Arguments of transformers' apply_chat_template that are not the template's.
_ELSEWHERE = {
    "chat_template": "`template` names one of the tokenizer's",
    "conversation": "it is the first argument here",
    **dict.fromkeys(
        (
            *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
            *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
        ),
        "a chat is a text here: call the tokenizer with it and add_special_tokens=False",
    ),
}


def render(
    template: str,
    messages: Sequence[object],
    *,
    tools: Sequence[object] | None,
    documents: Sequence[object] | None,
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    variables: Mapping[str, Any],
) -> str:
    """Return the text of a conversation; see `Tokenizer.chat`.

    Args:
        template: template in Jinja.
        messages: mappings or dataclasses.
        tools: JSON schemas, or functions from which they are made.
        documents: mappings.
        add_generation_prompt: whether the text ends where the answer begins.
        continue_final_message: whether the text ends within the last message; a string names the
            field of the message to continue instead of "content".
        variables: other variables of the template.

    Raises:
        ValueError: on other messages, tools or documents, on a template that refuses them, goes
            beyond a limit of `templates`, or does not repeat the message to continue.
        ImportError: without the package jinja2.
    """
    for name in variables.keys() & _ELSEWHERE.keys():
        if name != "tokenize" or variables[name]:
            raise ValueError(f"{name} is not a variable of chat templates; {_ELSEWHERE[name]}")
    rows = _messages(messages)
    if not (tools is None or (isinstance(tools, Sequence) and not isinstance(tools, str))):
        raise ValueError(f"tools is {tools!r:.80}; expected a list of schemas or functions")
    if documents is not None and not (
        isinstance(documents, Sequence) and all(isinstance(d, Mapping) for d in documents)
    ):
        raise ValueError(f"documents is {documents!r:.80}; expected mappings (title, text)")
    context = {
        **{name: _plain(value) for name, value in variables.items() if name != "tokenize"},
        "tools": None if tools is None else [_plain(tool_schema(tool)) for tool in tools],
        "documents": _plain(documents),
        "add_generation_prompt": add_generation_prompt,
        "messages": rows,
    }
    if not continue_final_message:
        return templates.render(template, context)
    if add_generation_prompt:
        raise ValueError(
            "continue_final_message and add_generation_prompt contradict one another; expected "
            "the first to continue the last message, the second to begin one"
        )
    field = "content" if continue_final_message is True else continue_final_message
    mark = _MARK
    while mark in f"{context}":
        mark += "_"
    final = _marked(rows[-1], field, template, f"{mark} ")
    return _before_mark(templates.render(template, context), final, f"{mark} ")


def _messages(messages: Sequence[object]) -> list[dict[str, Any]]:
    """Return messages in the form of templates: without None, reasoning under each of its names."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages is {messages!r:.80}; expected a list of messages, at least one")
    rows = []
    for message in map(_plain, messages):
        if not isinstance(message, dict):
            raise ValueError(f"a message is {message!r:.80}; expected a mapping with role, content")
        row = {name: value for name, value in message.items() if value is not None}
        reasoning = next((row[name] for name in _REASONING if name in row), None)
        if reasoning is not None:
            row = {"thinking": reasoning, **row, "reasoning_content": reasoning}
        rows.append(row)
    return rows


def _marked(message: dict[str, Any], field: str, template: str, mark: str) -> str:
    """Put a mark after the text to continue in a message, and return the text."""
    if field not in message:
        raise ValueError(f"the last message has no {field!r} to continue")
    value = message[field]
    same = [n for n in _REASONING if message.get(n) == value] if field in _REASONING else [field]
    if not any(name in template for name in same):
        raise ValueError(f"the chat template does not use {field!r}; expected a field that it does")
    if isinstance(value, str):
        message.update(dict.fromkeys(same, value + mark))
        return value
    parts = value if isinstance(value, list | tuple) else []
    texts = [part for part in parts if isinstance(part, dict) and "text" in part]
    if not texts:
        raise ValueError(f"the last message has {field} {value!r:.80}; expected a text to continue")
    text = texts[-1]["text"]
    texts[-1]["text"] = text + mark
    return text


def _before_mark(text: str, final: str, mark: str) -> str:
    end = text.rfind(mark.strip())
    if end < 0 or final.strip() not in text:
        raise ValueError("the chat template does not repeat the last message, which was to go on")
    # A template may repeat the message, and one that trims it has trimmed the mark too.
    before = text[:end].replace(mark, "").replace(mark.strip(), "")
    return before if text.startswith(mark, end) else before.rstrip()


def _plain(value: Any, depth: int = 0) -> Any:
    """Return the value in JSON's types: other objects have methods that a template could call."""
    if depth > files.MAX_DEPTH:
        raise ValueError(
            f"a message, tool or variable nests deeper than {files.MAX_DEPTH}, or holds itself"
        )
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # of a subclass, as enums are
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(k, depth + 1): _plain(item, depth + 1) for k, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return _plain(value.item(), depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: _plain(getattr(value, f.name), depth + 1) for f in fields}
    dump = None if isinstance(value, type) else getattr(value, "model_dump", None)
    if callable(dump):  # pydantic
        return _plain(dump(), depth + 1)
    return f"<{type(value).__name__}>"
