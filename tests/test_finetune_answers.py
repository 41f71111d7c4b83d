"""What is read from generated text."""

from fractions import Fraction

import pytest

from nyscaled.finetune import answers


@pytest.mark.parametrize(
    ("text", "marker", "last", "hashes"),
    [
        ("5 + 6 = 11. The answer is: 11", "11", "11", None),
        ("The answer is: 3, or rather\nThe answer is: $1,234.50.", "1234.5", "1234.5", None),
        ("The answer is: 3/4 of 8 = 6", "3/4", "6", None),
        ("The answer is: -7 of 9\n#### 2,000", "-7", "2000", "2000"),
        ("there is none", None, None, None),
        ("The answer is: none, after 3", "3", "3", None),
        ("The answer is 5.", None, "5", None),  # GSM8K's solutions have no colon
        ("The answer is: 5/0", None, None, None),
        ("7-3", None, "3", None),
        ("(-3)", None, "-3", None),
        ("The answer is: " + "9" * 5000, None, None, None),
    ],
)
def test_three_extractions(text, marker, last, hashes):
    expected = {"marker": marker, "last": last, "hashes": hashes}
    got = {name: answers.number_after(text, mark) for name, mark in answers.EXTRACTIONS.items()}
    assert got == {k: None if v is None else Fraction(v) for k, v in expected.items()}


def test_numbers():
    assert answers.number("576.0") == 576
    assert answers.number(" $ 1,000") == 1000
    assert answers.number("about 3") is None


def test_the_first_word_counts():
    words = ["solution1", "solution2"]
    assert answers.first_word("the correct answer is solution2 not solution1", words) == "solution2"
    assert answers.first_word("the correct answer is both", words) is None
    assert answers.first_word("a.c abc", ["abc", "a.c"]) == "a.c"
    assert answers.first_word("anything", []) is None


def test_words_are_compared_as_in_squad():
    assert answers.exact_match(" The Eiffel tower. ", ["eiffel Tower", "x"])
    assert not answers.exact_match("Eiffel", ["Eiffel tower"])
    assert not answers.exact_match("Eiffel", [])
    assert answers.token_f1("a red red car", ["red car"]) == pytest.approx(0.8)
    assert answers.token_f1("car", ["bus", "red car"]) == pytest.approx(2 / 3)
    assert answers.token_f1("the", ["a"]) == 1.0  # nothing is left of both
    assert answers.token_f1("", ["car"]) == 0.0
    assert answers.token_f1("car", []) == 0.0
