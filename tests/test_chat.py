"""What a chat template is given, and where a message goes on."""

import enum
import json
from typing import Any, Literal

import numpy as np
import pytest
import tokenizers

from nyscaled.models import Tokenizer
from nyscaled.models.tokenizers.tools import tool_schema

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]


LOOP: dict[str, Any] = {"role": "user"}
LOOP["content"] = [LOOP]


def chat(template, messages=TALK, **options):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    return Tokenizer(inner, {"chat_template": template}).chat(messages, **options)


PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}"
    "<end>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "message", "text"),
    [
        (TURNS, "The answer is", "<user>hi<end>\n<assistant>The answer is"),
        (TURNS, "CONTINUED_FROM_HERE x", "<user>hi<end>\n<assistant>CONTINUED_FROM_HERE x"),
        (TURNS, "The answer is ", "<user>hi<end>\n<assistant>The answer is "),
        (TURNS.replace("m.content", "m.content | trim"), " 4 ", "<user>hi<end>\n<assistant>4"),
        (TURNS.replace("<end>", " <end>"), "4 ", "<user>hi <end>\n<assistant>4 "),
        (
            "{% for m in messages %}{{ m.content }}|{{ m.content | trim }}.{% endfor %}",
            "x ",
            "hi|hi.x |x",
        ),
        (PARTS, [{"text": "a"}, {"text": "b"}, {"x": 1}], "<user><end><assistant>ab"),
    ],
)
def test_the_last_message_goes_on(template, message, text):
    talk = [TALK[0], {"role": "assistant", "content": message}]
    assert chat(template, talk, continue_final_message=True) == text
    assert talk[1]["content"] == message  # is left alone


def test_another_field_goes_on():
    template = "{% for m in messages %}[{{ m.thinking }}]{{ m.content }}{% endfor %}"
    talk = [{"role": "assistant", "reasoning": "so far"}]
    for field in ("reasoning", "reasoning_content", "thinking"):
        assert chat(template, talk, continue_final_message=field) == "[so far"


class Level(enum.Enum):
    LOW = "low"
    HIGH = "high"


def search(
    query: str,
    limit: int | None = None,
    level: Level = Level.LOW,
    kinds: list[Literal["a", "b"]] | dict[str, float] = (),
    anything: Any = None,
) -> list[str]:
    """Finds texts.

    In two lines.

    Args:
        query: what to find,
            which may be long: very
        limit: how many (choices: [1, 2])
        level: of care
        kinds: which
        anything: else

    Returns:
        The texts.
    """


SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds texts.\n\nIn two lines.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {
                    "type": "string",
                    "description": "what to find, which may be long: very",
                },
                "limit": {
                    "type": "integer",
                    "nullable": True,
                    "enum": [1, 2],
                    "description": "how many",
                },
                "level": {"type": "string", "enum": ["low", "high"], "description": "of care"},
                "kinds": {
                    "anyOf": [
                        {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
                        {"type": "object", "additionalProperties": {"type": "number"}},
                    ],
                    "description": "which",
                },
                "anything": {"description": "else"},
            },
            "required": ["query"],
        },
        "return": {"type": "array", "items": {"type": "string"}, "description": "The texts."},
    },
}


def test_functions_are_tools():
    """With the schema of transformers' `get_json_schema`, keys in its order."""
    assert chat("{{ tools | tojson }}", tools=[search, {"b": 1, "a": 2}]) == json.dumps(
        [SEARCH, {"b": 1, "a": 2}]
    )


def undescribed(x: int):
    """Says nothing of its argument."""


def bare(x):
    """Has no types.

    Args:
        x: a number
    """


def strange(x: np.ndarray):
    """Takes arrays.

    Args:
        x: an array
    """


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (5, "a tool is 5; expected a JSON schema or a Python function"),
        (lambda x: x, "no docstring"),
        (undescribed, "the tool undescribed has no schema: its docstring does not describe x"),
        (bare, "the tool bare has no schema: its argument x has no type hint"),
        (strange, "numpy.ndarray.* has no JSON type"),
    ],
)
def test_tools_that_have_no_schema(tool, message):
    with pytest.raises(ValueError, match=message):
        tool_schema(tool)


def test_what_templates_see():
    message = {"role": "user", "content": None, "n": np.float32(2), "x": np.ones(2), "l": Level.LOW}
    template = "{{ messages[0] | tojson }}{{ documents }}{{ enable_thinking }}"
    got = chat(template, [message], documents=[{"text": "a"}], enable_thinking=False)
    assert (
        got
        == '{"role": "user", "n": 2.0, "x": "<ndarray>", "l": "<Level>"}[{\'text\': \'a\'}]False'
    )
    assert chat("{{ documents is none }}", tokenize=False) == "True"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, r"messages is \[\]; expected a list of messages"),
        ("hi", {}, "messages is 'hi'"),
        ([LOOP], {}, "nests deeper than 64, or holds itself"),
        (TALK, {"tools": [LOOP]}, "nests deeper than 64, or holds itself"),
        ([[1]], {}, "a message is .*; expected a mapping"),
        (TALK, {"documents": ["a"]}, "documents is .*; expected mappings"),
        (
            TALK,
            {"tokenize": True},
            "tokenize is not a variable of chat templates; a chat is a text",
        ),
        (TALK, {"return_tensors": "np"}, "return_tensors is not a variable of chat templates"),
        (TALK, {"chat_template": "x"}, "chat_template is not a variable of chat templates; `temp"),
        (
            TALK,
            {"continue_final_message": True, "add_generation_prompt": True},
            "contradict one another",
        ),
        (TALK, {"continue_final_message": "thinking"}, "the last message has no 'thinking'"),
        (
            [{"role": "assistant", "thinking": "a"}],
            {"continue_final_message": "thinking"},
            "does not use 'thinking'",
        ),
        ([{"content": 5}], {"continue_final_message": True}, "has content 5; expected a text"),
    ],
)
def test_calls_that_are_refused(messages, options, message):
    with pytest.raises(ValueError, match=message):
        chat(TURNS, messages, **options)


def test_templates_that_drop_the_message_that_goes_on():
    with pytest.raises(ValueError, match="does not repeat the last message"):
        chat("{{ messages[0].content }}", continue_final_message=True)
