"""Rotations for long texts against transformers (`tests/fixtures/make_rope.py`)."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import MODELS, call, change

import nyscaled as nys
from nyscaled.models import rope

CASES = json.loads((Path(__file__).parent / "fixtures" / "rope.json").read_text())
WIDTH, LONGEST = 16, 64
LLAMA3 = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.filterwarnings("ignore:rope 'default' has factor")
@pytest.mark.parametrize("case", CASES, ids=lambda case: json.dumps(case["config"]))
def test_frequencies_are_those_of_transformers(case):
    theta, scaling = rope.read_rope(case["config"], LONGEST)
    compute = functools.partial(rope.inverse_frequencies, WIDTH, theta, scaling)
    assert case["frequencies"]
    for length, expected in case["frequencies"].items():
        np.testing.assert_allclose(compute(int(length)), expected, rtol=2e-6)
        traced = jax.jit(compute)(jnp.int32(int(length)))
        np.testing.assert_allclose(traced, expected, rtol=1e-5)
    factor = 1.0 if scaling is None else scaling.attention_factor
    np.testing.assert_allclose(factor, case["factor"], rtol=1e-12)
    # What is written says all of it.
    written = {"rope_theta": theta, "rope_scaling": rope.write_rope(scaling)}
    assert rope.read_rope(json.loads(json.dumps(written)), LONGEST) == (theta, scaling)


@pytest.mark.filterwarnings("error")
def test_llama3_without_a_ramp():
    """With equal factors a rotation is slowed down or not; the second here turns just as fast."""
    frequencies = np.array([3.0, np.pi / 2, 1.0])
    scaled = rope.RopeScaling(8.0, 1.0, 1.0, 4).scaled(frequencies, 1e4, 1)
    np.testing.assert_allclose(scaled[[0, 2]], frequencies[[0, 2]] / [1, 8])
    assert np.isfinite(scaled).all()


def test_yarn_where_few_rotations_are_slow():
    """The ramp ends at most at the width of a head less one, beyond the list of its pairs."""
    _, scaling = rope.read_rope(
        {"rope_theta": 10.0, "rope_scaling": YARN | {"original_max_position_embeddings": 1000}},
        LONGEST,
    )
    slowed = np.clip((np.arange(4) - 2) / (7 - 2), 0, 1)  # of 4·log(1000/64π)/log 10 = 2.8 and 8.8
    expected = 10.0 ** (-np.arange(4) / 4) * (1 - slowed + slowed / 4)
    np.testing.assert_allclose(rope.inverse_frequencies(8, 10.0, scaling), expected)


def test_zeros_stand_for_the_ends_of_yarn():
    """As they do in transformers."""
    zeros = {"beta_fast": 0, "beta_slow": 0}
    read = [rope.read_rope({"rope_scaling": YARN | other}, LONGEST) for other in ({}, zeros)]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "longrope", "short_factor": [1], "long_factor": [2]}, "rope is 'longrope'"),
        ({"rope_type": "proportional"}, "rope is 'proportional'; only default, llama3, linear"),
        ({"type": ["linear"]}, r"rope is \['linear'\]"),
        ({"rope_type": "linear"}, "rope 'linear' lacks factor"),
        ({"rope_type": "dynamic", "factor": None}, "rope 'dynamic' lacks factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'; expected a positive number"),
        (YARN | {"factor": "2"}, "rope 'yarn' has {'factor': '2'}; expected numbers"),
        (YARN | {"mscale": [1]}, r"rope 'yarn' has .*\[1\].*; expected numbers"),
        (YARN | {"truncate": 1}, "truncate is 1; expected true or false"),
        (
            YARN | {"original_max_position_embeddings": 1.5},
            r"embeddings is 1\.5; expected a positive",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; only whole heads"),
        ({"full_attention": {"rope_type": "default"}}, "rope has full_attention; only one rope"),
        ([1], r"rope is \[1\]; expected one object"),
        (False, "rope is False; expected one object"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rope.read_rope({"rope_parameters": settings}, LONGEST)


def test_what_a_type_does_not_use_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="rope 'linear' has beta_fast, which it does not use"):
        _, scaling = rope.read_rope(
            {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 4}}, LONGEST
        )
    assert scaling == rope.LinearScaling(2.0)


def model_with(tmp_path, **settings):
    folder = shutil.copytree(MODELS / "llama", tmp_path / "copy", dirs_exist_ok=True)
    change(folder, rope_parameters="absent", **settings)
    return nys.models.load(folder)[0]


@pytest.mark.long
def test_scaled_models_are_saved_and_loaded(tmp_path):
    tokens = np.arange(3, 9)[None]
    outputs = []
    for settings in (
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        YARN,
        {"rope_type": "llama3", **LLAMA3},
        None,
    ):
        model = model_with(tmp_path, rope_scaling=settings, max_position_embeddings=5)
        nys.models.save(model, tmp_path / "saved")
        again, _ = nys.models.load(tmp_path / "saved")
        assert again.config == model.config
        outputs.append(call(model, tokens))
        np.testing.assert_array_equal(call(again, tokens), outputs[-1])
    assert len({np.asarray(output).tobytes() for output in outputs}) == 5


def test_dynamic_scaling_begins_beyond_the_positions_of_training(tmp_path):
    settings = {"type": "dynamic", "factor": 2.0}
    tokens = np.arange(3, 11)[None]
    plain = model_with(tmp_path, rope_scaling=None, rope_theta=1e4)
    dynamic = model_with(tmp_path, rope_scaling=settings, max_position_embeddings=6)
    np.testing.assert_array_equal(call(dynamic, tokens[:, :6]), call(plain, tokens[:, :6]))
    theta = 1e4 * (2 * 8 / 6 - 1) ** (4 / 2)
    grown = model_with(tmp_path, rope_scaling=None, rope_theta=theta)
    np.testing.assert_allclose(call(dynamic, tokens), call(grown, tokens), atol=2e-5)


@pytest.mark.long
def test_dynamic_scaling_is_by_the_longest_row(tmp_path):
    settings = {"type": "dynamic", "factor": 2.0}
    model = model_with(tmp_path, rope_scaling=settings, max_position_embeddings=6)
    tokens = np.tile(np.arange(3, 11), (2, 1))
    mask = np.arange(8) >= np.array([[0], [4]])
    x, _ = model.hidden(tokens, mask, model.new_cache(2, 8))
    np.testing.assert_allclose(model.logits(x)[:1], call(model, tokens[:1]), atol=2e-5)


@pytest.mark.long
def test_dynamic_scaling_while_tokens_come_one_by_one(tmp_path):
    """A key keeps the rotation of the length at which it came; padding is no token."""
    settings = {"type": "dynamic", "factor": 4.0}
    model = model_with(tmp_path, rope_scaling=settings, max_position_embeddings=4)
    tokens = np.arange(3, 10)[None]

    @nnx.jit
    def piecewise(model, tokens, mask):
        logits, cache = [], model.new_cache(1, tokens.shape[1])
        for i in range(tokens.shape[1]):
            x, cache = model.hidden(tokens[:, i : i + 1], mask[:, i : i + 1], cache)
            logits.append(model.logits(x))
        return jnp.concatenate(logits, axis=1), cache

    expected, cache = piecewise(model, tokens, np.ones((1, 7), bool))
    padded, seen = np.pad(tokens, ((0, 0), (5, 0))), np.arange(12)[None] >= 5
    got, _ = piecewise(model, padded, seen)
    np.testing.assert_allclose(got[:, 5:], expected, atol=2e-5)
    # Of the key at position p, without its rotation, the rotated one by the length p + 1 is made.
    plain = model_with(tmp_path, rope_scaling=None)
    first = piecewise(plain, tokens, np.ones((1, 7), bool))[1].keys[0, 0]
    theta = [1e4 * (max(4 * n / 4 - 3, 1)) ** 2 for n in range(1, 8)]
    for p in range(7):
        angles = p * np.array([[1e4**-0.5], [theta[p] ** -0.5]])
        a, b = first[p, :, 1], first[p, :, 3]
        turn = angles[1] - angles[0]
        np.testing.assert_allclose(
            cache.keys[0, 0, p, :, 1], a * np.cos(turn) - b * np.sin(turn), atol=2e-5
        )


def test_heads_too_narrow_for_dynamic_scaling(tmp_path):
    with pytest.raises(ValueError, match="head_dim is 2; expected at least 4"):
        model_with(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0}, head_dim=2)
