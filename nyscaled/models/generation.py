"""Continue texts token by token."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from nyscaled.models.blocks import Mask, Tokens
from nyscaled.models.cache import Cache
from nyscaled.models.config import LARGEST

# Lengths are rounded up to powers of two from here on, so that few programs are compiled.
SHORTEST = 16


class Sampling(NamedTuple):
    """How a token is sampled; the numbers are traced, so that other values need no new program."""

    key: Key[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None


def generate(
    model: Any,
    tokens: Any,
    mask: Any = None,
    *,
    max_new_tokens: SupportsIndex,
    stop_tokens: int | Sequence[int] | None = None,
    temperature: float | None = None,
    top_k: SupportsIndex | None = None,
    top_p: float | None = None,
    key: Key[Array, ""] | None = None,
    pad_token: int | None = None,
) -> Int[np.ndarray, "batch max_new_tokens"]:
    """Continue each row of tokens, with the most probable token or with sampled ones.

    The whole continuation is one compiled program, which ends when every row has met a stop token.
    Another program is compiled only for another batch size, when a length passes a power of two,
    for more than eight stop tokens, and with or without `temperature`, `top_k` and `top_p`. The
    values of these and the prompts need no new program. Keys and values of past tokens are kept in
    the compute dtype.

    Args:
        model: causal language model, with or without adapters.
        tokens: ids, (batch, length).
        mask: True where there is a token, (batch, length); padding on either side. None for no
            padding.
        max_new_tokens: most tokens that are generated.
        stop_tokens: tokens that end a row. None for the configuration's `eos_token_id`, which is
            that of `generation_config.json` where a folder has one. Nothing else is read from that
            file: temperature, top_k and top_p are the arguments here.
        temperature: divides the logits before a token is sampled; None or 0 for the most probable
            token.
        top_k: sample only from the k most probable tokens.
        top_p: sample only from the most probable tokens whose probabilities add up to p, after
            `temperature` and `top_k`.
        key: PRNG key of the samples. The samples of a row do not depend on the other rows.
        pad_token: token that follows a row's stop token. None for the configuration's
            `pad_token_id` if it is in the vocabulary, else for the first stop token.

    Returns:
        The new tokens of each row, int32: up to and with its stop token, then `pad_token`.
        `[tokenizer.decode(row) for row in …]` is text where both are special tokens.

    Raises:
        ValueError: on a model that is not a causal language model, ids outside the vocabulary,
            padding between tokens, a row without tokens, more tokens than the model has positions
            for, numbers out of range, a temperature without a key, and top_k, top_p or a key
            without a temperature.

    Examples:
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> config = LlamaConfig(**sizes, **heads, eos_token_id=2)
        >>> graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
        >>> model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.ones(x.shape), state))
        >>> generate(model, [[5, 7, 1]], max_new_tokens=4).shape
        (1, 4)
    """
    if not hasattr(model, "new_cache"):
        raise ValueError(
            f"model is a {type(model).__name__}; expected a causal language model of this package"
        )
    config = model.config
    tokens, mask = _prompt(tokens, mask, config.vocab_size)
    count = _count("max_new_tokens", max_new_tokens)
    length, longest = int(mask.sum(1).max()) + count, model.max_length
    if longest is not None and length > longest:
        raise ValueError(
            f"the longest prompt and max_new_tokens are {length} tokens; expected at most "
            f"{longest}, the positions that the model knows"
        )
    stops = _stops(config.eos_token_id if stop_tokens is None else stop_tokens)
    if pad_token is not None:
        pad_token = _count("pad_token", pad_token, least=-1)
    else:
        pad_token, first = config.pad_token_id, int(stops[0])
        # Early conversions of LLaMA have -1 there.
        if not isinstance(pad_token, int) or not 0 <= pad_token < config.vocab_size:
            pad_token = max(first, 0)
    sampling = _sampling(temperature, top_k, top_p, key, config.vocab_size)
    padding = ((0, 0), (_rounded(tokens.shape[1]) - tokens.shape[1], 0))
    graphdef, state = nnx.split(model)
    new = _generate(
        graphdef,
        nnx.as_pure(state),
        np.pad(tokens, padding),
        np.pad(mask, padding),
        stops,
        pad_token,
        count,
        sampling,
        room=_rounded(count),
    )
    return np.asarray(new)[:, :count]


@functools.partial(jax.jit, static_argnums=0, static_argnames="room")
def _generate(
    graphdef: Any,
    state: Any,
    tokens: Tokens,
    mask: Mask,
    stops: Int[Array, " stops"],
    pad: Int[Array, ""] | int,
    limit: Int[Array, ""] | int,
    sampling: Sampling | None,
    *,
    room: int,
) -> Int[Array, "batch room"]:
    batch, length = tokens.shape

    def after(
        tokens: Tokens, mask: Mask | None, cache: Cache, i: Array | int
    ) -> tuple[Array, Cache]:
        """Return the next token, and the cache with these tokens."""
        # Modules belong to the trace they are made in: each has its own.
        model = nnx.merge(graphdef, state)
        x, cache = model.hidden(tokens, mask, cache)
        logits = model.logits(x[:, -1]).astype(jnp.float32)
        return choose(logits, sampling, i), cache

    def unfinished(carry: tuple[Any, ...]) -> Array:
        i, done, *_ = carry
        return (i < limit) & ~jnp.all(done)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, done, last, cache, new = carry
        token, cache = after(last[:, None], None, cache, i)
        token = jnp.where(done, pad, token)
        return i + 1, done | jnp.isin(token, stops), token, cache, new.at[:, i].set(token)

    empty = nnx.merge(graphdef, state).new_cache(batch, length + room)
    first, cache = after(tokens, mask, empty, 0)
    new = jnp.full((batch, room), pad, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, step, (1, jnp.isin(first, stops), first, cache, new))[-1]


def choose(
    logits: Float[Array, "batch vocab"], sampling: Sampling | None, i: Int[Array, ""] | int
) -> Int[Array, " batch"]:
    """Return a new token of each row: the most probable one, or a sample with the row's own key.

    Args:
        logits: logits of the token.
        sampling: how it is sampled, or None for the most probable token.
        i: number of the new token.
    """
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Below the greatest logit, so that none is infinite for a small temperature.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
    if sampling.top_k is not None or sampling.top_p is not None:
        logits = restricted(logits, sampling)
    key = jax.random.fold_in(sampling.key, i)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def restricted(
    logits: Float[Array, "batch vocab"], sampling: Sampling
) -> Float[Array, "batch vocab"]:
    """Return the logits with −∞ for tokens outside of top_k and top_p.

    Tokens with equal logits stay or go together.

    Args:
        logits: logits of the tokens.
        sampling: has top_k and top_p.
    """
    falling = -jnp.sort(-logits, axis=-1)
    if sampling.top_k is not None:
        ranks = jnp.arange(logits.shape[-1])
        falling = jnp.where(ranks < sampling.top_k, falling, -jnp.inf)
    count = jnp.sum(falling > -jnp.inf, axis=-1)
    if sampling.top_p is not None:
        chances = jax.nn.softmax(falling, axis=-1)
        # A token stays while those before it do not reach p; the first does in any case.
        before = jnp.cumsum(chances, axis=-1) - chances
        within = jnp.sum(before < sampling.top_p, axis=-1)
        count = jnp.minimum(count, jnp.maximum(within, 1))  # p may be 0 in float32
    least = jnp.take_along_axis(falling, count[:, None] - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _rounded(length: int) -> int:
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _rectangular(name: str, rows: Any) -> np.ndarray:
    try:
        return np.asarray(rows)
    except ValueError as error:
        raise ValueError(
            f"the rows of {name} have different lengths; expected one length, padded, with a mask"
        ) from error


def _prompt(tokens: Any, mask: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = _rectangular("tokens", tokens)
    mask = None if mask is None else _rectangular("mask", mask)
    if mask is not None and mask.dtype.kind not in "biuf":
        raise ValueError(f"mask is {mask.dtype}; expected True where there is a token")
    mask = np.ones(tokens.shape, bool) if mask is None else mask > 0
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}; expected integers (batch, length)"
        )
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape}; expected {tokens.shape}, that of tokens")
    edges = np.diff(mask.astype(int), axis=1, prepend=0, append=0)
    if (np.count_nonzero(edges, axis=1) != 2).any():
        raise ValueError("mask has padding between tokens, or no token; expected it on one side")
    ids = tokens[mask]
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"tokens are from {ids.min()} to {ids.max()}; expected ids below {vocab_size}"
        )
    # What is generated follows the last column: padding goes to the left.
    order = np.argsort(mask, axis=1, kind="stable")
    tokens, mask = (np.take_along_axis(x, order, axis=1) for x in (tokens, mask))
    return np.where(mask, tokens, 0).astype(np.int32), mask


def _stops(stop_tokens: int | Sequence[int] | None) -> np.ndarray:
    """Return the stop tokens, filled up with -1 to a multiple of eight, at least one of them."""
    stops = np.asarray([] if stop_tokens is None else stop_tokens).reshape(-1)
    if stops.size and stops.dtype.kind not in "iu":
        raise ValueError(f"stop_tokens is {stop_tokens!r}; expected ids")
    filled = np.full(8 * max(1, -(-stops.size // 8)), -1, np.int32)
    # No text has an id that int32 does not hold.
    filled[: stops.size] = np.where((stops >= 0) & (stops <= LARGEST), stops, -1)
    return filled


def _count(name: str, value: Any, *, least: int = 1, most: float = LARGEST) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        end = "" if math.isinf(most) else f" and at most {most}"
        raise ValueError(f"{name} is {value!r:.80}; expected an integer of at least {least}{end}")
    return number


def _real(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {value!r:.80}; expected a number") from error


def _sampling(
    temperature: float | None,
    top_k: SupportsIndex | None,
    top_p: float | None,
    key: Any,
    vocab_size: int,
) -> Sampling | None:
    temperature = 0.0 if temperature is None else _real("temperature", temperature)
    if not temperature:
        options = {"top_k": top_k, "top_p": top_p, "key": key}
        names = [name for name, value in options.items() if value is not None]
        if names:
            raise ValueError(f"{', '.join(names)} without a temperature; expected temperature > 0")
        return None
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a positive number, or None")
    if key is None:
        raise ValueError("temperature without a key; expected a key to draw tokens with")
    try:
        jax.eval_shape(lambda: jax.random.fold_in(key, 0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"key is {key!r:.80}; expected one PRNG key") from error
    if top_p is not None and not 0 < (top_p := _real("top_p", top_p)) <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number in (0, 1]")
    return Sampling(
        key,
        jnp.float32(temperature),
        None
        if top_k is None
        else jnp.int32(min(_count("top_k", top_k, most=math.inf), vocab_size)),
        None if top_p is None else jnp.float32(top_p),
    )
