"""What a task is: data that say how rows become prompts, answers and scores."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from nyscaled.finetune.examples import Example
from nyscaled.finetune.records import Row
from nyscaled.models import Tokenizer

Objective = Literal["choice", "tokens", "class"]
"""What is minimized: cross-entropy over candidates, over tokens of the answer, or over classes."""

Metric = Literal["first_word", "number", "f1"]
"""How generated text is scored: by its first answer word, its number, or its words."""


def _as_question(text: str) -> str:
    text = text if text.endswith("?") else text + "?"
    return text[0].upper() + text[1:]


# Conversions that templates name after an exclamation mark, as in {question!q}.
FORMS: Mapping[str | None, Callable[[str], str]] = {
    None: str,
    "l": str.lower,
    "t": str.strip,
    "q": _as_question,
    "p": lambda text: text.rstrip().removesuffix("."),
    "h": lambda text: text.replace("@highlight\n", "- "),
}


class _Forms(string.Formatter):
    def convert_field(self, value: object, conversion: str | None) -> str:
        return FORMS[conversion](str(value))


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with fields in braces.

    Attributes:
        prompt: the text before the answer; {field!q} is the field in one of `FORMS`.
        source: where the template was published.
        answer: the text of the answer around {answer}.
        with_input: the prompt of rows that have an input beside the instruction.
    """

    prompt: str
    source: str
    answer: str = "{answer}"
    with_input: str | None = None

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the prompt with these values of its fields.

        Args:
            values: texts by the names of fields.

        Examples:
            >>> Template("{question!q}\\n", "").fill({"question": "is it far"})
            'Is it far?\\n'
        """
        own = self.with_input if self.with_input and values.get("input") else self.prompt
        return _Forms().vformat(own, (), values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """How the rows of a data set become examples, and how answers are scored.

    Attributes:
        name: what users call the task.
        source: who published the data and this use of them.
        templates: templates by their names, the default first; none for a task of encoders only.
        build: makes an example for a causal language model of the task, a template, a row and the
            tokenizer.
        fields: for each field of the templates, its names in releases of the data.
        label: names of the field of the label, or of the right answers; empty if the answer is
            a text of its own in each row.
        labels: for each class, the values of the label that stand for it.
        words: what a causal language model says for each class; also the words that are searched
            in generated text.
        sentences: fields that encoders read; empty if the task is not for encoders.
        layouts: orders of columns in TSV files.
        trained_on: the candidates against each other, or the tokens of the right answer.
        ends: whether the answer ends with the token that ends a text.
        metric: how generated answers are scored; None for a task in which none are generated.
        max_new_tokens: most tokens that are generated.
        stop: text at which a generated answer ends.
        splits: splits that a run of this task needs.
    """

    name: str
    source: str
    templates: Mapping[str, Template] = dataclasses.field(
        default_factory=lambda: MappingProxyType({})
    )
    build: Callable[[Task, str | None, Row, Tokenizer | None], Example] | None = None
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: MappingProxyType({})
    )
    label: tuple[str, ...] = ("label",)
    labels: tuple[tuple[str, ...], ...] = ()
    words: tuple[str, ...] = ()
    sentences: tuple[tuple[str, ...], ...] = ()
    layouts: tuple[tuple[str, ...], ...] = ()
    trained_on: Literal["choice", "tokens"] = "choice"
    ends: bool = False
    metric: Metric | None = None
    max_new_tokens: int = 50
    stop: str | None = None
    splits: tuple[str, ...] = ("train", "dev")

    def template(self, name: str | None = None) -> Template:
        """Return a template of the task, the default for None; ValueError on an unknown name."""
        if name is None and self.templates:
            return next(iter(self.templates.values()))
        if name is None or name not in self.templates:
            raise ValueError(
                f"template is {name!r}; expected one of {', '.join(self.templates)} for the task "
                f"{self.name}"
            )
        return self.templates[name]

    def template_name(self, name: str | None, tokenizer: Tokenizer | None) -> str | None:
        """Return the name of the template that is used, None for a task without any.

        The default is the first one; a chat template, where the tokenizer has none, is passed over.

        Args:
            name: name that the user gave, or None.
            tokenizer: tokenizer of the model.

        Raises:
            ValueError: on an unknown name.
        """
        if name is not None:
            self.template(name)
            return name
        has_chat = tokenizer is not None and bool(tokenizer.settings.get("chat_template"))
        return next((own for own in self.templates if own != "chat" or has_chat), None)

    def objective(self, *, encoder: bool) -> Objective:
        """Return what a model minimizes in this task; ValueError if it cannot do the task.

        Args:
            encoder: whether the model is an encoder with a head; otherwise it is a causal language
                model.
        """
        if encoder and not self.sentences:
            raise ValueError(
                f"the task {self.name} needs a causal language model; the model is an encoder "
                "(expected sst2, rte or classification for it)"
            )
        if not encoder and self.build is None:
            raise ValueError(
                f"the task {self.name} needs an encoder; the model is a causal language model "
                "(expected instructions, or a task with label words)"
            )
        return "class" if encoder else self.trained_on

    def values(self, row: Row) -> dict[str, str]:
        """Return the fields of a row by their names in templates."""
        return {name: row.text(*names) for name, names in self.fields.items()}

    def class_of(self, row: Row) -> int:
        """Return the class of a row; ValueError on a label that is not one of the task's."""
        value = row.value(*self.label)
        text = str(value).strip().lower()
        for i, spellings in enumerate(self.labels):
            if text in (spelling.lower() for spelling in spellings):
                return i
        expected = ", ".join("/".join(spellings) for spellings in self.labels)
        raise ValueError(f"{row.source}: the label is {value!r:.80}; expected one of {expected}")

    def with_classes(self, rows: Sequence[Row]) -> Task:
        """Return the task with the labels of these rows as classes, unless it has its own.

        Args:
            rows: rows to train on.

        Raises:
            ValueError: on a label that is not a class, if fewer than two labels occur, or the first
                line of a file has one that no other line has, as a header of other names would.
        """
        if self.labels:
            return self
        labels = [_label(row, *self.label) for row in rows]
        names = set(labels)
        if len(labels) > 2 and labels.count(labels[0]) == 1 and rows[0].source.endswith(".tsv:1"):
            raise ValueError(
                f"{rows[0].source} has the label {labels[0]!r:.40}, which no other line has; "
                f"expected a header with {' or '.join(map(', '.join, self.layouts))}, or another "
                "example of this label"
            )
        if len(names) < 2:
            raise ValueError(f"the rows have {len(names)} labels, {names}; expected two at least")
        whole = all(name.removeprefix("-").isdecimal() for name in names)
        ordered = sorted(names, key=int) if whole else sorted(names)
        return dataclasses.replace(self, labels=tuple((name,) for name in ordered))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of a head."""
        return tuple(spellings[0] for spellings in self.labels)

    def examples(
        self,
        rows: Sequence[Row],
        template: str | None = None,
        *,
        encoder: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> list[Example]:
        """Return the examples of rows, whose texts may be empty.

        Args:
            rows: rows of a data file.
            template: name of a template of the task; None for the default.
            encoder: whether they are for an encoder with a head.
            tokenizer: has the chat template, for conversations.

        Raises:
            ValueError: on an unknown template, a task that such a model cannot do, and a row with
                a wrong field, no answer, or a label that is not one of the task's; the message
                names file and line.
        """
        self.objective(encoder=encoder)
        if template is not None:
            self.template(template)
        if encoder and template is not None:
            raise ValueError(
                f"template is {template!r}; expected none for an encoder, which reads the fields"
            )
        if encoder:
            return [self._for_encoder(row) for row in rows]
        assert self.build is not None
        return [self.build(self, template, row, tokenizer) for row in rows]

    def _for_encoder(self, row: Row) -> Example:
        label = self.class_of(row)
        first, *others = self.sentences
        texts = [row.text(*first)]
        texts += [row.text(*names) for names in others if any(x in row.fields for x in names)]
        second = texts[1] if len(texts) > 1 else None
        return Example(texts[0], self.classes[label], label=label, second=second, source=row.source)


def _label(row: Row, *names: str) -> str:
    """The label of a row, which must be the name or the number of a class."""
    value = row.value(*names)
    label = str(value).strip().lower()
    # Files of measures such as STS-B have them as texts too, and a few lines of one as few.
    try:
        measure = not float(label).is_integer()
    except (OverflowError, ValueError):
        measure = False
    if measure or not isinstance(value, str | int | float):
        raise ValueError(
            f"{row.source}: {' or '.join(names)} is {value!r:.80}; expected the name or the whole "
            "number of a class (for classes that are other numbers write words, as '0.5 stars'; "
            "several classes of an example, and a regression on measures, are not among the tasks)"
        )
    return label


def by_label(task: Task, template: str | None, row: Row, _: Tokenizer | None) -> Example:
    """Return an example whose candidates are the words of the task's classes.

    Args:
        task: the task.
        template: name of the template.
        row: a row of the data.
    """
    label = task.class_of(row)
    prompt = stripped(task.template(template).fill(task.values(row)))
    return Example(prompt, task.words[label], task.words, label, source=row.source)


def stripped(prompt: str) -> str:
    """Return a prompt without white space before it and without spaces after it, as MeZO has it."""
    return prompt.lstrip().strip(" ")
