"""Instructions, completions and conversations of a user."""

import numpy as np
import pytest
from finetune_cases import characters, row

from nyscaled.finetune import batches, preview
from nyscaled.finetune.encoding import encode
from nyscaled.finetune.tasks import by_name

TASK = by_name("instructions")
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
]


def example(template=None, tokenizer=None, **fields):
    (result,) = TASK.examples([row(**fields)], template, tokenizer=tokenizer)
    return result


def test_instructions_with_and_without_an_input():
    plain = example("plain", instruction="Add.", input="1, 2", output="3")
    assert (plain.prompt, plain.answer, plain.golds) == ("Add.\n1, 2\n", "3", ("3",))
    alpaca = example(instruction="Add.", input="", output="3")  # without a chat template
    assert alpaca.prompt.startswith("Below is an instruction that describes a task. Write")
    assert alpaca.prompt.endswith("### Instruction:\nAdd.\n\n### Response:\n")
    alpaca = example(instruction="Add {this}.", input="1, {2}", output="3")
    assert "### Instruction:\nAdd {this}.\n\n### Input:\n1, {2}\n\n### Resp" in alpaca.prompt


def test_completions_are_taken_as_they_are():
    literal = example(tokenizer=characters(), prompt="Q:", completion=" A")
    assert (literal.prompt, literal.answer) == ("Q:", " A")
    assert literal.own_prompt
    turns = example("chat", characters(), prompt="Q:", completion="A")
    assert not turns.own_prompt
    assert turns.prompt == "<m>user\nQ:</s>\n<m>assistant\n"
    lists = example(tokenizer=characters(), prompt=TURNS[:2], completion=TURNS[2:])
    assert lists == example(tokenizer=characters(), messages=TURNS)


def test_conversations_by_the_chat_template():
    """The last message is the answer, with the end that the template gives it."""
    chat = example(tokenizer=characters(), messages=TURNS)
    assert chat.prompt == "<m>system\nBe brief.</s>\n<m>user\nHi</s>\n<m>assistant\n"
    assert (chat.answer, chat.golds) == ("Yes</s>\n", ("Yes",))
    ((encoded,), _) = encode([chat], characters(), ends=True)
    assert characters().decode(list(encoded.answers[0]), skip_special_tokens=False) == "Yes</s>"
    instruction = example(tokenizer=characters(), instruction="Add.", input="1", output="3")
    assert instruction.prompt == "<m>user\nAdd.\n\n1</s>\n<m>assistant\n"


@pytest.mark.parametrize("begins", [True, False])
def test_all_answers_of_a_conversation_count(begins):
    """The loss sees each with the token that ends it, and nothing of the user's."""
    tokenizer = characters(begins)
    last = [{"role": "user", "content": "No?"}, {"role": "assistant", "content": "Yes great"}]
    chat = example(tokenizer=tokenizer, messages=[*TURNS, *last])
    (encoded,), _ = encode([chat], tokenizer, ends=True)
    whole = tokenizer.encode(chat.prompt, add_special_tokens=False).ids
    assert list(encoded.prompt) == [*tokenizer.encode("").ids, *whole]  # as without pieces
    made = batches.make([encoded], "tokens", batch_size=1)
    batch = made.batch(np.array([0]))
    counted = batch.targets[batch.weights > 0].tolist()
    assert tokenizer.decode(counted, skip_special_tokens=False) == "Yes</s>Yes great</s>"
    shown = preview.shown(made.rows[0][0], tokenizer)
    assert shown.count("⟦") == 2
    assert "assistant\n⟦Yes</s>⟧\n<m>user\nNo?</s>\n<m>assistant\n⟦Yes great</s>⟧" in shown
    everything = batches.make([encoded], "tokens", batch_size=1, loss_on="all")
    assert everything.rows[0][0].counted == ()
    cut, _ = encode([chat], tokenizer, ends=True, max_length=40, allow_cut=1)
    assert cut[0].counted == ()


REFUSES = (
    "{% if messages | length == 1 %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_beginnings_that_the_chat_template_refuses_are_not_trained_on():
    greeting = {"role": "assistant", "content": "Hello"}
    messages = [TURNS[0], greeting, *TURNS[1:], *TURNS[1:]]
    chat = example(tokenizer=characters(chat=REFUSES), messages=messages)
    assert [chat.prompt[a:b] for a, b in chat.turns] == ["Yes;"]


def test_a_template_that_the_rows_do_not_use_is_refused():
    with pytest.raises(ValueError, match="has a prompt, and the template is alpaca"):
        example("alpaca", prompt="Hi", completion="Yes")
    with pytest.raises(ValueError, match="has messages, and the template is plain"):
        example("plain", tokenizer=characters(), messages=TURNS)


TOOLS = (
    "{% for t in tools or [] %}{{ t.name }};{% endfor %}"
    "{% for m in messages %}{{ m.role }}:"
    "{% for call in m.tool_calls or [] %}{{ call.name }}{% endfor %}"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %};"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_tools_and_parts_of_a_content_are_those_of_the_template():
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    messages = [parts, call, {"role": "tool", "content": "5"}, TURNS[2]]
    chat = example(tokenizer=characters(chat=TOOLS), messages=messages, tools=[{"name": "look"}])
    assert chat.prompt == "look;user:Hi;assistant:look;tool:5;assistant:"
    assert [chat.prompt[a:b] for a, b in chat.turns] == ["look;"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": [{"type": "text", "text": "Hi"}]}, r"content is \[\{'type': 'text', 'text'"),
        ({"content": 5}, "content is 5; expected a text"),
        ({}, "content is None; expected a text"),
        ({"content": "a\ud83d"}, "content has half of a character"),
    ],
)
def test_contents_that_a_template_would_write_as_python_are_refused(message, reason):
    with pytest.raises(ValueError, match=f"data.jsonl:7: {reason}"):
        example(tokenizer=characters(), messages=[{"role": "user", **message}, TURNS[2]])


def test_conversations_that_are_refused():
    with pytest.raises(ValueError, match="is a conversation; expected a model with a tokenizer"):
        example(messages=TURNS)
    with pytest.raises(ValueError, match=r"data.jsonl:7: there is no chat template 'default'"):
        example(tokenizer=characters(chat=None), messages=TURNS)
    counting = characters(chat="{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(ValueError, match="the chat template gives another text before it"):
        example(tokenizer=counting, messages=TURNS)
    with pytest.raises(ValueError, match="has an empty answer; expected a text"):
        example(tokenizer=characters(), messages=[*TURNS[:2], {**TURNS[2], "content": " "}])
