"""Prompts field by field as published, labels, and what a task refuses."""

import re

import pytest
from finetune_cases import DATA, characters, row, without_data, words

import nyscaled as nys
from nyscaled.finetune.records import read_rows, read_split
from nyscaled.finetune.tasks import TASKS, by_name

I16 = " " * 16

# Rows as the package datasets has them, the prompt of MeZO's table, candidates, and the label.
MEZO = {
    "sst2": (
        {"sentence": " a fine film . ", "label": 1, "idx": 3},
        "a fine film . It was",
        (" terrible", " great"),
        1,
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        ("Yes", "No"),
        0,
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "it is wet", "label": 2},
        'Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": (
        {"passage": "Rain is water.", "question": "is rain wet", "label": 1},
        "Rain is water. Is rain wet?\n",
        ("Yes", "No"),
        0,
    ),
    "wsc": (
        {"text": "Ann saw Bea; She ran.", "span1_text": "Bea", "span2_text": "She", "label": 0},
        'Ann saw Bea; She ran.\nIn the previous sentence, does the pronoun "she" refer to Bea? '
        "Yes or No?\n",
        ("No", "Yes"),
        0,
    ),
    "wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": 1},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank.\n'
        "The bank.\n",
        ("No", "Yes"),
        1,
    ),
    "multirc": (
        {"paragraph": "P.", "question": "Q?", "answer": "A", "label": 1},
        'P.\nQuestion: Q?\nI found this answer "A". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "copa": (
        {
            "premise": "I fell. ",
            "choice1": "I cried.",
            "choice2": "The Sun shone.",
            "question": "effect",
            "label": 1,
        },
        "I fell so",
        (" I cried.", " the Sun shone."),
        1,
    ),
    "record": (
        {
            "passage": "News.\n@highlight\nAnn won",
            "query": "Then @placeholder spoke",
            "entities": ["Bea", "Ann", "Bea"],
            "answers": ["Ann"],
        },
        "News.\n- Ann won\n-",
        (" Then Bea spoke", " Then Ann spoke"),
        1,
    ),
}


@pytest.mark.parametrize("name", MEZO)
def test_prompts_of_mezo(name):
    fields, prompt, candidates, label = MEZO[name]
    (example,) = by_name(name).examples([row(**fields)])
    assert (example.prompt, example.candidates, example.label) == (prompt, candidates, label)
    assert example.answer == candidates[label]
    assert example.source == "data.jsonl:7"


def test_questions_whose_answers_are_generated():
    squad = {
        **{"title": "Rain", "context": "It is wet.", "question": " What? "},
        "answers": {"text": ["water", "rain"], "answer_start": [0, 1]},
    }
    (example,) = by_name("squad").examples([row(**squad)])
    assert example.prompt == "Title: Rain\nContext: It is wet.\nQuestion: What?\nAnswer:"
    assert (example.answer, example.golds) == (" water\n", ("water", "rain"))
    drop = {"passage": "P", "question": "Q?", "answers_spans": {"spans": ["3"], "types": ["n"]}}
    (example,) = by_name("drop").examples([row(**drop)])
    assert example.prompt == "Passage: P\nQuestion: Q?\nAnswer:"
    assert example.answer == " 3\n"


def test_records_with_several_right_entities():
    fields = MEZO["record"][0] | {"answers": ["Ann", "Bea"]}
    (example,) = by_name("record").examples([row(**fields)])
    assert example.answer == " Then Ann spoke"
    assert set(example.golds) == set(example.candidates)


def test_spellings_of_labels():
    """GLUE's words, SuperGLUE's truth values, and the numbers of the package datasets."""
    pair = {"sentence1": "a", "sentence2": "b"}
    for label in ("not_entailment", "Not_Entailment ", 1, "1"):
        (example,) = by_name("rte").examples([row(**pair, label=label)])
        assert example.answer == "No"
    for label in (True, "true", 1):
        (example,) = by_name("boolq").examples([row(passage="p", question="q", answer=label)])
        assert example.answer == "Yes"


def test_the_prompt_of_llm_adapters():
    fields = {
        "instruction": "Is it? \n\nAnswer format: true/false",
        **{"input": "", "output": "the correct answer is true", "answer": "true"},
    }
    task = by_name("commonsense")
    (example,) = task.examples([row(**fields)])
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.  \n\n{I16}### Instruction:\n{I16}{fields['instruction']}\n{I16}\n"
        f"{I16}### Response:\n{I16}"
    )
    assert example.answer == fields["output"]
    assert example.candidates == ("the correct answer is true", "the correct answer is false")
    assert example.golds == ("true",)
    (example,) = task.examples([row(**fields)], "compact")
    assert (example.prompt, example.answer) == (fields["instruction"] + "\n", "true")
    (example,) = task.examples([row(**fields | {"input": "See."})])
    assert f"### Input:\n{I16}See.\n" in example.prompt


def test_answers_that_the_question_names_are_the_candidates():
    fields = {"instruction": "Q Answer format: answer1/answer2/answer3", "answer": "answer3"}
    for name in ("commonsense", "commonsense-siqa"):
        (example,) = by_name(name).examples([row(**fields)], "compact")
        assert example.candidates == ("answer1", "answer2", "answer3")
        assert example.label == 2
    (example,) = by_name("commonsense").examples([row(instruction="Q", answer="ending2")])
    assert len(example.candidates) == 4


def test_solutions_of_problems():
    task = by_name("gsm8k")
    (hub,) = task.examples([row(question="Q?", answer="2 + 3 = 5\n#### 5")])
    assert hub.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nQ?\n\n### Response:"
    )
    assert (hub.answer, hub.golds) == ("2 + 3 = 5\n#### 5\n", ("5",))
    (adapters,) = task.examples([row(instruction="Q?", output="It is 5.", answer="5.0")])
    assert (adapters.answer, adapters.golds) == ("It is 5.\n", ("5.0",))
    (blank,) = task.examples([row(instruction="Q?", output="", answer="5.0")])
    assert (blank.answer, blank.golds) == ("", ("5.0",))
    solution = "So 5.\nThe answer is: 5"
    (meta,) = by_name("metamath").examples([row(query="Q?", response=solution)], "metamath")
    assert meta.prompt.endswith("### Response: Let's think step by step.")
    assert (meta.answer, meta.golds) == (f" {solution}\n", ("5",))
    with pytest.raises(ValueError, match=r"data.jsonl:7 has neither a solution nor an answer"):
        task.examples([row(question="Q", output=" ")])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sst2", {"sentence": "a", "label": 2}, "the label is 2; expected one of negative/0, posi"),
        ("sst2", {"sentence": "a", "label": -1}, "the label is -1"),
        ("sst2", {"sentence": "a"}, "has sentence; expected a field label"),
        ("sst2", {"text": "a", "label": 1}, "has text, label; expected a field sentence"),
        ("rte", {"premise": 5, "hypothesis": "b", "label": 1}, "premise or sentence1 is 5; expec"),
        ("copa", {**MEZO["copa"][0], "question": "why"}, "question is 'why'; expected effect or"),
        ("record", {**MEZO["record"][0], "answers": ["Eve"]}, "'Eve' is none of the entities"),
        ("record", {**MEZO["record"][0], "answers": []}, "expected a list of texts, one at least"),
        ("record", {**MEZO["record"][0], "query": "none"}, "expected a text with @placeholder"),
        ("squad", {"answers": {"text": []}}, "expected a list of texts, one at least"),
        ("squad", {"answers": {"text": [" "]}}, "answers has an empty text; expected answers"),
        ("squad", {"answers": {"text": [3]}}, "answers is 3; expected a text"),
        ("commonsense-piqa", {"instruction": "Q", "answer": "true"}, "expected one of solution1, "),
        ("instructions", {"a": 1}, "has the fields a; expected messages; prompt and completion"),
        ("instructions", {"instruction": "Q", "output": " "}, "has an empty answer; expected a te"),
        ("instructions", {"instruction": "Q"}, "has instruction; expected a field output"),
        ("instructions", {"prompt": "Q", "completion": ""}, "has an empty answer"),
        ("instructions", {"messages": []}, r"messages is \[\]; expected a list of messages"),
        ("instructions", {"messages": ["a"]}, "a message is 'a'; expected one with role and cont"),
        (
            "instructions",
            {"messages": [{"role": "user", "content": "a"}]},
            "ends with a message of role 'user' after 0 others; expected an answer",
        ),
        (
            "instructions",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
            "content is None; expected a text",
        ),
    ],
)
def test_rows_that_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=f"data.jsonl:7.*{message}"):
        by_name(name).examples([row(**fields)], tokenizer=characters())


def test_what_a_model_can_do():
    assert by_name("rte").objective(encoder=True) == "class"
    assert by_name("rte").objective(encoder=False) == "choice"
    assert by_name("copa").objective(encoder=False) == "tokens"
    with pytest.raises(ValueError, match="the task boolq needs a causal language model"):
        by_name("boolq").examples([], encoder=True)
    with pytest.raises(ValueError, match="the task classification needs an encoder"):
        by_name("classification").examples([])
    with pytest.raises(ValueError, match="task is 'rtee'; expected one of sst2, rte, cb, boolq"):
        by_name("rtee")
    with pytest.raises(ValueError, match="template is 'x'; expected one of llm-adapters, comp"):
        by_name("commonsense").examples([], "x")


def test_encoders_read_the_sentences():
    (example,) = by_name("rte").examples(
        [row(sentence1="a", sentence2="b", label="entailment")], encoder=True
    )
    assert (example.prompt, example.second, example.label) == ("a", "b", 0)
    (example,) = by_name("sst2").examples([row(sentence="a", label="1")], encoder=True)
    assert (example.prompt, example.second, example.label) == ("a", None, 1)


def test_classes_of_own_data():
    task = by_name("classification")
    rows = [row(sentence="a", label="b"), row(text="c", label="a"), row(sentence="c", label="B")]
    own = task.with_classes(rows)
    assert own.classes == ("a", "b")
    assert [e.label for e in own.examples(rows, encoder=True)] == [1, 0, 1]
    numbers = [row(sentence="a", label=n) for n in (10, 9, "-1")]
    assert task.with_classes(numbers).classes == ("-1", "9", "10")
    with pytest.raises(ValueError, match=r"data.jsonl:7: the label is 'c'; expected one of a, b"):
        own.examples([row(sentence="a", label="c")], encoder=True)
    with pytest.raises(ValueError, match=r"the rows have 1 labels, .*; expected two at least"):
        task.with_classes(rows[:1])
    rte = by_name("rte")
    assert rte.with_classes(rows) is rte


@pytest.mark.parametrize("label", ["3.2", 0.75, float("nan"), [1], {"x": 1}])
def test_what_is_not_a_class_is_refused(label):
    rows = [row(sentence="a", label="5.000"), row(sentence="b", label=label)]
    shown = re.escape(repr(label))
    message = rf"data.jsonl:7: label is {shown}; expected the name or .* write words, as '0.5 stars"
    with pytest.raises(ValueError, match=message):
        by_name("classification").with_classes(rows)


def test_texts_may_be_empty(tmp_path):
    """QQP has two pairs for training of which one is (issue 277 of huggingface/datasets)."""
    rows = [row(sentence1=first, sentence2="", label=0) for first in ("a", "", " ")]
    task = by_name("rte")
    assert [(e.prompt, e.second) for e in task.examples(rows, encoder=True)] == [
        ("a", ""),
        ("", ""),
        (" ", ""),
    ]
    assert task.examples(rows)[0].prompt.startswith('a\nDoes this mean that "" is true?')
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\n\t0\n")
    review = read_rows(path, by_name("sst2").layouts)
    (example,) = by_name("sst2").examples(review)
    assert example.prompt == "It was"
    assert nys.finetune.encode([example], characters(begins=False))[0][0].prompt
    encoded, _ = nys.finetune.encode_sentences(
        by_name("sst2").examples(review, encoder=True), words()
    )
    assert encoded[0].prompt == (1, 2)  # the special tokens


def test_a_header_of_unknown_names_is_not_a_class(tmp_path):
    """Its label would be one that no other line has."""
    lines = ["review\tgood?", "a fine film\tyes", "a bad film\tno", "a film\tyes"]
    task, path = by_name("classification"), tmp_path / "train.tsv"
    path.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"train.tsv:1 has the label 'good\?', which no other line"
    ):
        task.with_classes(read_rows(path, task.layouts))
    path.write_text("\n".join(lines[1:]))
    assert task.with_classes(read_rows(path, task.layouts)).classes == ("no", "yes")


def test_every_task_and_template_has_a_source():
    for name, task in TASKS.items():
        assert name == task.name
        assert task.source
        assert all(template.source for template in task.templates.values())


@without_data
@pytest.mark.parametrize(
    ("name", "folder", "split", "template", "count"),
    [
        ("sst2", "glue/sst2", "dev", None, 872),
        ("rte", "glue/rte", "dev", None, 277),
        ("commonsense", "commonsense/ARC-Easy", "train", None, 2251),
        ("commonsense-piqa", "commonsense/piqa", "test", "compact", 1838),
        ("commonsense-siqa", "commonsense/social_i_qa", "test", None, 1954),
        ("gsm8k", "commonsense/gsm8k", "test", None, 1319),
    ],
)
def test_published_files_become_examples(name, folder, split, template, count):
    task = by_name(name)
    rows = read_split(DATA / folder, split, task.layouts)
    examples = task.examples(rows, template)
    assert len(examples) == count
    if name.startswith("commonsense") and template is None:
        assert [e.answer for e in examples] == [r.fields["output"] for r in rows]
