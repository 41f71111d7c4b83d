"""What is read from generated text, and how it is compared with the right answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

# A sign after a word, as in 5-3, is an operation.
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d[\d,]*)?")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

EXTRACTIONS = {
    "marker": "The answer is:",  # MetaMath (Yu et al., 2023) and PiSSA (Meng et al., 2024)
    "hashes": "####",  # GSM8K's own (Cobbe et al., 2021), strict in lm-evaluation-harness
    "last": "",  # the last number of the text, flexible in lm-evaluation-harness
}
"""Texts after which the number of a solution stands; "" for its last number."""


def first_word(text: str, words: Sequence[str]) -> str | None:
    """Return the one of the words that comes first in a text, None without any.

    This is how LLM-Adapters (Hu et al., 2023) reads an answer: `answer1` is found in "answer10"
    too.

    Args:
        text: generated text.
        words: words of the answers.

    Examples:
        >>> first_word("the correct answer is true, not false", ["false", "true"])
        'true'
    """
    match = re.search("|".join(re.escape(word) for word in words), text) if words else None
    return match[0] if match else None


def number(text: str) -> Fraction | None:
    """Return the value of a text that begins with a number, None if it does not.

    Args:
        text: a text such as "1,234", "5.0", "-3/4" or "$12 in all".

    Examples:
        >>> number("$1,234.50 in all"), number("3/4"), number("none")
        (Fraction(2469, 2), Fraction(3, 4), None)
    """
    match = _NUMBER.match(text.lstrip().removeprefix("$").lstrip())
    return _value(match[0]) if match else None


def _value(digits: str) -> Fraction | None:
    above, _, below = digits.replace(",", "").partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or a zero below
        return None


def number_after(text: str, marker: str) -> Fraction | None:
    """Return the first number after the last marker of a text, its last number for the marker "".

    None stands for a text without marker, or without a number there.

    Args:
        text: a solution.
        marker: what comes before the answer; see `EXTRACTIONS`.

    Examples:
        >>> solution = "She has 2 + 3 = 5 apples. The answer is: 5"
        >>> number_after(solution, "The answer is:"), number_after(solution, "####")
        (Fraction(5, 1), None)
    """
    if not marker:
        matches = _NUMBER.findall(text)
        return _value(matches[-1]) if matches else None
    _, found, answer = text.rpartition(marker)
    match = _NUMBER.search(answer) if found else None
    return _value(match[0]) if match else None


def normalized(text: str) -> str:
    """Return a text in lower case without punctuation and articles, as SQuAD compares answers.

    Args:
        text: an answer (Rajpurkar et al., 2016).

    Examples:
        >>> normalized("The  Eiffel-Tower!")
        'eiffeltower'
    """
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(text: str, golds: Iterable[str]) -> bool:
    """Return whether a text is one of the right answers, both normalized.

    Args:
        text: an answer.
        golds: right answers.

    Examples:
        >>> exact_match("the Seine.", ["Seine", "river Seine"])
        True
    """
    return normalized(text) in {normalized(gold) for gold in golds}


def token_f1(text: str, golds: Iterable[str]) -> float:
    """Return the largest F1 score of the words of a text against a right answer, normalized.

    Args:
        text: an answer.
        golds: right answers.

    Examples:
        >>> token_f1("the river Seine", ["Seine", "Loire"])
        0.6666666666666666
    """
    return max(
        (_f1(normalized(text).split(), normalized(gold).split()) for gold in golds), default=0
    )


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))
