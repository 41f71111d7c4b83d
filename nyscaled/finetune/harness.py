"""Models for lm-evaluation-harness (Gao et al., 2021), through its class TemplateLM.

Its prompts and scores differ from the paper's, so that its numbers are a second opinion: sums of
log-probabilities, not means, choose an answer, and `acc_norm` divides by characters.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from nyscaled.finetune import batches
from nyscaled.finetune.batches import Batch
from nyscaled.finetune.encoding import Ends
from nyscaled.finetune.evaluation import without_dropout
from nyscaled.finetune.examples import Encoded
from nyscaled.finetune.generated import generated_ids
from nyscaled.finetune.objectives import answer_logits
from nyscaled.models import Tokenizer
from nyscaled.models.causal import CausalLM
from nyscaled.numerics import full_precision
from nyscaled.validation import require_count

Ids = tuple[int, ...]


@runtime_checkable
class Request(Protocol):
    """A request of the harness: a context and a continuation, or settings of a generation."""

    args: tuple[str, Mapping[str, object]]


class Likelihood(NamedTuple):
    """The log-probability of a continuation, and whether it is the most probable one."""

    log_p: float
    greedy: bool


def log_likelihoods(
    model: CausalLM, pairs: Sequence[tuple[Ids, Ids]], batch_size: int = 16
) -> list[Likelihood]:
    """Return the log-probability of each continuation after its context.

    Args:
        model: a causal language model.
        pairs: ids of a context and of a continuation, one token each at least.
        batch_size: pairs in a batch.

    Examples:
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> model = Llama(LlamaConfig(**sizes, **heads), rngs=nnx.Rngs(0))
        >>> both = log_likelihoods(model, [((3, 5), (7,)), ((3, 5), (7, 2))])
        >>> both[1].log_p < both[0].log_p < 0
        True
    """
    results = [Likelihood(0.0, False)] * len(pairs)
    if not pairs:
        return results
    encoded = [Encoded(context, (continuation,), 0) for context, continuation in pairs]
    graphdef, state = nnx.split(without_dropout(model))
    made = batches.make(encoded, "tokens", batch_size=batch_size)
    for indices, batch in made.sorted(batch_size):
        log_p, greedy = map(np.asarray, _scored(graphdef, nnx.as_pure(state), batch))
        for j, i in enumerate(indices):
            if i != batches.NONE:
                results[i] = Likelihood(float(log_p[j]), bool(greedy[j]))
    return results


@functools.partial(jax.jit, static_argnums=0)
@full_precision
def _scored(
    graphdef: nnx.GraphDef[CausalLM], state: object, batch: Batch
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    logits = answer_logits(nnx.merge(graphdef, state), batch)
    targets, weights = jnp.asarray(batch.targets), jnp.asarray(batch.weights)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    greedy = (jnp.argmax(logits, axis=-1) == targets) | (weights == 0)
    return jnp.sum(log_p * weights, axis=1), jnp.all(greedy, axis=1)


def harness_model(
    model: CausalLM, tokenizer: Tokenizer, *, name: str, batch_size: int = 16
) -> object:
    """Return a model as an object that lm-evaluation-harness takes.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        name: name of the model, under which the harness keeps what it computed.
        batch_size: requests in a batch.

    Raises:
        ImportError: without the package lm_eval.
        ValueError: for a tokenizer without a token that ends a text.
    """
    marks = Ends.of(tokenizer)
    end = marks.eos
    if end is None:
        raise ValueError("the tokenizer has no eos_token; expected one for the harness")
    longest = model.max_length or 2048
    own = without_dropout(model)
    template = _lm_eval("api.model").TemplateLM

    class HarnessModel(template):
        tokenizer_name = name

        @property
        def eot_token_id(self) -> int:
            return end

        @property
        def prefix_token_id(self) -> int:
            return end if marks.bos is None else marks.bos

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: object
        ) -> list[int]:
            ids: list[int] = tokenizer.encode(string, add_special_tokens=False).ids
            begins = marks.bos is None or ids[:1] == [marks.bos] or add_special_tokens is False
            return ids if begins or marks.bos is None else [marks.bos, *ids]

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
        ) -> list[Likelihood]:
            pairs = [_fitting(context, answer, longest) for _, context, answer in requests]
            return log_likelihoods(own, pairs, batch_size)

        def loglikelihood_rolling(
            self, requests: Sequence[Request], disable_tqdm: bool = False
        ) -> list[float]:
            utils = _lm_eval("utils")
            pairs: list[tuple[Ids, Ids]] = []
            counts: list[int] = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=longest,
                    context_len=1,
                )
                parts = [utils.make_disjoint_window(window) for window in windows]
                pairs += [(tuple(context), tuple(answer)) for context, answer in parts]
                counts.append(len(parts))
            scores = iter(log_likelihoods(own, pairs, batch_size))
            return [sum(next(scores).log_p for _ in range(count)) for count in counts]

        def generate_until(
            self, requests: Sequence[Request], disable_tqdm: bool = False
        ) -> list[str]:
            texts = [""] * len(requests)
            groups: dict[int, list[int]] = {}
            for i, request in enumerate(requests):
                # The prompt keeps a token at least.
                count = min(_new_tokens(request.args[1]), longest - 1)
                groups.setdefault(count, []).append(i)
            for count, indices in groups.items():
                prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
                prompts = [(*p,)[-(longest - count) :] or (end,) for p in prompts]
                new = generated_ids(own, prompts, count, [end], batch_size)
                for i, ids in zip(indices, new, strict=True):
                    texts[i] = _before(tokenizer.decode(ids), requests[i].args[1].get("until"))
            return texts

        def apply_chat_template(
            self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
        ) -> str:
            going_on = not add_generation_prompt
            return tokenizer.chat(
                chat_history,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=going_on,
            )

    return HarnessModel()


def run_harness(
    model: CausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    name: str,
    folder: Path | None = None,
    examples: int | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, float]]:
    """Return the metrics of tasks of lm-evaluation-harness.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: names of tasks of the harness, or in `folder`.
        name: name of the model.
        folder: folder with tasks of one's own, in the harness's YAML.
        examples: score only so many examples of each task.
        batch_size: requests in a batch.

    Raises:
        ImportError: without the package lm_eval.
        ValueError: if the harness fails, as on an unknown task.
    """
    harness, managers = _lm_eval("evaluator"), _lm_eval("tasks")
    own = harness_model(model, tokenizer, name=name, batch_size=batch_size)
    try:
        manager = managers.TaskManager(include_path=None if folder is None else str(folder))
        results = harness.simple_evaluate(
            model=own, tasks=list(tasks), limit=examples, task_manager=manager
        )["results"]
    except Exception as error:  # of many classes: of the hub, of the network, of tasks
        raise ValueError(f"lm-evaluation-harness fails: {error!s:.500}") from error
    # Only numbers: the harness puts names and texts beside them.
    return {
        task: {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        for task, values in json.loads(json.dumps(results, default=float)).items()
    }


def _lm_eval(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the harness needs {error.name}: pip install 'nyscaled[eval]'"
        ) from error


def _fitting(context: Sequence[int], answer: Sequence[int], longest: int) -> tuple[Ids, Ids]:
    """Return a context and a continuation without the beginning of those that are too long."""
    answer = tuple(answer)[-longest:]
    # The last token of the continuation is not read.
    return tuple(context)[-(longest + 1 - len(answer)) :], answer


def _new_tokens(settings: Mapping[str, object]) -> int:
    if settings.get("do_sample") and settings.get("temperature"):
        raise ValueError("the task samples text; expected one with the most probable tokens")
    count = settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256
    return require_count("max_gen_toks", count, low=1)


def _before(text: str, until: object) -> str:
    stops = [until] if isinstance(until, str) else cast("Sequence[str]", until or ())
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text
