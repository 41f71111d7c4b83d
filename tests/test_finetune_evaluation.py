"""Scores of models: candidates against a plain loop, generated text, and metrics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetune_cases import characters, row, words
from flax import nnx

import nyscaled as nys
from nyscaled.finetune import evaluation, generated
from nyscaled.finetune.encoding import encode
from nyscaled.finetune.evaluation import evaluate
from nyscaled.finetune.examples import Encoded, Example
from nyscaled.finetune.tasks import by_name
from nyscaled.models import Bert, BertClassifier, BertConfig, Llama, LlamaConfig

SUBJECTS = ["It", "Ann", "The sea", "One of them", "Rain, or snow,"]
ENDS = ["is wet", "fell", "was here before", "sat", "ran 12 miles"]


@functools.cache
def causal():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    config = LlamaConfig(vocab_size=270, **sizes, **heads, eos_token_id=None)
    model = Llama(config, rngs=nnx.Rngs(0))
    # Larger weights, so that what is most probable depends on the text.
    state = jax.tree.map(lambda x: 3 * x, nnx.state(model, nnx.Param))
    nnx.update(model, state)
    return model


@functools.cache
def classifier():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=12, **sizes, num_attention_heads=2)
    model = BertClassifier(Bert(config, rngs=nnx.Rngs(0)), ["no", "yes"], rngs=nnx.Rngs(1))
    nnx.update(model, jax.tree.map(lambda x: 5 * x, nnx.state(model, nnx.Param)))
    return model


@nnx.jit
def _log_p(model, tokens, mask):
    return jax.nn.log_softmax(model(tokens, mask)[:, :-1].astype(jnp.float32))


def mean_log_p(example):
    """The rule of MeZO, candidate by candidate."""
    model, tokenizer = causal(), characters()
    prompt = tokenizer.encode(example.prompt).ids
    scores = []
    for candidate in example.candidates:
        ids = [*prompt, *tokenizer.encode("\n" + candidate, add_special_tokens=False).ids[1:]]
        tokens = np.zeros((1, 128), np.int32)
        tokens[0, : len(ids)] = ids
        log_p = _log_p(model, tokens, np.arange(128)[None] < len(ids))[0]
        where = np.arange(len(prompt) - 1, len(ids) - 1)
        scores.append(float(np.mean(log_p[where, ids[len(prompt) :]])))
    return np.array(scores)


def premises():
    return [f"{subject} {end}." for subject in SUBJECTS for end in ENDS]


def rte():
    rows = [row(premise=p, hypothesis="No", label=i % 2) for i, p in enumerate(premises())]
    return by_name("rte").examples(rows)


def copa():
    common = {"choice1": "It rained all day.", "choice2": "Yes.", "question": "cause"}
    return by_name("copa").examples([row(premise=p, **common, label=0) for p in premises()])


def record():
    rows = [
        row(
            passage=premise,
            query="Then @placeholder ran",
            entities=["Ann", "Bob", "One of them"][: 2 + i % 2],
            answers=["Bob", "Ann"][: 1 + i % 2],
        )
        for i, premise in enumerate(premises())
    ]
    return by_name("record").examples(rows)


def commonsense(template):
    """Two sets at once; the answers of one differ only in the last token."""
    rows = []
    for i, premise in enumerate(premises()):
        names = ["true", "false"] if i % 5 == 0 else ["answer1", "answer2", "answer3"]
        text = f"{premise} Answer format: {'/'.join(names)}"
        rows.append(row(instruction=text, answer=names[0]))
    return by_name("commonsense").examples(rows, template)


CASES = {
    "rte": ("rte", rte),
    "copa": ("copa", copa),
    "record": ("record", record),
    "commonsense": ("commonsense", functools.partial(commonsense, "compact")),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.long_beyond(2)
def test_candidates_are_chosen_as_by_a_plain_loop(name):
    task, make = CASES[name]
    examples = make()
    result = evaluate(causal(), characters(), examples, by_name(task), batch_size=8)
    chosen = []
    for example, prediction in zip(examples, result.predictions, strict=True):
        scores = mean_log_p(example)
        index = example.candidates.index(prediction.answer)
        chosen.append(index)
        assert scores[index] >= scores.max() - 1e-4
        right = index == example.label or prediction.answer in example.golds
        assert prediction.values == {"accuracy": float(right)}
    assert len(set(chosen)) > 1  # the choice depends on the text
    accuracy = np.mean([p.values["accuracy"] for p in result.predictions])
    score = result.scores["accuracy"]
    assert score.value == pytest.approx(accuracy)
    assert score.standard_error == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 25))
    assert str(result) == f"{task}: accuracy {score} on 25 examples"


def test_one_pass_per_prompt(monkeypatch):
    """Where the candidates differ only in the last token, each prompt is one row."""
    rows = []
    make = evaluation.batches.make

    def counted(encoded, *args, **options):
        result = make(encoded, *args, **options)
        rows.append((result.choices, options["batch_size"]))
        return result

    monkeypatch.setattr(evaluation.batches, "make", counted)
    examples = commonsense("llm-adapters")
    answers = [e for e in examples if len(e.candidates) == 3]
    evaluate(causal(), characters(), answers, by_name("commonsense"), batch_size=8)
    evaluate(causal(), characters(), rte(), by_name("rte"), batch_size=8)
    evaluate(causal(), characters(), rte(), by_name("rte"), batch_size=100_000)
    assert rows == [(1, 8), (1, 8), (1, 25)]
    unequal = Encoded((1,), ((2, 3), (4, 3)), 0)
    assert evaluation._with_shared_prompt(unequal) is unequal
    equal = Encoded((1,), ((2, 3), (2, 4)), 1)
    assert evaluation._with_shared_prompt(equal) == Encoded((1, 2), ((3,), (4,)), 1)


@pytest.mark.long
def test_encoders():
    texts = ["a b c", "d", "e f g h a", "b b", "c a", "h g"] * 2
    rows = [
        row(sentence1=t, sentence2="a d", label=("entailment", "not_entailment")[i % 2])
        for i, t in enumerate(texts)
    ]
    task = by_name("rte")
    examples = task.examples(rows, encoder=True)
    model = nnx.clone(classifier())
    inputs = words().pairs(texts, ["a d"] * len(texts))
    logits = np.asarray(nnx.jit(lambda m, *x: m(*x))(model, *inputs))
    # A bias in the widest gap of the differences gives both classes, far from a tie.
    differences = np.sort(logits[:, 1] - logits[:, 0])
    i = np.argmax(np.diff(differences))
    bias = np.array([0, -np.mean(differences[i : i + 2])], np.float32)
    model.classifier.bias[...] += bias
    best = np.argmax(logits + bias, axis=1)
    result = evaluate(model, words(), examples, task, batch_size=8)
    assert len(set(best.tolist())) == 2
    assert [p.answer for p in result.predictions] == [task.classes[i] for i in best]
    assert result.scores["accuracy"].value == np.mean(best == np.arange(12) % 2)


def test_generated_text_does_not_depend_on_the_other_prompts():
    task = by_name("squad")
    rows = [
        row(title=t, context="x" * i, question="Yes?", answers={"text": ["No"]})
        for i, t in enumerate(["a", "bcd", "No"])
    ]
    examples = task.examples(rows)
    result = evaluate(causal(), characters(), examples, task, batch_size=2)
    for example, prediction in zip(examples, result.predictions, strict=True):
        ids = characters().encode(example.prompt).ids
        stops = [1, characters().encode("\n", add_special_tokens=False).ids[0]]
        (new,) = nys.models.generate(causal(), [ids], max_new_tokens=50, stop_tokens=stops)
        end = next((i for i, x in enumerate(new) if x in stops), len(new))
        assert prediction.answer == characters().decode(new[:end].tolist()).strip()
        assert set(prediction.values) == {"f1", "exact match"}


def spoken(monkeypatch, *texts):
    """Make a model say these texts, in the order of the prompts, longest first."""
    said = iter(texts)

    def generate(model, tokens, mask, *, max_new_tokens, stop_tokens):
        rows = [characters().encode(next(said, ""), add_special_tokens=False).ids for _ in tokens]
        return np.array([(*row, *[1] * (max_new_tokens - len(row))) for row in rows])

    monkeypatch.setattr(generated, "generate", generate)


def test_metrics_of_generated_text(monkeypatch):
    task = by_name("commonsense")
    (example,) = task.examples([row(instruction="Q Answer format: true/false", answer="true")])
    for text, expected in (
        ("the correct answer is true", {"accuracy": 1, "unanswered": 0}),
        ("it is false, not true", {"accuracy": 0, "unanswered": 0}),
        ("who knows", {"accuracy": 0, "unanswered": 1}),
    ):
        spoken(monkeypatch, text)
        result = evaluate(causal(), characters(), [example], task, generated=True)
        assert result.predictions[0].values == expected
        assert result.predictions[0].answer == text
    task = by_name("gsm8k")
    examples = task.examples(
        [row(instruction="Q" * (9 - i), output="x", answer="5.0") for i in (1, 2, 3, 4)]
    )
    spoken(monkeypatch, "2 + 3. The answer is: 5.\n#### 6", "so it is 5", "#### 5", "it is 5")
    result = evaluate(causal(), characters(), examples, task)
    values = {name: score.value for name, score in result.scores.items()}
    assert values == {
        "accuracy (marker)": 0.25,
        "accuracy (hashes)": 0.25,
        "accuracy (last)": 0.75,
        "without marker": 0.5,
    }
    task = by_name("squad")
    fields = {"title": "a", "context": "b", "question": "c", "answers": {"text": ["red car"]}}
    spoken(monkeypatch, " the car\nQuestion: no")
    result = evaluate(causal(), characters(), task.examples([row(**fields)]), task)
    assert result.predictions[0].answer == "the car"
    assert result.scores["f1"].value == pytest.approx(2 / 3)
    several = dataclasses.replace(task, stop="\nQ")  # of which no token ends a text by itself
    spoken(monkeypatch, "the car\nor no\nQuestion: no")
    result = evaluate(causal(), characters(), task.examples([row(**fields)]), several)
    assert result.predictions[0].answer == "the car\nor no"


def test_generated_text_has_room_beside_the_prompt(monkeypatch):
    """Texts of 512 tokens follow prompts of up to 512 where the model has no last position."""
    gsm8k, squad = by_name("gsm8k"), by_name("squad")
    examples = gsm8k.examples([row(instruction="Q" * 300, output="x", answer="5")])
    spoken(monkeypatch, "The answer is: 5")
    result = evaluate(causal(), characters(), examples, gsm8k, max_length=512)
    assert result.scores["accuracy (marker)"].value == 1
    fields = {"title": "a", "context": "b" * 100, "question": "c", "answers": {"text": ["b"]}}
    monkeypatch.setattr(evaluation, "longest", lambda model: 120)
    with pytest.raises(ValueError, match="have more than 70 tokens"):
        evaluate(causal(), characters(), squad.examples([row(**fields)]), squad)
    with pytest.raises(ValueError, match="reads 120 tokens, of which the task gsm8k generates 512"):
        evaluate(causal(), characters(), examples, gsm8k)


@pytest.mark.long
def test_batches_have_no_positions_that_the_model_has_not():
    config = BertConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=19,
    )  # fmt: skip
    model = BertClassifier(Bert(config, rngs=nnx.Rngs(0)), ["no", "yes"], rngs=nnx.Rngs(1))
    task = by_name("sst2")
    rows = [row(sentence="a b " * count, label=count % 2) for count in (8, 9)]
    examples = task.examples(rows, encoder=True)
    result = evaluate(model, words(), examples, task, allow_cut=0.5)
    assert (result.lengths.longest, result.lengths.cut) == (20, 1)


def test_dropout_is_off_and_the_model_as_it_was():
    examples, task = rte(), by_name("rte")
    model = nnx.clone(causal())
    layers = nys.lora.apply(
        model, rank=2, targets=".*(q|v)_proj", key=jax.random.key(0), dropout=0.9
    )
    for layer in layers.values():
        layer.adapters["default"].lora_b[...] += 1.0
    model.eval()
    expected = evaluate(model, characters(), examples, task)
    assert expected != evaluate(causal(), characters(), examples, task)
    model.train()
    assert evaluate(model, characters(), examples, task) == expected
    dropouts = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout)]
    assert dropouts
    assert not any(m.deterministic for m in dropouts)


def test_what_is_refused():
    task = by_name("rte")
    with pytest.raises(ValueError, match="there are no examples to score"):
        evaluate(causal(), characters(), [], task)
    with pytest.raises(ValueError, match="the task rte has no generated answers"):
        evaluate(causal(), characters(), rte(), task, generated=True)
    with pytest.raises(ValueError, match="the task copa needs a causal language model"):
        evaluate(classifier(), words(), copa(), by_name("copa"))
    with pytest.raises(ValueError, match="the model has 0 classes; expected a BertClassifier of 2"):
        evaluate(classifier().bert, words(), rte(), task)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(causal(), characters(), rte(), task, batch_size=0)
    squad = by_name("squad")
    with pytest.raises(ValueError, match=r"data.jsonl:3 has no right answer to compare with"):
        evaluate(causal(), characters(), [Example("a", "b", source="data.jsonl:3")], squad)
    broken = nnx.clone(causal())
    broken.embed_tokens.embedding[...] = jnp.nan
    with pytest.raises(ValueError, match=r"the model's scores of data.jsonl:7 are \[nan"):
        evaluate(broken, characters(), rte(), task)
    with pytest.raises(ValueError, match=r"25 of 25 examples \(100.0%\) have more than 9 tokens"):
        evaluate(causal(), characters(), rte(), task, max_length=9)
    assert encode(rte(), characters())[1].longest > 9
