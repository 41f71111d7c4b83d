"""Examples as token ids, for a causal language model or an encoder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from nyscaled.finetune.examples import Encoded, Example
from nyscaled.models import Tokenizer
from nyscaled.models.tokenizers.special_tokens import roles
from nyscaled.validation import require_count, require_scalar

# What stands before an answer while it is encoded: some tokenizers treat the beginning of a text
# as they treat a space, and an answer does not begin a text.
_BREAK = "\n"

Answers = Literal["right", "candidates", "none"]
_ANSWERS: dict[Answers, Callable[[Example], tuple[str, ...]]] = {
    "right": lambda example: (example.answer,),
    "candidates": lambda example: example.candidates,
    "none": lambda example: (),
}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How many tokens examples have before any is cut.

    Attributes:
        counts: tokens of each example, with the longest of its candidates.
        limit: most tokens of an example, None for no limit.
    """

    counts: tuple[int, ...]
    limit: int | None

    @property
    def longest(self) -> int:
        """The most tokens of an example."""
        return max(self.counts, default=0)

    @property
    def mean(self) -> float:
        """The mean number of tokens."""
        return float(np.mean(self.counts)) if self.counts else 0.0

    @property
    def cut(self) -> int:
        """Number of examples that are longer than the limit."""
        return sum(self.limit is not None and count > self.limit for count in self.counts)

    @property
    def share(self) -> float:
        """Share of examples that are longer than the limit."""
        return self.cut / len(self.counts) if self.counts else 0.0

    def quantile(self, share: float) -> int:
        """Return the number of tokens that this share of the examples does not exceed."""
        return int(np.quantile(self.counts, share, method="inverted_cdf")) if self.counts else 0

    def __str__(self) -> str:
        text = (
            f"{len(self.counts)} examples of {self.mean:.0f} tokens in the mean, 90 % within "
            f"{self.quantile(0.9)}, at most {self.longest}"
        )
        return text if self.limit is None else f"{text}; {self.cut} ({self.share:.1%}) are cut"


@dataclasses.dataclass(frozen=True)
class Ends:
    """The tokens that begin and end a text, None where the tokenizer has none."""

    bos: int | None
    eos: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Ends:
        """Return those of a tokenizer.

        A text begins with a token where the tokenizer puts it before an empty one.

        Args:
            tokenizer: the tokenizer of a causal language model.
        """
        special = roles(tokenizer.settings)

        def of(role: str) -> int | None:
            return tokenizer.token_to_id(special[role]) if role in special else None

        bos, eos = of("bos_token"), of("eos_token")
        first = next(iter(tokenizer.encode("").ids), None)
        if bos is None:
            return cls(first if first != eos else None, eos)
        return cls(bos if first == bos else None, eos)


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    ends: bool = False,
    answers: Answers = "right",
    max_length: int | None = None,
    allow_cut: float = 0.01,
) -> tuple[list[Encoded], Lengths]:
    """Return examples for a causal language model as token ids, and their lengths.

    Prompt and answer are encoded apart, so that the prompt's ids do not depend on the answer and
    the answer's are known without a search. Where an example is too long, the middle of its prompt
    is left out, never a part of an answer; of a conversation only the last answer counts then.

    Args:
        examples: examples with an answer or candidates.
        tokenizer: the model's tokenizer.
        ends: whether the token that ends a text follows the answer. Candidates that are scored
            against each other have none.
        answers: what is encoded after the prompt: the right answer, all candidates, or nothing.
        max_length: most tokens of prompt and answer.
        allow_cut: share of examples that may be longer.

    Raises:
        ValueError: without a token that ends a text where `ends` asks for one; on a prompt or an
            answer without tokens, an answer that has no room, or a greater share of long examples.

    Examples:
        >>> import tokenizers
        >>> vocabulary = {"<s>": 0, "</s>": 1, "?": 2, "Good": 3, "Yes": 4, "No": 5}
        >>> inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
        >>> inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> tokenizer = Tokenizer(inner, {"eos_token": "</s>"})
        >>> example = Example("Good?", "Yes", ("Yes", "No"))
        >>> encoded, lengths = encode([example], tokenizer, ends=True)
        >>> encoded[0].prompt, encoded[0].answers, lengths.longest
        ((3, 2), ((4, 1),), 4)
    """
    require_scalar("allow_cut", allow_cut, 0, 1, open_low=False)
    if max_length is not None:
        require_count("max_length", max_length, low=2)
    marks = Ends.of(tokenizer)
    eos = marks.eos if ends and answers == "right" else None
    if ends and answers == "right" and eos is None:
        raise ValueError(
            "the tokenizer has no eos_token, which ends an answer; expected one in its settings "
            "(tokenizer_config.json)"
        )
    texts = [_ANSWERS[answers](e) for e in examples]
    pieces = [_pieces(e) for e in examples]
    prompts = _encode_texts(tokenizer, [first for first, *_ in pieces])
    later = (text for several in (*texts, *(others for _, *others in pieces)) for text in several)
    ids = _encode_answers(tokenizer, list(dict.fromkeys(later)))
    encoded, counts = [], []
    for example, prompt, own, several in zip(examples, prompts, pieces, texts, strict=True):
        end = functools.partial(_end, eos=marks.eos, tokenizer=tokenizer, source=example.source)
        prompt, counted = _with_turns(prompt, [ids[text] for text in own[1:]], end)
        rows = tuple(_ended(ids[text], eos, end) for text in several)
        label = (example.label or 0) if answers == "candidates" else 0
        if marks.bos is not None and prompt[:1] != (marks.bos,):
            prompt, counted = (marks.bos, *prompt), (False, *counted) if counted else ()
        if not prompt or not all(rows) or not (rows or answers == "none"):
            part = "prompt" if not prompt else "answer"
            raise ValueError(f"{_named(example)} has no token in its {part}")
        longest = max(map(len, rows), default=0)
        counts.append(len(prompt) + longest)
        if max_length is not None and counts[-1] > max_length:
            prompt = _without_middle(prompt, max_length - longest, marks, example.source)
            counted = ()  # what is left of an earlier answer follows another text
        encoded.append(Encoded(prompt, rows, label, counted=counted, source=example.source))
    lengths = Lengths(tuple(counts), max_length)
    _require_few_cut(lengths, allow_cut)
    return encoded, lengths


def encode_sentences(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    allow_cut: float = 0.01,
) -> tuple[list[Encoded], Lengths]:
    """Return examples for an encoder with a head as token ids, and their lengths.

    Args:
        examples: examples with one sentence or two, and a class.
        tokenizer: the model's tokenizer.
        max_length: most tokens; of two sentences, the longer one is cut first.
        allow_cut: share of examples that may be longer.

    Raises:
        ValueError: on an example without tokens or without a class, or a greater share of long
            examples.

    Examples:
        >>> import tokenizers
        >>> vocabulary = {"?": 0, "fine": 1, "film": 2}
        >>> inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
        >>> inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> examples = [Example("fine film", "positive", label=1)]
        >>> encoded, _ = encode_sentences(examples, Tokenizer(inner))
        >>> encoded[0].prompt, encoded[0].label
        ((1, 2), 1)
    """
    require_scalar("allow_cut", allow_cut, 0, 1, open_low=False)
    if max_length is not None:
        require_count("max_length", max_length, low=1)
    texts = [e.prompt if e.second is None else (e.prompt, e.second) for e in examples]
    encoded, counts = [], []
    for example, row in zip(examples, tokenizer.encode_batch(texts), strict=True):
        ids, types = tuple(row.ids), tuple(row.type_ids)
        if not ids or example.label is None:
            part = "token" if not ids else "class"
            raise ValueError(f"{_named(example)} has no {part}")
        counts.append(len(ids))
        if max_length is not None and len(ids) > max_length:
            first, second = [example.prompt], [example.second or ""]
            if example.second is None:
                tokens, mask = tokenizer(first, max_length=max_length)
                kinds = np.zeros_like(tokens)
            else:
                tokens, mask, kinds = tokenizer.pairs(first, second, max_length=max_length)
            ids, types = (tuple(map(int, x[0][mask[0]])) for x in (tokens, kinds))
        encoded.append(Encoded(ids, (), example.label, types, source=example.source))
    lengths = Lengths(tuple(counts), max_length)
    _require_few_cut(lengths, allow_cut)
    return encoded, lengths


def _pieces(example: Example) -> list[str]:
    """The prompt, cut where earlier answers begin and end."""
    ends = [0, *(end for turn in example.turns for end in turn), len(example.prompt)]
    return [example.prompt[first:last] for first, last in itertools.pairwise(ends)]


def _with_turns(
    first: tuple[int, ...],
    others: Sequence[tuple[int, ...]],
    end: Callable[[tuple[int, ...]], int | None],
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The ids of a prompt, and which are earlier answers with the token that ends a text."""
    prompt, counted = first, (False,) * len(first)
    for number, piece in enumerate(others):
        size = 0 if number % 2 else end(piece) or len(piece)
        prompt, counted = prompt + piece, counted + (True,) * size + (False,) * (len(piece) - size)
    return prompt, counted if any(counted) else ()


def _named(example: Example) -> str:
    return example.source or f"the example {example.prompt!r:.80}"


def _encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[int, ...]]:
    rows = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [tuple(row.ids) for row in rows]


def _encode_answers(tokenizer: Tokenizer, texts: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the ids of texts that do not begin a text: what they add to a line break."""
    if not texts:
        return {}
    (before,) = _encode_texts(tokenizer, [_BREAK])
    after = _encode_texts(tokenizer, [_BREAK + text for text in texts])
    separate = _encode_texts(tokenizer, texts)
    size = len(before)
    return {
        text: whole[size:] if whole[:size] == before else apart
        for text, whole, apart in zip(texts, after, separate, strict=True)
    }


def _end(
    answer: tuple[int, ...],
    eos: int | None,
    tokenizer: Tokenizer,
    source: str,
    *,
    allowed: bool = True,
) -> int | None:
    """Return how many tokens an answer has with the one that ends a text, None without that one."""
    if eos is None or eos not in answer:
        return None
    end = answer.index(eos) + 1
    if end == 1:
        raise ValueError(f"{source}: an answer is only the token that ends a text; expected a text")
    # A chat template may write a line break after it.
    if not allowed or tokenizer.decode(list(answer[end:])).strip():
        raise ValueError(
            f"{source}: an answer holds the token that ends a text; expected a text without it"
        )
    return end


def _ended(
    answer: tuple[int, ...], eos: int | None, end: Callable[..., int | None]
) -> tuple[int, ...]:
    """Return an answer with one token that ends it, without what a chat template writes after."""
    size = end(answer, allowed=eos is not None)
    return answer[:size] if size or eos is None or not answer else (*answer, eos)


def _without_middle(
    prompt: tuple[int, ...], room: int, marks: Ends, source: str
) -> tuple[int, ...]:
    begin = 1 if marks.bos is not None and prompt[0] == marks.bos else 0
    if room <= begin:
        raise ValueError(
            f"{source}: the answer leaves {room} tokens for the prompt; expected a longer "
            "max_length (answers are not cut)"
        )
    head = begin + (room - begin) // 2
    return prompt[:head] + prompt[len(prompt) - (room - head) :]


def _require_few_cut(lengths: Lengths, allow_cut: float) -> None:
    if lengths.share > allow_cut:
        raise ValueError(
            f"{lengths.cut} of {len(lengths.counts)} examples ({lengths.share:.1%}) have more than "
            f"{lengths.limit} tokens, the longest {lengths.longest}; expected at most "
            f"{allow_cut:.1%} (raise max_length, or allow_cut to cut their prompts)"
        )
