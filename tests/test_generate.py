"""Cached logits are those of a whole call, and generation is the loop that it stands for."""

import dataclasses
import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import DECODERS, MODELS, call, change, load

import nyscaled as nys
from nyscaled.models.generation import Sampling, _generate, choose, restricted

KEY = jax.random.key(0)
ROWS, LENGTH, NEW = 3, 7, 5
NONE = 99  # a stop token that is none: one as elsewhere, so that programs are shared


def prompts():
    """Rows of 7, 4 and 1 tokens."""
    tokens = np.random.default_rng(0).integers(3, 32, (ROWS, LENGTH))
    mask = np.arange(LENGTH) >= np.array([[0], [3], [6]])
    return tokens, mask


def appended(tokens, mask, new):
    """A prompt with new tokens after it."""
    return np.hstack([tokens, new]), np.hstack([mask, np.ones(new.shape, bool)])


@functools.partial(jax.jit, static_argnums=0)
def piecewise(graphdef, state, tokens, mask):
    """Logits of tokens that the model sees a piece at a time, (pieces, rows, length, vocab)."""

    def step(cache, piece):
        model = nnx.merge(graphdef, state)
        x, cache = model.hidden(*piece, cache)
        return cache, model.logits(x)

    empty = nnx.merge(graphdef, state).new_cache(ROWS, 16)
    cache, logits = jax.lax.scan(step, empty, (tokens, mask))
    return logits, cache


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_with_a_cache_are_those_of_the_whole(name):
    """The padding of two rows ends within a piece, and one piece of a row is all padding."""
    model = load(name)
    tokens, mask = appended(*prompts(), np.random.default_rng(1).integers(3, 32, (ROWS, NEW)))
    pieces = [np.stack(np.split(x, 3, axis=1)) for x in (tokens, mask)]
    assert not pieces[1][0, 2].any()
    graphdef, state = nnx.split(model)
    logits, cache = piecewise(graphdef, nnx.as_pure(state), *pieces)
    got, expected = np.concatenate(list(logits), axis=1), call(model, tokens, mask)
    np.testing.assert_allclose(got[mask], expected[mask], atol=2e-5, rtol=0)
    assert cache.length == 12
    np.testing.assert_array_equal(cache.mask[:, :12], mask)


@pytest.mark.parametrize("name", ["llama", "mistral", "opt_post"])
def test_greedy_tokens_are_the_most_probable(name):
    model = load(name)
    tokens, mask = prompts()
    new = nys.models.generate(model, tokens, mask, max_new_tokens=NEW, stop_tokens=NONE)
    assert new.shape == (ROWS, NEW)
    logits = call(model, *appended(tokens, mask, new))
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, LENGTH - 1 : -1], new)


def test_a_cache_that_is_too_small():
    tokens, mask = prompts()
    model = load("llama")
    with pytest.raises(ValueError, match="have length 7; expected at most 4, the cache's room"):
        model.hidden(tokens, mask, model.new_cache(ROWS, 4))
    _, cache = model.hidden(tokens, mask, model.new_cache(ROWS, 9))
    with pytest.raises(ValueError, match="have length 7; expected at most 2, the cache's room"):
        model.hidden(tokens, mask, cache)


def test_rows_do_not_see_one_another():
    model = load("opt_post")
    tokens, mask = prompts()
    generate = functools.partial(nys.models.generate, model, max_new_tokens=NEW, stop_tokens=[NONE])
    together = generate(tokens, mask)
    for row, seen, new in zip(tokens, mask, together, strict=True):
        np.testing.assert_array_equal(generate(row[None, seen]), new[None])


@pytest.mark.parametrize("name", ["llama", "opt_post"])
def test_the_side_of_padding_does_not_matter(name):
    model, (tokens, mask) = load(name), prompts()
    generate = functools.partial(nys.models.generate, model, max_new_tokens=NEW, stop_tokens=NONE)
    right, seen = np.zeros_like(tokens), np.zeros_like(mask)
    for row, new, kept, own in zip(right, tokens, seen, mask, strict=True):
        row[: own.sum()], kept[: own.sum()] = new[own], True
    np.testing.assert_array_equal(generate(right, seen), generate(tokens, mask))


def test_rows_end_with_their_stop_token():
    model = load("llama")
    tokens, mask = prompts()
    generate = functools.partial(nys.models.generate, model, tokens, mask, max_new_tokens=NEW)
    free = generate(stop_tokens=NONE)
    stop = int(free[0, 2])
    stopped = generate(stop_tokens=stop, pad_token=NONE)
    for row, expected in zip(stopped, free, strict=True):
        end = [*np.flatnonzero(expected == stop), NEW][0] + 1
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert (row[end:] == NONE).all()
    assert (stopped[0, 3:] == NONE).all()
    # By the configuration, padded with the stop token itself where it has no token for that.
    for pad in (None, -1):
        other = nnx.clone(model)
        other.config = dataclasses.replace(model.config, eos_token_id=(stop,), pad_token_id=pad)
        tokens_of_other = nys.models.generate(other, tokens, mask, max_new_tokens=NEW)
        np.testing.assert_array_equal(tokens_of_other, np.where(stopped == NONE, stop, stopped))


def test_one_program_a_bucket():
    model = load("llama")
    tokens, mask = prompts()
    generate = functools.partial(nys.models.generate, model)
    sample = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "key": KEY}
    generate(tokens, mask, max_new_tokens=NEW)
    generate(tokens, mask, max_new_tokens=NEW, **sample)
    before = _generate._cache_size()
    generate(tokens[:, 2:], mask[:, 2:], max_new_tokens=16)
    generate(np.tile(tokens, 2)[:, :13], max_new_tokens=1)
    other = sample | {"temperature": 1.5, "top_k": 7, "top_p": 0.3, "key": jax.random.key(1)}
    generate(tokens, mask, max_new_tokens=np.int64(3), stop_tokens=[7, 8, 9], **other)
    assert _generate._cache_size() == before


@pytest.mark.long
def test_adapters_remat_and_narrow_dtypes():
    tokens, mask = prompts()
    options = {"compute_dtype": jnp.bfloat16, "remat": True}
    model, _ = nys.models.load(MODELS / "llama", **options)
    assert model.new_cache(1, 1).keys.dtype == jnp.bfloat16
    layers = nys.lora.apply(model, 2, targets=".*[qv]_proj", key=KEY)
    for layer in layers.values():
        layer.adapters["default"].lora_b[...] += 0.3
    new = nys.models.generate(model, tokens, mask, max_new_tokens=NEW, stop_tokens=NONE)
    assert (new != nys.models.generate(load("llama"), tokens, mask, max_new_tokens=NEW)).any()
    # Roundings differ between the programs: each token is among the best by a small margin.
    logits = np.asarray(call(model, *appended(tokens, mask, new)), np.float32)[:, LENGTH - 1 : -1]
    chosen = np.take_along_axis(logits, new[..., None], -1)
    assert np.max(logits.max(-1, keepdims=True) - chosen) < 0.1


CHANCES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, None, None, [0, 1, 2, 3, 4]),
        (0.5, None, None, [0, 1, 2, 3, 4]),
        (2.0, 3, None, [1, 3, 4]),
        (1.0, None, 0.6, [1, 3]),
        (1.0, None, 0.7, [1, 3, 4]),
        (1.0, None, 1e-6, [1]),
        (1.0, None, 0.0, [1]),
        (1e-30, None, None, [1]),
        (1e-50, 3, None, [1]),  # 0 in float32
        (1.0, 2, 0.6, [1]),  # 0.4/0.65 > 0.6: top_p reads what top_k left
    ],
)
def test_draws_have_the_chances_asked_for(temperature, top_k, top_p, kept):
    draws = 20_000
    expected = np.zeros(5)
    expected[kept] = (CHANCES[kept] / CHANCES.max()) ** (1 / temperature)
    expected /= expected.sum()
    sampling = Sampling(
        KEY,
        jnp.float32(temperature),
        None if top_k is None else jnp.int32(top_k),
        None if top_p is None else jnp.float32(top_p),
    )
    logits = jnp.broadcast_to(jnp.log(CHANCES) + 30.0, (draws, 5))
    drawn = np.asarray(jax.jit(choose)(logits, sampling, 0))
    got = np.bincount(drawn, minlength=5) / draws
    assert (got[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(got - expected) <= 4 * deviation).all()


def test_each_token_has_a_draw_of_its_own():
    logits = jnp.zeros((50, 32))
    sampling = Sampling(KEY, jnp.float32(1), None, None)
    first, second = (choose(logits, sampling, i) for i in range(2))
    assert np.mean(first == second) < 0.5


@pytest.mark.long
def test_prompts_and_new_tokens_may_take_all_positions():
    """The prompt is longer than what NumPy sorts by insertion, which keeps the order of equals."""
    model = load("opt_post")
    row = np.random.default_rng(0).integers(3, 32, (1, 40))
    tokens, mask = np.pad(row, ((0, 0), (0, 8))), np.arange(48)[None] < 40
    new = nys.models.generate(model, tokens, mask, max_new_tokens=24, stop_tokens=NONE)
    logits = call(model, np.hstack([row, new]))
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, 39:-1], new)


def test_equal_logits_stay_together():
    sampling = Sampling(KEY, jnp.float32(1), jnp.int32(1), None)
    got = restricted(jnp.array([[1.0, 2.0, 2.0]]), sampling)
    np.testing.assert_array_equal(got, [[-np.inf, 2, 2]])


def test_drawn_tokens_repeat_with_their_key_and_do_not_depend_on_other_rows():
    model = load("llama")
    tokens, mask = prompts()
    options = {"max_new_tokens": NEW, "temperature": 1.0, "top_k": 20, "top_p": 0.9}
    generate = functools.partial(nys.models.generate, model, stop_tokens=NONE, **options)
    drawn = generate(tokens, mask, key=KEY)
    np.testing.assert_array_equal(generate(tokens, mask, key=KEY), drawn)
    assert (generate(tokens, mask, key=jax.random.key(1)) != drawn).any()
    tokens[1:], mask[1:] = tokens[1:, ::-1], True
    changed = generate(tokens, mask, key=KEY)
    np.testing.assert_array_equal(changed[0], drawn[0])
    assert (changed[1:] != drawn[1:]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [1, 2]}, r"of shape \(2,\); expected integers \(batch, length\)"),
        ({"tokens": [[0.5]]}, "tokens are float64"),
        ({"tokens": [[3, 32]]}, "from 3 to 32; expected ids below 32"),
        ({"mask": [[1]]}, r"mask has shape \(1, 1\); expected \(1, 2\)"),
        ({"tokens": [[3, 4, 5]], "mask": [[1, 0, 1]]}, "padding between tokens, or no token"),
        ({"mask": [[0, 0]]}, "padding between tokens, or no token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2**31}, "is 2147483648; .* of at least 1 and at most 2147483647"),
        ({"max_new_tokens": True}, "max_new_tokens is True; expected an integer"),
        ({"tokens": [[3, 4], [5]]}, "rows of tokens have different lengths; expected one"),
        ({"mask": [["a", "b"]]}, "mask is <U1; expected True where"),
        ({"tokens": [[2**32 + 3, 4]]}, "from 4 to 4294967299; expected ids below 32"),
        ({"pad_token": 2**40}, "pad_token is 1099511627776; expected an integer"),
        ({"temperature": 10**400, "key": KEY}, "temperature is 1000.*; expected a number"),
        ({"temperature": np.nan, "key": KEY}, "temperature is nan"),
        ({"max_new_tokens": 63}, "are 65 tokens; expected at most 64, the positions"),
        ({"temperature": 1.0}, "temperature without a key"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"top_k": 3, "key": KEY}, "top_k, key without a temperature"),
        ({"temperature": 1.0, "key": KEY, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "key": KEY, "top_p": 1.5}, r"top_p is 1\.5; expected a number in"),
    ],
)
def test_what_is_refused(changes, message):
    arguments = {"tokens": [[3, 4]], "max_new_tokens": 2} | changes
    with pytest.raises(ValueError, match=message):
        nys.models.generate(load("opt_post"), **arguments)


def test_stop_tokens_that_int32_does_not_hold_are_never_met():
    model, (tokens, _) = load("llama"), prompts()
    free = nys.models.generate(model, tokens[:1], max_new_tokens=NEW, stop_tokens=NONE)
    stops = [int(free[0, 0]) + 2**32, 2**40]
    got = nys.models.generate(model, tokens[:1], max_new_tokens=NEW, stop_tokens=stops)
    np.testing.assert_array_equal(got, free)


def test_encoders_are_refused():
    with pytest.raises(ValueError, match="model is a Bert; expected a causal language model"):
        nys.models.generate(load("bert_encoder"), [[3, 4]], max_new_tokens=2)


def generation(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.fixture
def chat(tmp_path):
    """A folder whose `config.json` has another end than its `generation_config.json`."""
    folder = shutil.copytree(MODELS / "llama", tmp_path / "chat")
    model, (tokens, _) = load("llama"), prompts()
    generate = functools.partial(nys.models.generate, tokens=tokens[:1], max_new_tokens=NEW)
    ends = [int(token) for token in generate(model, stop_tokens=NONE)[0, 1:3]]
    change(folder, eos_token_id=ends[1])
    generation(folder, eos_token_id=[30, ends[0]], pad_token_id=29, temperature=0.6)
    return folder, generate, ends


def test_ends_are_those_of_the_generation_config(chat, tmp_path):
    folder, generate, ends = chat
    model, _ = nys.models.load(folder)
    assert (model.config.eos_token_id, model.config.pad_token_id) == ((30, ends[0]), 29)
    new = generate(model)[0]
    np.testing.assert_array_equal(new[1:], [ends[0], 29, 29, 29])
    nys.models.save(model, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    tokens = {"bos_token_id": 1, "eos_token_id": [30, ends[0]], "pad_token_id": 29}
    assert written == tokens | {"temperature": 0.6}
    again, _ = nys.models.load(tmp_path / "saved")
    np.testing.assert_array_equal(generate(again)[0], new)
    # A model that is saved over another leaves none of its ends.
    nys.models.save(load("llama"), folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    nys.models.save(load("bert_encoder"), folder)
    assert not (folder / "generation_config.json").exists()


def test_settings_of_the_generation_that_are_not_applied_are_named(chat):
    folder, *_ = chat
    neutral = {"no_repeat_ngram_size": 0, "bad_words_ids": None, "repetition_penalty": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generation(folder, temperature=0.6, do_sample=True, suppress_tokens=[], **neutral)
        nys.models.load(folder)
    generation(folder, suppress_tokens=[3], top_k=5, **neutral | {"repetition_penalty": 1.1})
    with pytest.warns(UserWarning, match="has suppress_tokens, repetition_penalty, which"):
        nys.models.load(folder)
    (folder / "generation_config.json").unlink()
    change(folder, num_beams=4)
    with pytest.warns(UserWarning, match=r"config\.json has num_beams, which"):
        nys.models.load(folder)


def test_what_the_generation_config_lacks_is_that_of_the_model(chat):
    folder, generate, ends = chat
    generation(folder, temperature=0.6)
    assert generate(nys.models.load(folder)[0])[0, 2] == ends[1]
    generation(folder, eos_token_id=None)
    assert nys.models.load(folder)[0].config.eos_token_id is None
    for text, message in (
        ("[", r"generation_config\.json is not JSON"),
        ("[]", r"generation_config\.json holds a list"),
        ('{"eos_token_id": "2"}', r"generation_config\.json: eos_token_id is '2'; expected an int"),
    ):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            nys.models.load(folder)
