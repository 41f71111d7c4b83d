"""Settings and tensors of model folders: what is read, and what is refused."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
from cases import skip_without_float16
from model_cases import MODELS, change, load

import nyscaled as nys
from nyscaled.models import Qwen2Config, rope
from nyscaled.models.config import LARGEST

SCALING = [field.name for field in dataclasses.fields(rope.RopeScaling)]


@pytest.fixture
def folder(tmp_path):
    """A copy of a model to spoil."""
    return shutil.copytree(MODELS / "llama", tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("opt", {"activation_function": "gelu"}, "activation_function is 'gelu'; for opt only"),
        ("opt", {"enable_bias": False}, "enable_bias is False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
        ("opt", {"num_attention_heads": 3}, "with 3 heads; expected a multiple"),
        ("opt", {"do_layer_norm_before": False}, r"no parameter for: model\.decoder\.final"),
        ("opt_post", {"word_embed_proj_dim": None}, r"for: model\.decoder\.project_in\.weight"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; for gemma only"),
        ("gemma", {"head_dim": "absent"}, "head_dim is missing; expected it for gemma"),
        ("gemma", {"head_dim": 7}, "head_dim 7; expected"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types is .*; for mistral only"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; expected a positive integer"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; for mistral only 'silu'"),
        ("qwen2_window", {"layer_types": ["chunked_attention"] * 3}, "layer_types is .*expected"),
        ("qwen2_window", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "expected use_sliding_window and a"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers is -1; expected an integer from 0"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; for qwen2 only 'silu'"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; for qwen3 only 'silu'"),
        ("gemma", {"tie_word_embeddings": False}, r"has no tensor for lm_head\.weight"),
    ],
)
def test_settings_of_other_families_that_are_refused(name, settings, message, tmp_path):
    folder = shutil.copytree(MODELS / name, tmp_path / "copy")
    change(folder, **settings)
    with pytest.raises(ValueError, match=message):
        nys.models.load(folder)


def test_numbers_of_numpy_become_pythons(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    config = dataclasses.replace(load("llama").config, vocab_size=np.int64(32))
    assert type(config.vocab_size) is int


def test_configurations_made_by_hand():
    config = load("llama").config
    assert dataclasses.replace(config, eos_token_id=[2, 3]).eos_token_id == (2, 3)
    with pytest.raises(ValueError, match="num_key_value_heads is 0; expected a positive integer"):
        dataclasses.replace(config, num_key_value_heads=0)
    with pytest.raises(ValueError, match=r"rope_scaling is \{.*; expected None or a scaling"):
        dataclasses.replace(config, rope_scaling={"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"sliding_window": 4, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        (
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            (LARGEST, LARGEST, 5),
        ),
        ({"layer_types": ("full_attention",) * 3}, None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
            },
            (4, LARGEST, 4),
        ),
    ],
)
def test_windows_made_by_hand_are_those_of_the_file(settings, windows):
    config = dataclasses.replace(load("qwen2").config, **settings)
    assert config.windows == windows
    assert Qwen2Config.from_json(config.to_json()) == config
    assert Qwen2Config.from_json(config.to_json() | settings) == config


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("llama", (1, 2, None)),
        ("mistral", (1, 2, None)),
        ("qwen2", (None, None, None)),
        ("qwen3", (None, None, None)),
        ("gemma", (2, 1, 0)),
        ("opt", (2, 2, 1)),
    ],
)
def test_token_ids_that_are_missing_are_those_of_transformers(name, ids, tmp_path):
    folder = shutil.copytree(MODELS / name, tmp_path / "copy")
    names = "bos_token_id", "eos_token_id", "pad_token_id"
    change(folder, **dict.fromkeys(names, "absent"))
    config = nys.models.load(folder)[0].config
    assert tuple(getattr(config, n) for n in names) == ids
    change(folder, attention_bias=None, **dict.fromkeys(names))  # which nulls no family refuses
    config = nys.models.load(folder)[0].config
    assert tuple(getattr(config, n) for n in names) == (None, None, None)


def test_a_tokenizer_comes_along(folder):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "low": 1, "rank": 2}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    _, tokenizer = nys.models.load(folder)
    assert tokenizer.encode("low rank model").ids == [1, 2, 0]
    words.add_tokens([f"more{i}" for i in range(30)])
    words.save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match="tokenizer of 33 tokens and a model of 32"):
        nys.models.load(folder)
    sparse = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "low": 40}, "[UNK]"))
    sparse.save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match="tokenizer of 41 tokens and a model of 32"):
        nys.models.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a sound tokenizer"):
        nys.models.load(folder)


def test_inputs_longer_than_the_positions_are_refused():
    model = load("opt")
    with pytest.raises(ValueError, match="have length 65; expected at most 64"):
        model(jnp.zeros((1, 65), int))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba'; expected one of bert, gemma, llama, mistral, opt, qwen2, qwen3",
        ),
        ({"model_type": "absent"}, "model_type None"),
        ({"model_type": []}, r"model_type \[\]; expected one of"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; for llama only 'silu' is supported"),
        ({"attention_bias": True}, r"no tensor for model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"is_causal": False}, "is_causal is False; for llama only True is supported"),
        ({"attention_bias": 1}, "attention_bias is 1; expected true or false"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": "16"}, "hidden_size is '16'; expected a positive integer"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0; expected a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"eos_token_id": 1.5}, r"eos_token_id is 1\.5; expected an integer, a list"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope is 'longrope'"),
        ({"rope_parameters": [1]}, r"rope is \[1\]; expected one object"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    **dict(zip(SCALING, (8.0, 4.0, 1.0, 16), strict=True)),
                }
            },
            r"low_freq_factor is 4\.0 and high_freq_factor 1\.0",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"rope_type": "llama3"} | dict.fromkeys(SCALING, "8")},
            "factor is '8'; expected a positive number",
        ),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        (
            {"rms_norm_eps": 10**400},
            r"rms_norm_eps is 1000.*; expected a positive number from 1e-30",
        ),
        ({"rms_norm_eps": 1e308}, r"rms_norm_eps is 1e\+308; expected a positive number"),
        ({"rms_norm_eps": 1e-50}, "rms_norm_eps is 1e-50; expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": {"rope_theta": 1e-300}}, "rope_theta is 1e-300; expected"),
        ({"rope_parameters": {"rope_theta": 1e300}}, r"rope_theta is 1e\+300; expected"),
        ({"rope_parameters": False}, "rope is False; expected one object"),
        (
            {"vocab_size": 10**400},
            "vocab_size is 1000.*; expected a positive integer up to 2147483647",
        ),
        ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808; expected a positive integer"),
        ({"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, "(by|sizes that no array)"),
        ({"head_dim": 2**31 - 2, "num_attention_heads": 2**31 - 1}, "(expected|no array)"),
        ({"max_position_embeddings": 10**20}, "max_position_embeddings is 1000"),
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers, and .* 30 tensors"),
        ({"num_hidden_layers": 10**21}, "num_hidden_layers is 1000.*; expected"),
        (
            {"eos_token_id": 10**30},
            "eos_token_id is 1000.*; expected an integer, a list of them or null, from -1",
        ),
        (
            {"bos_token_id": -2},
            "bos_token_id is -2; expected an integer, a list of them or null, from -1",
        ),
        ({"vocab_size": 33}, r"embed_tokens.weight of shape \(32, 16\); expected \(33, 16\)"),
        ({"num_hidden_layers": 4}, r"has no tensor for model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"no parameter for: model\.layers\.2\."),
    ],
)
def test_settings_that_are_refused(settings, message, folder):
    change(folder, **settings)
    with pytest.raises(ValueError, match=message):
        nys.models.load(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, r"has no tensor for model\.norm\.weight"),
        ({"model.norm.bias": np.ones(16, "f")}, r"no parameter for: model\.norm\.bias"),
        ({"model.norm.weight": np.ones(17, "f")}, r"of shape \(17,\); expected \(16,\)"),
        ({"model.norm.weight": np.ones(16, int)}, "in int64; expected floating weights"),
    ],
)
def test_tensors_that_are_refused(tensors, message, folder):
    change(folder, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        nys.models.load(folder)


def test_forms_that_older_files_have(folder):
    """Constants among the weights, a head equal to a tied embedding, names without their root."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    bare = {k.removeprefix("model."): v for k, v in tensors.items()}
    bare["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, "f")
    safetensors.numpy.save_file(bare, folder / "model.safetensors")
    older = {"rope_theta": 123.0, "rope_parameters": "absent", "num_key_value_heads": 2}
    change(folder, tie_word_embeddings=True, rope_scaling=None, eos_token_id=[2, 3], **older)
    model, _ = nys.models.load(folder)
    assert model.config.rope_theta == 123.0
    assert model.config.rope_scaling is None
    assert model.config.eos_token_id == (2, 3)
    assert not hasattr(model, "lm_head")
    kernel = tensors["model.layers.1.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(model.layers.mlp.up_proj.kernel[...][1], kernel)


@pytest.mark.parametrize("name", ["llama", "gemma", "llama_bias", "opt"])
def test_a_tied_file_has_the_embedding_the_head_or_both(name, tmp_path):
    folder = shutil.copytree(MODELS / name, tmp_path / "copy")
    embedding = np.asarray(load(name).embed_tokens.embedding[...])
    model = nys.models.load(folder)[0]
    nys.models.save(model, folder)  # in one file
    prefix = "model.decoder." if name == "opt" else "model."
    embedded = f"{prefix}embed_tokens.weight"
    change(folder, tie_word_embeddings=True, tensors={"lm_head.weight": embedding})
    both, _ = nys.models.load(folder)
    change(folder, tensors={embedded: None})
    head, _ = nys.models.load(folder)
    for model in (both, head):
        assert not hasattr(model, "lm_head")
        np.testing.assert_array_equal(model.embed_tokens.embedding[...], embedding)
    change(folder, tensors={"lm_head.weight": None})
    with pytest.raises(ValueError, match=f"has no tensor for {embedded}"):
        nys.models.load(folder)


def test_another_head_than_the_embedding_is_kept_against_the_settings(tmp_path):
    """As transformers keeps it, with a warning."""
    for name in ("llama", "gemma", "opt_post"):
        folder = shutil.copytree(MODELS / name, tmp_path / name)
        other = np.asarray(load(name).embed_tokens.embedding[...]) + 1
        change(folder, tie_word_embeddings=True, tensors={"lm_head.weight": other})
        with pytest.warns(UserWarning, match=r"lm_head\.weight that is not model\..*embed_tokens"):
            model, _ = nys.models.load(folder)
        assert not model.config.tie_word_embeddings
        np.testing.assert_array_equal(model.lm_head.kernel[...], other.T)
        nys.models.save(model, folder)
        assert nys.models.load(folder)[0].config == model.config


def test_tensors_of_shards_that_the_index_does_not_name(folder, tmp_path):
    """They are read as those of one file: constants are left out, others have to be known."""
    nys.models.save(load("llama"), folder, max_shard_size=4000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    arrays = safetensors.numpy.load_file(shards[1])
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, "f")}
    safetensors.numpy.save_file(arrays | constant, shards[1])
    model, _ = nys.models.load(folder)
    kernel = load("llama").layers.mlp.up_proj.kernel[...]
    np.testing.assert_array_equal(model.layers.mlp.up_proj.kernel[...], kernel)
    safetensors.numpy.save_file(arrays | {"other.weight": np.ones(2, "f")}, shards[1])
    with pytest.raises(ValueError, match=r"no parameter for: other\.weight"):
        nys.models.load(folder)
    # A parameter is found although the index does not name it, unless it is there twice.
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(arrays))
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    safetensors.numpy.save_file(arrays, shards[1])
    nys.models.load(folder)
    first = safetensors.numpy.load_file(shards[0])
    safetensors.numpy.save_file(first | {name: arrays[name]}, shards[0])
    with pytest.raises(ValueError, match=f"has {name}, as .* has; expected"):
        nys.models.load(folder)


@pytest.mark.parametrize(
    "name", ["rotary_emb.inv_freq", "layers.2.self_attn.rotary_emb.cos_cached"]
)
def test_constants_of_files_without_a_root(name, folder):
    change(folder, lambda n: n.removeprefix("model."), {name: np.ones(2, "f")})
    nys.models.load(folder)


def test_scaled_rotations_out_of_range_are_refused(tmp_path):
    folder = shutil.copytree(MODELS / "llama3", tmp_path / "copy")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    for name, value in (("factor", 1e-50), ("factor", 10**400), ("low_freq_factor", 1e-300)):
        change(folder, rope_parameters=rope | {name: value})
        with pytest.raises(ValueError, match=f"{name} is .*; expected a positive number from"):
            nys.models.load(folder)


def test_the_empty_path_is_refused(monkeypatch, tmp_path):
    """It would be the current directory."""
    monkeypatch.chdir(tmp_path)
    for act in (nys.models.load, lambda path: nys.models.save(load("llama"), path)):
        with pytest.raises(ValueError, match="the folder is ''; expected a path"):
            act("")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_taken_as_they_are(folder):
    change(folder, tensors={"model.norm.weight": np.full(16, np.nan, "f")})
    assert np.isnan(nys.models.load(folder)[0].norm.scale[...]).all()


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.float64(1e300), jnp.float32, r"norm\.weight with 1e\+300 in it, which float32"),
        (np.float32(1e6), jnp.float16, r"norm\.weight with 1000000\.0 in it, which float16"),
        (np.float32(-1e6), jnp.bfloat16, None),
        (np.float64(3), jnp.float16, None),
    ],
)
def test_weights_that_are_finite_stay_so(value, dtype, message, folder):
    skip_without_float16(dtype)
    change(folder, tensors={"model.norm.weight": np.full(16, value)})
    if message is None:
        assert jnp.isfinite(nys.models.load(folder, dtype=dtype)[0].norm.scale[...]).all()
        return
    with pytest.raises(ValueError, match=message):
        nys.models.load(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "mscale": 10**400, "mscale_all_dim": 1},
            "cannot be used",
        ),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, r"rope_theta is 1\.0; expected"),
        ({"rope_type": "yarn", "factor": 10**400}, "factor is 1000.*; expected a positive"),
        ({"rope_type": "linear", "factor": 1e-50}, "factor is 1e-50; expected a positive"),
    ],
)
def test_scaled_rotations_that_overflow_are_refused(rope, message, folder):
    change(folder, rope_parameters=rope)
    with pytest.raises(ValueError, match=message):
        nys.models.load(folder)
