"""Arrays of examples: what they hold, and that nothing else counts."""

import dataclasses

import numpy as np
import pytest
from training_cases import PHRASES, examples, made

from nyscaled.finetune import batches
from nyscaled.finetune.examples import Encoded
from nyscaled.finetune.order import NONE


def counted(batch, row):
    """The targets that count in a row."""
    return batch.targets[row][batch.weights[row] > 0].tolist()


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_the_targets_that_count_are_the_answer(loss_on):
    data = examples(answers=PHRASES)
    batch = made("tokens", PHRASES, loss_on=loss_on).batch(np.array([3, 11]))
    for row, example in enumerate((data[3], data[11])):
        answer = example.answers[example.label]
        text = example.prompt + answer
        assert counted(batch, row) == list(answer if loss_on == "answer" else text[1:])
        # Each is predicted from the tokens before it.
        for position, target, weight in zip(
            batch.positions[row], batch.targets[row], batch.weights[row], strict=True
        ):
            if weight:
                assert batch.tokens[row, position] == text[position]
                assert text[position + 1] == target
        assert batch.mask[row].sum() == len(text) - 1  # nothing follows the last token


def test_candidates_of_one_token_need_one_row():
    of_words = made("choice").batch(np.array([0, 1]))
    assert of_words.tokens.shape[0] == 2
    assert of_words.candidates.tolist() == [7, 8]
    data = examples()
    assert [of_words.mask[i].sum() for i in range(2)] == [len(e.prompt) for e in data[:2]]
    of_phrases = made("choice", PHRASES).batch(np.array([0, 1]))
    assert of_phrases.tokens.shape[0] == 6
    assert [counted(of_phrases, row) for row in (0, 1, 2)] == [list(p) for p in PHRASES]
    assert of_phrases.candidates is None


def test_rows_without_an_example_count_nothing():
    batch = made().batch(np.array([2, NONE]))
    assert batch.valid.tolist() == [True, False]
    assert not batch.weights[1].any()
    assert batch.mask[1].sum() == 1


def test_shapes_are_few_and_hold_every_example():
    data = examples(100, longest=60)
    several = batches.make(data, "tokens", batch_size=8, programs=3)
    assert len(several.shapes) == 3
    seen = []
    for rows, batch in several.sorted(8):
        assert (batch.tokens.shape[1], batch.positions.shape[1]) in several.shapes
        seen += rows[rows != NONE].tolist()
    assert sorted(seen) == list(range(100))


def test_classes_keep_token_types():
    data = [Encoded((1, 5, 2, 6, 2), (), 1, types=(0, 0, 0, 1, 1)), Encoded((1, 2), (), 0)]
    batch = batches.make(data, "class", batch_size=2).batch(np.array([0, 1]))
    assert batch.types[:, :5].tolist() == [[0, 0, 0, 1, 1], [0] * 5]
    assert batch.labels.tolist() == [1, 0]
    assert batch.positions is None


def test_other_candidates_are_not_of_one_pass():
    data = examples()
    assert batches.one_pass(data) == (7, 8)
    other = dataclasses.replace(data[0], answers=((7,), (9,)))
    assert batches.one_pass([*data, other]) is None
