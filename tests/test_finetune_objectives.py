"""The losses, beside sums over the logits of every position."""

import jax
import model_cases
import numpy as np
import pytest
from training_cases import PHRASES, WORDS, examples, made

from nyscaled.finetune import batches, objectives
from nyscaled.finetune.order import NONE

ROWS = np.array([0, 5, 9, NONE])


@pytest.fixture(scope="module")
def log_p():
    """log p of each next token, of a text."""
    model = model_cases.load("llama")

    def of(text):
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(jax.nn.log_softmax(model(padded)[0, : len(text)]), np.float64)

    return of


def means(log_p, example):
    """The mean log p of each candidate, as MeZO scores it."""
    scores = []
    for answer in example.answers:
        text = example.prompt + answer
        all_of_text = log_p(text)
        positions = np.arange(len(example.prompt), len(text))
        scores.append(np.mean([all_of_text[i - 1, text[i]] for i in positions]))
    return np.array(scores)


@pytest.mark.parametrize("answers", [WORDS, PHRASES])
@pytest.mark.long_beyond(1)
def test_choices_are_scored_as_in_mezo(log_p, answers):
    data, batch = examples(answers=answers), made("choice", answers).batch(ROWS)
    model = model_cases.load("llama")
    scores = np.asarray(objectives.choice_scores(model, batch))
    total, count = objectives.choice_loss(model, batch)
    expected = 0.0
    for row, score in zip(ROWS[:3], scores, strict=False):
        exact = means(log_p, data[row])
        # One token: log p up to a number that the candidates share.
        np.testing.assert_allclose(score - score[0], exact - exact[0], atol=2e-5)
        expected += np.log(np.exp(exact).sum()) - exact[data[row].label]
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == 3


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_tokens_are_those_of_the_answer_or_all(log_p, loss_on):
    data, batch = examples(answers=PHRASES), made("tokens", PHRASES, loss_on=loss_on).batch(ROWS)
    total, count = objectives.tokens_loss(model_cases.load("llama"), batch)
    expected, number = 0.0, 0
    for row in ROWS[:3]:
        text = data[row].prompt + data[row].answers[data[row].label]
        start = len(data[row].prompt) if loss_on == "answer" else 1
        expected -= sum(log_p(text)[i - 1, text[i]] for i in range(start, len(text)))
        number += len(text) - start
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == number


@pytest.mark.long
def test_examples_with_fewer_candidates():
    data = examples(4, answers=PHRASES)
    fewer = [*examples(1, answers=PHRASES[1:]), *data]
    batch = batches.make(fewer, "choice", batch_size=5).batch(np.arange(5))
    scores = np.asarray(objectives.choice_scores(model_cases.load("llama"), batch))
    assert np.isneginf(scores[0, 2])
    assert np.isfinite(scores[1:]).all()
    gradient = jax.grad(lambda x: objectives._cross_entropy(x, batch)[0])(scores)
    assert np.isfinite(gradient).all()


def test_a_head_sees_only_the_positions_of_answers(monkeypatch):
    model, seen = model_cases.load("llama"), []
    head = type(model).logits

    def watched(self, x):
        seen.append(x.shape)
        return head(self, x)

    monkeypatch.setattr(type(model), "logits", watched)
    objectives.tokens_loss(model, made("tokens", PHRASES).batch(ROWS))
    assert seen == [(4, 3, 16)]


@pytest.mark.long
def test_classes():
    model = model_cases.load("bert")
    saved = model_cases.saved("bert")
    data = [
        batches.Encoded(tuple(np.asarray(tokens)[np.asarray(mask)].tolist()), (), i % 2)
        for i, (tokens, mask) in enumerate(zip(saved["tokens"], saved["mask"], strict=True))
    ]
    batch = batches.make(data, "class", batch_size=len(data)).batch(np.arange(len(data)))
    scores = np.asarray(objectives.class_scores(model, batch))
    for score, example in zip(scores, data, strict=True):
        alone = model(np.array([example.prompt]), types=np.zeros((1, len(example.prompt)), int))
        np.testing.assert_allclose(score, alone[0], atol=1e-5)
    total, count = objectives.class_loss(model, batch)
    log_p = np.asarray(jax.nn.log_softmax(scores))
    expected = -sum(log_p[i, e.label] for i, e in enumerate(data))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == len(data)
