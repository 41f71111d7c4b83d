"""The tasks of Table 2, with the prompts of MeZO (Malladi et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from nyscaled.finetune.examples import Example
from nyscaled.finetune.records import Row
from nyscaled.finetune.task import Task, Template, by_label, stripped
from nyscaled.models import Tokenizer

_SOURCE = "MeZO (Malladi et al., 2023), large_models/templates.py"
_NO_OR_YES = ("No", "Yes")
_FALSE_OR_TRUE = (("false", "0"), ("true", "1"))


def _mezo(prompt: str) -> dict[str, Template]:
    return {"mezo": Template(prompt, _SOURCE)}


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


def _copa(task: Task, template: str | None, row: Row, _: Tokenizer | None) -> Example:
    relation = row.text("question")
    words = {"effect": "so", "cause": "because"}
    if relation not in words:
        raise ValueError(f"{row.source}: question is {relation!r:.80}; expected effect or cause")
    values = {**task.values(row), "conjunction": words[relation]}
    candidates = tuple(_continuing(row.text(name)) for name in ("choice1", "choice2"))
    label = task.class_of(row)
    prompt = stripped(task.template(template).fill(values))
    return Example(prompt, candidates[label], candidates, label, source=row.source)


def _continuing(choice: str) -> str:
    """Return a sentence as the end of another one: its first word is lower-cased, but for "I"."""
    first, space, others = choice.rstrip(" ").partition(" ")
    return " " + (first if first == "I" else first.lower()) + space + others


def _record(task: Task, template: str | None, row: Row, _: Tokenizer | None) -> Example:
    entities = tuple(dict.fromkeys(_texts(row, "entities")))
    answers = tuple(dict.fromkeys(_texts(row, "answers")))
    strange = [answer for answer in answers if answer not in entities]
    if strange:
        raise ValueError(f"{row.source}: the answer {strange[0]!r:.80} is none of the entities")
    query = row.text("query").rstrip(" ")
    if "@placeholder" not in query:
        raise ValueError(f"{row.source}: query is {query!r:.80}; expected a text with @placeholder")
    candidates = tuple(" " + query.replace("@placeholder", entity) for entity in entities)
    label = entities.index(answers[0])
    right = tuple(candidates[entities.index(answer)] for answer in answers)
    prompt = stripped(task.template(template).fill(task.values(row)))
    return Example(prompt, candidates[label], candidates, label, right, source=row.source)


def _reading(task: Task, template: str | None, row: Row, _: Tokenizer | None) -> Example:
    golds = _texts(row, *task.label)
    prompt = stripped(task.template(template).fill(task.values(row)))
    return Example(prompt, f" {golds[0]}\n", golds=golds, source=row.source)


def _texts(row: Row, *names: str) -> tuple[str, ...]:
    """Return the texts in a list, or under `text` or `spans` of the answers in SQuAD and DROP."""
    value = row.value(*names)
    if isinstance(value, Mapping):
        parts = cast("Mapping[str, object]", value)
        value = parts.get("text", parts.get("spans"))
    name = " or ".join(names)
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise ValueError(
            f"{row.source}: {name} is {row.value(*names)!r:.80}; expected a list of texts, one at "
            "least"
        )
    texts = tuple(row.as_text(name, text) for text in cast("Sequence[object]", value))
    if not all(text.strip() for text in texts):
        raise ValueError(f"{row.source}: {name} has an empty text; expected answers")
    return texts


SST2 = Task(
    name="sst2",
    source="Socher et al., 2013; GLUE, Wang et al., 2019",
    templates=_mezo("{sentence!t} It was"),
    build=by_label,
    fields=_same("sentence"),
    words=(" terrible", " great"),
    labels=(("negative", "0"), ("positive", "1")),
    sentences=(("sentence",),),
    layouts=(("sentence", "label"),),
)
RTE = Task(
    name="rte",
    source="Dagan et al., 2006; GLUE, Wang et al., 2019",
    templates=_mezo('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'),
    build=by_label,
    fields={"premise": ("premise", "sentence1"), "hypothesis": ("hypothesis", "sentence2")},
    words=("Yes", "No"),
    labels=(("entailment", "0"), ("not_entailment", "1")),
    sentences=(("premise", "sentence1"), ("hypothesis", "sentence2")),
    layouts=(("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label")),
)
CB = Task(
    name="cb",
    source="de Marneffe et al., 2019; SuperGLUE, Wang et al., 2019",
    templates=_mezo('Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'),
    build=by_label,
    fields=_same("premise", "hypothesis"),
    words=("Yes", "No", "Maybe"),
    labels=(("entailment", "0"), ("contradiction", "1"), ("neutral", "2")),
)
BOOLQ = Task(
    name="boolq",
    source="Clark et al., 2019; SuperGLUE, Wang et al., 2019",
    templates=_mezo("{passage} {question!q}\n"),
    build=by_label,
    fields=_same("passage", "question"),
    label=("label", "answer"),
    words=("Yes", "No"),
    labels=(("true", "1"), ("false", "0")),
)
WSC = Task(
    name="wsc",
    source="Levesque et al., 2012; SuperGLUE, Wang et al., 2019 (wsc.fixed)",
    templates=_mezo(
        '{text}\nIn the previous sentence, does the pronoun "{span2!l}" refer to {span1}? '
        "Yes or No?\n"
    ),
    build=by_label,
    fields={"text": ("text",), "span1": ("span1_text",), "span2": ("span2_text",)},
    words=_NO_OR_YES,
    labels=_FALSE_OR_TRUE,
)
WIC = Task(
    name="wic",
    source="Pilehvar and Camacho-Collados, 2019; SuperGLUE, Wang et al., 2019",
    templates=_mezo(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n"
    ),
    build=by_label,
    fields=_same("word", "sentence1", "sentence2"),
    words=_NO_OR_YES,
    labels=_FALSE_OR_TRUE,
)
MULTIRC = Task(
    name="multirc",
    source="Khashabi et al., 2018; SuperGLUE, Wang et al., 2019",
    templates=_mezo(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?\n"
    ),
    build=by_label,
    fields=_same("paragraph", "question", "answer"),
    words=_NO_OR_YES,
    labels=_FALSE_OR_TRUE,
)
COPA = Task(
    name="copa",
    source="Roemmele et al., 2011; SuperGLUE, Wang et al., 2019",
    templates=_mezo("{premise!p} {conjunction}"),
    build=_copa,
    fields=_same("premise"),
    labels=(("0",), ("1",)),
    trained_on="tokens",
)
RECORD = Task(
    name="record",
    source="Zhang et al., 2018; SuperGLUE, Wang et al., 2019",
    templates=_mezo("{passage!h}\n-"),
    build=_record,
    fields=_same("passage"),
    label=("answers",),
    trained_on="tokens",
)
SQUAD = Task(
    name="squad",
    source="Rajpurkar et al., 2016",
    templates=_mezo("Title: {title}\nContext: {context}\nQuestion: {question!t}\nAnswer:"),
    build=_reading,
    fields=_same("title", "context", "question"),
    label=("answers",),
    trained_on="tokens",
    metric="f1",
    stop="\n",
)
DROP = Task(
    name="drop",
    source="Dua et al., 2019",
    templates=_mezo("Passage: {passage}\nQuestion: {question!t}\nAnswer:"),
    build=_reading,
    fields={"passage": ("passage", "context"), "question": ("question",)},
    label=("answers_spans", "answers"),
    trained_on="tokens",
    metric="f1",
    stop="\n",
)
