"""GGUF files, written in llama.cpp's layout, against the folders that they were written from."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_cases import converted, open_gguf, rope_factors, write
from model_cases import MODELS, arrays

import nyscaled as nys
from nyscaled.checkpoints.folder import open_folder
from nyscaled.models import LinearScaling, YarnScaling


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", ["llama", "llama3", "llama_bias", "gemma", "qwen2", "qwen3"])
def test_the_model_is_that_of_the_folder(name, path, tmp_path):
    expected, _ = nys.models.load(MODELS / name)
    got, tokenizer = nys.models.load(write(path, name))
    assert tokenizer is None
    assert got.config == expected.config
    # 1 + w was rounded where norms are stored so.
    options = {"atol": 1e-7, "rtol": 0} if name == "gemma" else {"atol": 0, "rtol": 0}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **options), arrays(got), arrays(expected)
    )
    nys.models.save(got, tmp_path / "folder")
    again, _ = nys.models.load(tmp_path / "folder")
    assert again.config == expected.config


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16, Kind.BF16])
def test_tensors_are_dequantized(kind, path):
    """Half precision has blocks of one, so that these tensors may have any width."""
    tensor = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    file = write(path, "llama", kind, tensors={"output.weight": tensor})
    read = open_gguf(file)
    assert read.shape("lm_head.weight") == (32, 64)
    got = read.read("lm_head.weight")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, gguf.dequantize(gguf.quantize(tensor, kind), kind))
    assert 1e-4 < np.abs(got - tensor).max() < (0.5 if kind == Kind.Q4_0 else 0.05)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_tensors_in_blocks_of_rows(kind, path):
    read = open_gguf(write(path, "llama", kind))
    for name in read.names:
        expected = read.read(name)
        blocks = list(read.blocks(name, 3 * expected[0].nbytes))
        assert [first for first, _ in blocks] == list(range(0, len(expected), 3))
        np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), expected)
    with pytest.raises(ValueError, match="has no tensor x"):
        next(read.blocks("x", 1))


def test_a_quantized_layer_is_put_in_order_after_its_dequantization(path):
    """Rows of 32 in a wider copy of a projection: q and k have their rows permuted."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(16, 32)).astype(np.float32)
    source = open_folder(MODELS / "llama")
    name, permuted = converted("model.layers.0.self_attn.q_proj.weight", wide, source)
    read = open_gguf(write(path, "llama", Kind.Q8_0, tensors={name: permuted}))
    expected = gguf.dequantize(gguf.quantize(wide, Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(read.read("model.layers.0.self_attn.q_proj.weight"), expected)


def test_settings_that_have_defaults(path):
    """What a converter may leave out: keys and values of their own number, θ, width of a head."""
    keys = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
    absent = dict.fromkeys(f"llama.{key}" for key in (*keys, "rope.freq_base", "vocab_size"))
    extra = {"llama.expert_count": 0, "llama.rope.scaling.type": "none"}
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.padding_token_id": 3}
    config = open_gguf(write(path, "llama", metadata=absent | extra | ends)).config
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert (config["head_dim"], config["rope_theta"], config["vocab_size"]) == (4, 10000.0, 32)
    assert (config["rms_norm_eps"], config["eos_token_id"]) == (1e-6, [2, 5])
    assert (config["bos_token_id"], config["pad_token_id"]) == (1, 3)


def test_rotations_as_published(path):
    """Llama 3.1: the four numbers are found again from the divisors of 64 frequencies."""
    rope = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    factors = rope_factors({"rope_parameters": rope, "head_dim": 128})
    keys = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    wide = dict.fromkeys((f"llama.{key}" for key in keys), 128) | {"llama.rope.freq_base": 5e5}
    tensors = {"rope_freqs.weight": factors}
    config = open_gguf(write(path, "llama", metadata=wide, tensors=tensors)).config
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        **{key: value for key, value in rope.items() if key != "rope_theta"},
    }
    tensors = {"rope_freqs.weight": np.ones(64, np.float32)}
    config = open_gguf(write(path, "llama", metadata=wide, tensors=tensors)).config
    assert config["rope_scaling"] is None


ONES = np.ones((16, 16), np.float32)
ROPE = np.array([1, 8], np.float32)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"general.architecture": "mamba"}, {}, "'mamba'; expected one of gemma, llama"),
        ({"split.count": 3}, {}, "one of 3 parts; expected them merged"),
        ({"split.count": "x"}, {}, "one of x parts; expected them merged"),
        (
            {"tokenizer.ggml.bos_token_id": 32},
            {},
            "bos_token_id is 32; expected an integer from 0 to 31",
        ),
        ({"tokenizer.ggml.eos_token_id": [2]}, {}, r"model\.gguf: .*eos_token_id is \[2\]"),
        ({"tokenizer.ggml.padding_token_id": "2"}, {}, r"padding_token_id is '2'"),
        ({"llama.rope.freq_base": "x"}, {"rope_freqs.weight": ROPE}, r"model\.gguf: "),
        ({"llama.block_count": None}, {}, r"lacks llama\.block_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "lacks llama.*_rms_epsilon"),
        ({"llama.block_count": 4}, {}, r"has no tensor for model\.layers\.3\."),
        ({"llama.block_count": 10**9}, {}, "has 1000000000 layers, and .* tensors"),
        ({"llama.block_count": 2}, {}, r"no parameter for: model\.layers\.2\."),
        ({"llama.feed_forward_length": [24, 24, 24]}, {}, r"\[24, 24, 24\] for intermediate"),
        ({"llama.rope.dimension_count": 2}, {}, "rope.dimension_count 2; expected 4"),
        ({"llama.vocab_size": 31}, {}, "vocab_size 31; expected 32"),
        (
            {"llama.rope.scaling.type": "longrope"},
            {},
            "scaling.type 'longrope'; expected none, lin",
        ),
        ({"llama.rope.scaling.attn_factor": 2.0}, {}, "scaling.attn_factor 2.0; expected 1.0"),
        ({"llama.rope.scaling.factor": "2"}, {}, "factor is '2'; expected a positive number"),
        ({"llama.attention.causal": False}, {}, "attention.causal False; expected True"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.0}, {}, "yarn_ext_factor 0.0; expected 1.0"),
        ({"llama.rope.dimension_count": 0}, {}, "rope.dimension_count 0; expected 4"),
        ({"llama.vocab_size": 0}, {}, "vocab_size 0; expected 32"),
        ({"llama.expert_count": 8}, {}, "expert_count 8; expected no such setting"),
        ({}, {"token_embd.weight": None}, r"lacks token_embd\.weight"),
        ({}, {"blk.0.attn_q.bias": ONES[0]}, r"no tensor for model\.layers\.0\.self_attn\.k_proj"),
        ({}, {"blk.0.attn_norm.bias": ONES[0]}, "no parameter for: model.*input_layernorm.bias"),
        (
            {"llama.rope.scaling.factor": 2.0},
            {"rope_freqs.weight": np.array([1, 8], "f")},
            "rope_freqs.weight and rope.scaling; expected one of them",
        ),
        ({}, {"blk.0.attn_k.weight": ONES}, r"k_proj\.weight of shape \(16, 16\); expected"),
        ({}, {"output.weight": ONES}, r"lm_head\.weight of shape \(16, 16\); expected \(32, 16\)"),
        ({}, {"rope_freqs.weight": np.array([1, 7, 2], "f")}, "rope_freqs.* not of Llama 3"),
        ({}, {"rope_freqs.weight": np.array([2, 1], "f")}, "rope_freqs.* not of Llama 3"),
        ({}, {"rope_freqs.weight": np.zeros(0, "f")}, "rope_freqs.* not of Llama 3"),
        ({}, {"output_norm.weight": np.ones(16, np.int32)}, "output_norm.weight in I32"),
    ],
)
def test_what_is_refused(metadata, tensors, message, path):
    write(path, "llama", metadata=metadata, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        nys.models.load(path)


@pytest.mark.parametrize("where", ["architecture", "key", "value", "tensor"])
def test_messages_are_short_whatever_the_file_says(where, path):
    long = "x" * 100000
    metadata, tensors = {
        "architecture": ({"general.architecture": long}, {}),
        "key": ({f"llama.{long}": 1}, {}),
        "value": ({"llama.attention.scale": long}, {}),
        "tensor": ({}, {long[:60] + str(i) * 3: ONES for i in range(300)}),
    }[where]
    write(path, "llama", metadata=metadata, tensors=tensors)
    with pytest.raises(ValueError, match="x") as caught:
        nys.models.load(path)
    assert len(str(caught.value)) < 2000


GPT2 = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [f"<{i}>" for i in range(32)],
    "tokenizer.ggml.merges": ["< 0"],
}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"pre": None}, r"lacks tokenizer\.ggml\.pre"),
        *(({"pre": pre}, f"pre is '{pre}'; expected one") for pre in ("default", "tekken")),
        ({"model": "bert"}, "the tokenizer is 'bert'"),
        ({"model": "t5"}, "the tokenizer is 't5'"),
        ({"tokens": ["a", "a"]}, "has a token twice"),
        ({"merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({}, "merges are not of these tokens"),
        ({"merges": "0"}, "merges is '0'"),
    ],
)
def test_a_vocabulary_that_is_not_read_leaves_the_model(metadata, message, path):
    """As a folder's that is not read: there is a warning, and the weights are of use alone."""
    write(path, "llama", metadata=GPT2 | {f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    with pytest.warns(UserWarning, match=f"model.gguf has a vocabulary of which no.*{message}"):
        got, tokenizer = nys.models.load(path)
    assert tokenizer is None
    expected, _ = nys.models.load(MODELS / "llama")
    jax.tree.map(np.testing.assert_array_equal, arrays(got), arrays(expected))


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"scaling.type": "linear", "scaling.factor": 2.0}, LinearScaling(2.0)),
        ({"scaling.factor": 2.5}, LinearScaling(2.5)),
        ({"scale_linear": 4.0}, LinearScaling(4.0)),
        ({"scaling.type": "none", "scaling.factor": 2.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
        ({"scaling.type": "yarn", "scaling.factor": 1.0}, None),
        (
            {"scaling.type": "yarn", "scaling.factor": 2.0},
            YarnScaling(2.0, 64, 1 + 0.1 * np.log(2)),
        ),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 2.0,
                "scaling.original_context_length": 32,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_ext_factor": -1.0,
            },
            YarnScaling(2.0, 32, 1 + 0.1 * np.log(2), beta_fast=16.0),
        ),
    ],
)
def test_scaled_rotations(metadata, scaling, path):
    """With the defaults of llama.cpp: linear, and the length of training for yarn's."""
    write(path, "llama", metadata={f"llama.rope.{k}": v for k, v in metadata.items()})
    got = nys.models.load(path)[0].config.rope_scaling
    assert got == scaling or dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(scaling))


def test_head_counts_that_the_folder_form_refuses(path):
    write(path, "llama", metadata={"llama.attention.head_count_kv": 3})
    with pytest.raises(ValueError, match=r"model\.gguf: .*num_key_value_heads 3"):
        nys.models.load(path)
