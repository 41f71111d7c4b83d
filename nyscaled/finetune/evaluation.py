"""Scores of a model in a task: candidates against each other, classes, and generated answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nyscaled.finetune import batches, meshes
from nyscaled.finetune.answers import number
from nyscaled.finetune.batches import Batch
from nyscaled.finetune.encoding import Lengths, encode, encode_sentences
from nyscaled.finetune.examples import Encoded, Example
from nyscaled.finetune.generated import METRICS, generated_texts
from nyscaled.finetune.inputs import is_encoder, longest
from nyscaled.finetune.objectives import SCORES
from nyscaled.finetune.order import NONE
from nyscaled.finetune.task import Task
from nyscaled.models import BertClassifier, Tokenizer
from nyscaled.numerics import full_precision
from nyscaled.validation import require_count

M = TypeVar("M", bound=nnx.Module)


class Score(NamedTuple):
    """A mean over examples, and its standard error (for an accuracy, the binomial one)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} ± {100 * self.standard_error:.2f} %"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model answers in one example.

    Attributes:
        source: file and line of the example.
        answer: the best candidate, the class, or the generated text.
        golds: right answers.
        values: the example's part in each metric, from 0 to 1.
    """

    source: str
    answer: str
    golds: tuple[str, ...]
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of a model, and the predictions that they are means of.

    Attributes:
        task: name of the task.
        predictions: one per example, in their order.
        lengths: tokens of the examples.
    """

    task: str
    predictions: tuple[Prediction, ...]
    lengths: Lengths

    @property
    def scores(self) -> dict[str, Score]:
        """Mean and standard error of each metric."""
        scores: dict[str, Score] = {}
        for name in self.predictions[0].values:
            values = np.array([prediction.values[name] for prediction in self.predictions])
            error = float(np.std(values) / np.sqrt(len(values)))
            scores[name] = Score(float(np.mean(values)), error)
        return scores

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {score}" for name, score in self.scores.items())
        return f"{self.task}: {scores} on {len(self.predictions)} examples"


def evaluate(
    model: nnx.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    task: Task,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    allow_cut: float = 0.01,
    generated: bool = False,
) -> Evaluation:
    """Return the scores of a model in a task.

    Candidates are scored by the mean log-probability of their tokens, as in MeZO (Malladi et al.,
    2023). Where only their last token differs, one pass per prompt gives the same decision.
    Text is generated with the most probable tokens. Dropout is off.

    Args:
        model: a causal language model, or an encoder with a head.
        tokenizer: the model's tokenizer.
        examples: examples that `task.examples` made for such a model.
        task: the task.
        batch_size: examples in a batch; all of them where there are fewer.
        max_length: most tokens of an example with its candidates; the prompt's middle is cut.
        allow_cut: share of examples that may be longer.
        generated: whether the answers of a task with candidates are read from generated text.

    Raises:
        ValueError: on scores that are not finite, and as `encode_scored` does.

    Examples:
        >>> import tokenizers
        >>> from nyscaled.finetune import TASKS, Row
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=4, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> model = Llama(LlamaConfig(**sizes, **heads), rngs=nnx.Rngs(0))
        >>> vocabulary = {"?": 0, "fine": 1, "great": 2, "terrible": 3}
        >>> inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
        >>> inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> examples = TASKS["sst2"].examples([Row({"sentence": "fine", "label": 1}, "dev.tsv:1")])
        >>> evaluation = evaluate(model, Tokenizer(inner), examples, TASKS["sst2"])
        >>> evaluation.predictions[0].golds
        (' great',)
    """
    require_count("batch_size", batch_size, low=1)
    encoded, lengths = encode_scored(
        model,
        tokenizer,
        examples,
        task,
        max_length=max_length,
        allow_cut=allow_cut,
        generated=generated,
    )
    if meshes.current() is None:  # over which a batch is split
        batch_size = min(batch_size, len(examples))
    encoder = is_encoder(model)
    if encoder:
        _require_head(model, task)
    model = without_dropout(model)
    if encoder:
        best = _best(model, encoded, "class", batch_size)
        predictions = [_class_of(e, task, i) for e, i in zip(examples, best, strict=True)]
    elif _is_generated(examples, generated):
        texts = generated_texts(model, tokenizer, encoded, task, batch_size)
        predictions = [_read(e, task, text) for e, text in zip(examples, texts, strict=True)]
    else:
        best = _best_candidates(model, encoded, batch_size)
        predictions = [_choice(e, i) for e, i in zip(examples, best, strict=True)]
    return Evaluation(task.name, tuple(predictions), lengths)


def encode_scored(
    model: nnx.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    task: Task,
    *,
    max_length: int | None = None,
    allow_cut: float = 0.01,
    generated: bool = False,
) -> tuple[list[Encoded], Lengths]:
    """Return examples as the ids that `evaluate` reads, and their lengths; no weight is read.

    Beside `max_length`, the model's own positions limit an example. Of these, generated text takes
    `task.max_new_tokens`.

    Args:
        model: as in `evaluate`; an encoder may be without its head.
        tokenizer: as in `evaluate`.
        examples: as in `evaluate`.
        task: as in `evaluate`.
        max_length: as in `evaluate`.
        allow_cut: as in `evaluate`.
        generated: as in `evaluate`.

    Raises:
        ValueError: without examples, on a task that such a model cannot do or that has no such
            answers, and examples without a right answer or that `encode` refuses.
    """
    if not examples:
        raise ValueError("there are no examples to score; expected one at least")
    encoder, own = is_encoder(model), longest(model)
    task.objective(encoder=encoder)  # refuses a task of the other kind
    reads_text = not encoder and _is_generated(examples, generated)
    if reads_text:
        _require_golds(examples, task)
        own = None if own is None else own - task.max_new_tokens
        if own is not None and own < 2:
            raise ValueError(
                f"the model reads {longest(model)} tokens, of which the task {task.name} generates "
                f"{task.max_new_tokens}; expected a model with more positions"
            )
    limits = [x for x in (max_length, own) if x is not None]
    limit = min(limits, default=None)
    if encoder:
        return encode_sentences(examples, tokenizer, max_length=limit, allow_cut=allow_cut)
    return encode(
        examples,
        tokenizer,
        answers="none" if reads_text else "candidates",
        max_length=limit,
        allow_cut=allow_cut,
    )


def _is_generated(examples: Sequence[Example], generated: bool) -> bool:
    return generated or not all(example.candidates for example in examples)


def _require_golds(examples: Sequence[Example], task: Task) -> None:
    if task.metric is None:
        raise ValueError(
            f"the task {task.name} has no generated answers; expected its candidates to be scored"
        )
    for example in examples:
        if not example.golds:
            raise ValueError(f"{example.source} has no right answer to compare with")
        if task.metric == "number" and number(example.golds[0]) is None:
            raise ValueError(
                f"{example.source}: the right answer is {example.golds[0]!r:.80}; expected a number"
            )


def _require_head(model: nnx.Module, task: Task) -> None:
    labels = model.config.labels if isinstance(model, BertClassifier) else ()
    if len(labels) != len(task.classes):
        raise ValueError(
            f"the model has {len(labels)} classes; expected a BertClassifier of "
            f"{len(task.classes)}, {', '.join(task.classes)}"
        )


def without_dropout(model: M) -> M:
    """Return the model with the same arrays and without dropout.

    Args:
        model: a model, which is not changed.
    """
    same = nnx.merge(*nnx.split(model))
    same.eval()
    return same


def _class_of(example: Example, task: Task, best: int) -> Prediction:
    gold = task.classes[example.label or 0]
    answer = task.classes[best]
    return Prediction(example.source, answer, (gold,), {"accuracy": float(best == example.label)})


def _choice(example: Example, best: int) -> Prediction:
    answer = example.candidates[best]
    right = best == example.label or answer in example.golds
    golds = tuple(dict.fromkeys((example.answer, *example.golds)))
    return Prediction(example.source, answer, golds, {"accuracy": float(right)})


def _best_candidates(model: nnx.Module, encoded: Sequence[Encoded], size: int) -> list[int]:
    """Return the candidate of each example that has the greatest mean log-probability."""
    moved = [_with_shared_prompt(e) for e in encoded]
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, e in enumerate(moved):
        single = all(len(answer) == 1 for answer in e.answers)
        groups.setdefault(e.answers if single else (), []).append(i)
    # A program and its padding are not worth it for a few examples among many.
    rare = [g for g in groups if g and len(groups) > 1 and len(groups[g]) < size]
    several = [i for g in ((), *rare) for i in groups.pop(g, [])]
    best: dict[int, int] = {}
    for indices, source in (*((own, moved) for own in groups.values()), (several, encoded)):
        own = _best(model, [source[i] for i in indices], "choice", size)
        best.update(zip(indices, own, strict=True))
    return [best[i] for i in range(len(encoded))]


def _with_shared_prompt(encoded: Encoded) -> Encoded:
    """Return the example with what all candidates begin with at the end of the prompt.

    Only candidates of equal length are changed, of which nothing but the last token differs: all
    means of log-probabilities then lose the same.
    """
    first = encoded.answers[0]
    if len(first) == 1 or any(answer[:-1] != first[:-1] for answer in encoded.answers):
        return encoded
    answers = tuple(answer[-1:] for answer in encoded.answers)
    return dataclasses.replace(encoded, prompt=encoded.prompt + first[:-1], answers=answers)


def _best(model: nnx.Module, encoded: Sequence[Encoded], objective: str, size: int) -> list[int]:
    """Return the index of the greatest score of each example."""
    best = [0] * len(encoded)
    if not encoded:
        return best
    graphdef, state = nnx.split(model)
    made = batches.make(encoded, objective, batch_size=size, most=longest(model))
    for indices, batch in made.sorted(size):
        scores = np.asarray(_scores(graphdef, objective, nnx.as_pure(state), batch))
        for i, row in zip(indices, scores, strict=True):
            if i == NONE:
                continue
            if not np.isfinite(np.max(row)):
                raise ValueError(
                    f"the model's scores of {encoded[i].source or f'example {i}'} are "
                    f"{row.tolist()}; expected finite ones"
                )
            best[i] = int(np.argmax(row))
    return best


@functools.partial(jax.jit, static_argnums=(0, 1))
@full_precision
def _scores(
    graphdef: nnx.GraphDef[nnx.Module], objective: str, state: object, batch: Batch
) -> Float[Array, "examples choices"]:
    return SCORES[objective](nnx.merge(graphdef, state), batch)


def _read(example: Example, task: Task, text: str) -> Prediction:
    assert task.metric is not None
    values = METRICS[task.metric](example, task, text)
    return Prediction(example.source, text, example.golds, values)
