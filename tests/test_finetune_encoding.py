"""Examples as token ids: what is masked, what is cut, and what begins and ends a text."""

import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from finetune_cases import ROOT, characters, pieces, words
from tokenizers.processors import TemplateProcessing

import nyscaled as nys
from nyscaled.finetune.encoding import Ends, Lengths, encode, encode_sentences
from nyscaled.finetune.examples import Example
from nyscaled.models import Tokenizer

SMOL = ROOT / "build" / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINI = ROOT / "build" / "weights" / "all-MiniLM-L6-v2"

without_bos = functools.partial(characters, begins=False)
padded_with_eos = functools.partial(characters, pad="</s>")


@functools.cache
def smol():
    if not SMOL.exists():
        pytest.skip("the model is not on this machine")
    return nys.models.load(SMOL)[1]


# Letters, digits and marks that every one of the tokenizers has.
TEXT = st.text("ab YesNogr.?!\n01", min_size=1, max_size=20)
VISIBLE = TEXT.filter(lambda text: text.strip() != "")


@pytest.mark.parametrize(
    "make",
    [
        *(characters, without_bos, padded_with_eos, pieces),
        pytest.param(smol, marks=pytest.mark.long),
    ],
)
@hypothesis.given(VISIBLE, VISIBLE, VISIBLE)
@hypothesis.settings(max_examples=60, deadline=None)
def test_what_is_trained_on_is_the_answer_and_its_end(make, prompt, answer, other):
    """Ids after the prompt decode to the answer; a text has one beginning and one end."""
    tokenizer = make()
    marks = Ends.of(tokenizer)

    def text(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=False)

    examples = [Example(prompt, answer), Example(prompt, other)]
    (first, second), lengths = encode(examples, tokenizer, ends=True)
    (ids,) = first.answers
    assert ids[-1] == marks.eos
    before, whole = text(first.prompt), text(first.prompt + ids)
    assert whole == before + answer + text(ids[-1:])
    assert first.prompt == second.prompt  # it does not depend on the answer
    everything = first.prompt + ids
    assert everything.count(marks.eos) == 1
    assert everything.count(marks.bos) == (marks.bos is not None)
    assert lengths.counts[0] == len(everything)
    (scored, _), _ = encode(
        [Example(prompt, answer, (answer, other), 0)] * 2, tokenizer, answers="candidates"
    )
    assert scored.answers[0] == ids[:-1]  # candidates have no end
    assert scored.prompt == first.prompt


@pytest.mark.parametrize("make", [characters, pieces, pytest.param(smol, marks=pytest.mark.long)])
def test_an_answer_has_the_ids_that_it_has_in_the_whole_text(make):
    tokenizer = make()
    for prompt, answer in (("It was", " great"), ("Yes or No?\n", "Yes"), ("Answer:", " 10\n")):
        ((encoded,), _) = encode([Example(prompt, answer)], tokenizer)
        assert [*encoded.prompt, *encoded.answers[0]] == tokenizer.encode(prompt + answer).ids


@pytest.mark.parametrize(
    ("make", "bos", "eos"),
    [(characters, 0, 1), (without_bos, None, 1), (pieces, 1, 2), (words, 1, None)],
)
def test_the_tokens_that_begin_and_end_a_text(make, bos, eos):
    assert Ends.of(make()) == Ends(bos, eos)


def test_beginnings():
    """OPT and GPT-2 have one token for both; some tokenizers only end a text."""
    inner = characters().inner
    assert Ends.of(Tokenizer(inner, {"bos_token": "<s>", "eos_token": "<s>"})) == Ends(0, 0)
    assert Ends.of(Tokenizer(inner, {"eos_token": "<s>"})) == Ends(None, 0)
    assert Ends.of(Tokenizer(inner, {"bos_token": "<m>"})) == Ends(None, None)
    inner.post_processor = TemplateProcessing(single="<m> $A", special_tokens=[("<m>", 2)])
    other = Tokenizer(inner, {"bos_token": "<m>"})  # as MeZO gives OPT another beginning
    ((encoded,), _) = encode([Example("a", "b")], other)
    assert encoded.prompt[0] == 2
    ((encoded,), _) = encode([Example("<s>a", "b")], characters())  # as chat templates write it
    assert encoded.prompt.count(0) == 1


def test_what_a_template_writes_after_the_end_is_not_trained_on():
    ((encoded,), _) = encode([Example("a", "Yes</s>\n")], characters(), ends=True)
    assert encoded.answers[0][-1] == 1
    assert encoded.answers[0].count(1) == 1


def test_the_middle_of_the_prompt_is_cut_and_never_the_answer():
    tokenizer = characters()
    long = Example("abcdefghij", "Yes", ("Yes", "No!!"), 0, source="t.json:3")
    ((whole,), _) = encode([long], tokenizer, ends=True)
    ((cut,), lengths) = encode([long], tokenizer, ends=True, max_length=7, allow_cut=1)
    assert cut.answers == whole.answers
    assert len(cut.prompt) + len(cut.answers[0]) == 7
    assert cut.prompt == whole.prompt[:3] + whole.prompt[-2:]  # the beginning stays
    assert (lengths.cut, lengths.share, lengths.longest) == (1, 1.0, 13)
    ((cut,), _) = encode([long], tokenizer, answers="candidates", max_length=7, allow_cut=1)
    assert len(cut.prompt) + max(map(len, cut.answers)) == 7
    ((cut,), _) = encode([long], tokenizer, answers="none", max_length=4, allow_cut=1)
    assert (cut.prompt, cut.answers) == (whole.prompt[:2] + whole.prompt[-2:], ())
    with pytest.raises(ValueError, match=r"t.json:3: the answer leaves 1 tokens for the prompt"):
        encode([long], tokenizer, ends=True, max_length=3, allow_cut=1)


def test_a_share_of_long_examples_is_refused():
    examples = [Example("a", "Yes")] * 97 + [Example("a" * 9, "Yes")] * 3
    with pytest.raises(
        ValueError, match=r"3 of 100 examples \(3.0%\) have more than 8 tokens, the"
    ):
        encode(examples, characters(), max_length=8)
    _, lengths = encode(examples, characters(), max_length=8, allow_cut=0.03)
    assert "3 (3.0%) are cut" in str(lengths)
    assert Lengths((1, 2, 3, 40), None).quantile(0.75) == 3
    assert str(Lengths((), None)).startswith("0 examples")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("a", "", source="t.json:3"), "t.json:3 has no token in its answer"),
        (
            Example("a", "</s>", source="t.json:3"),
            "t.json:3: an answer is only the token that ends",
        ),
        (Example("a", "b </s> c", source="t.json:3"), "t.json:3: an answer holds the token that"),
        (
            Example("ab </s> cd", "e", turns=((1, 9),), source="t.json:3"),
            "t.json:3: an answer holds the token that ends",
        ),
        (Example("", "b", source="t.json:3"), "t.json:3 has no token in its prompt"),
        (Example("", "b"), "the example '' has no token in its prompt"),
    ],
)
def test_examples_that_are_refused(example, message):
    with pytest.raises(ValueError, match=message):
        encode([example], without_bos(), ends=True)


def test_calls_that_are_refused():
    tokenizer = Tokenizer(characters().inner)
    with pytest.raises(ValueError, match="the tokenizer has no eos_token, which ends an answer"):
        encode([Example("a", "b")], tokenizer, ends=True)
    with pytest.raises(ValueError, match="has no token in its answer"):
        encode([Example("a", "b")], tokenizer, answers="candidates")
    ended = Example("a", "b</s>", ("b</s>", "c"), 0)
    with pytest.raises(ValueError, match="an answer holds the token that ends a text"):
        encode([ended], characters(), answers="candidates")
    with pytest.raises(ValueError, match=r"allow_cut is 2; expected a number in \[0, 1\]"):
        encode([], tokenizer, allow_cut=2)
    with pytest.raises(ValueError, match="max_length is 1"):
        encode([], tokenizer, max_length=1)
    assert encode([], tokenizer) == ([], Lengths((), None))


def test_sentences_of_encoders():
    examples = [
        Example("a b", "x", label=1, source="d:1"),
        Example("a b c d e", "y", label=0, second="f g"),
    ]
    (one, two), lengths = encode_sentences(examples, words())
    assert one.prompt == (1, 4, 5, 2)
    assert (one.types, one.label, one.answers, one.source) == ((0, 0, 0, 0), 1, (), "d:1")
    assert two.types == (0,) * 7 + (1,) * 3
    assert lengths.counts == (4, 10)
    (one, two), lengths = encode_sentences(examples, words(), max_length=7, allow_cut=0.5)
    assert two.prompt == (1, 4, 5, 2, 9, 10, 2)  # the longer of the two is cut
    assert two.types == (0, 0, 0, 0, 1, 1, 1)
    (one, _), _ = encode_sentences(examples, words(), max_length=3, allow_cut=1)
    assert one.prompt == (1, 4, 2)
    with pytest.raises(ValueError, match=r"1 of 2 examples \(50.0%\) have more than 7 tokens"):
        encode_sentences(examples, words(), max_length=7)
    with pytest.raises(ValueError, match="the example 'a' has no class"):
        encode_sentences([Example("a", "x")], words())


@pytest.mark.long
@pytest.mark.skipif(not MINI.exists(), reason="the model is not on this machine")
def test_sentences_as_the_tokenizer_of_minilm_has_them():
    _, tokenizer = nys.models.load(MINI)
    pairs = [("A film.", "It is long."), ("Two " * 60, "words")]
    examples = [Example(a, "x", label=0, second=b) for a, b in pairs]
    encoded, _ = encode_sentences(examples, tokenizer, max_length=32, allow_cut=1)
    firsts, seconds = ([pair[i] for pair in pairs] for i in (0, 1))
    tokens, mask, types = tokenizer.pairs(firsts, seconds, max_length=32)
    for i, row in enumerate(encoded):
        np.testing.assert_array_equal(row.prompt, tokens[i][mask[i]])
        np.testing.assert_array_equal(row.types, types[i][mask[i]])
