"""GGUF files, written in llama.cpp's layout, against the folders that they were written from."""

import dataclasses
import json
import os
import shutil
import struct
import time
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind

import nyscaled as nys
from nyscaled.checkpoints import gguf as gguf_files
from nyscaled.checkpoints import gguf_layout
from nyscaled.checkpoints.folder import open_folder
from nyscaled.models import LinearScaling, YarnScaling
from nyscaled.models.family import gguf_maps

MODELS = Path(__file__).parent / "fixtures" / "models"
NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
    "model.layers": "blk",
    "model.": "",
}
METADATA = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}


def converted(name, value, source):
    """A tensor's name and value as llama.cpp's converter writes them."""
    kind = source.config["model_type"]
    if kind == "llama" and ("q_proj" in name or "k_proj" in name):
        half = source.config["head_dim"] // 2
        halves = value.reshape(-1, 2, half, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    if kind == "gemma" and "norm" in name:
        value = value + 1
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name, value


def rope_factors(config):
    """What the frequencies are divided by, from the statement of Llama 3."""
    rope, width = config["rope_parameters"], config["head_dim"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def write(path, name, kind=Kind.F32, metadata=(), tensors=(), order=gguf.GGUFEndian.LITTLE):
    """A model of the fixtures as a GGUF file; `metadata` and `tensors` replace what it has."""
    source = open_folder(MODELS / name)
    config = source.config
    family = config["model_type"]
    fields = {f"{family}.{new}": config[old] for old, new in METADATA.items()}
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    fields |= {
        f"{family}.attention.key_length": width,
        f"{family}.attention.value_length": width,
        f"{family}.rope.dimension_count": width,
        f"{family}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
    }
    arrays = dict(converted(n, source.read(n), source) for n in source.names)
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        scaling = {"type": "yarn", "factor": rope["factor"], "finetuned": True}
        scaling["original_context_length"] = rope["original_max_position_embeddings"]
        fields |= {f"{family}.rope.scaling.{key}": value for key, value in scaling.items()}
    if rope["rope_type"] == "llama3":
        arrays["rope_freqs.weight"] = rope_factors(config)
    writer = gguf.GGUFWriter(path, family, endianess=order)
    writer.data_alignment = dict(metadata).get("general.alignment", 32)
    adders = {int: "uint32", str: "string", float: "float32", bool: "bool", list: "array"}
    for key, value in (fields | dict(metadata)).items():
        if value is not None:
            getattr(writer, f"add_{adders[type(value)]}")(key, value)
    for n, value in (arrays | dict(tensors)).items():
        if value is None:
            continue
        quantized = kind != Kind.F32 and value.ndim == 2 and not value.shape[1] % 32
        if quantized:
            writer.add_tensor(n, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(n, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_gguf(path):
    return gguf_files.open_gguf(path, gguf_maps())


def arrays(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", ["llama", "llama3", "llama_bias", "gemma", "qwen2", "qwen3"])
def test_the_model_is_that_of_the_folder(name, path, tmp_path):
    wanted, _ = nys.models.load(MODELS / name)
    got, tokenizer = nys.models.load(write(path, name))
    assert tokenizer is None
    assert got.config == wanted.config
    # 1 + w was rounded where norms are stored so.
    options = {"atol": 1e-7, "rtol": 0} if name == "gemma" else {"atol": 0, "rtol": 0}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **options), arrays(got), arrays(wanted)
    )
    nys.models.save(got, tmp_path / "folder")
    again, _ = nys.models.load(tmp_path / "folder")
    assert again.config == wanted.config


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
        wanted = read.read(name)
        blocks = list(read.blocks(name, 3 * wanted[0].nbytes))
        assert [first for first, _ in blocks] == list(range(0, len(wanted), 3))
        np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), wanted)
    with pytest.raises(ValueError, match="has no tensor x"):
        next(read.blocks("x", 1))


def test_a_quantized_layer_is_put_in_order_after_its_dequantization(path):
    """Rows of 32 in a wider copy of a projection: q and k have their rows permuted."""
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(16, 32)).astype(np.float32)
    source = open_folder(MODELS / "llama")
    name, permuted = converted("model.layers.0.self_attn.q_proj.weight", wide, source)
    read = open_gguf(write(path, "llama", Kind.Q8_0, tensors={name: permuted}))
    wanted = gguf.dequantize(gguf.quantize(wide, Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_array_equal(read.read("model.layers.0.self_attn.q_proj.weight"), wanted)


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


def test_files_that_are_cut_short_or_none_of_gguf_are_refused(path):
    whole = write(path, "llama").read_bytes()
    metadata = whole.index(b"token_embd.weight")
    for size in (0, 3, 20, 200, metadata, metadata + 30, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.gguf is not a sound GGUF file"):
            nys.models.load(path)
    many = {"tokenizer.ggml.scores": [True] * 7}  # a byte each
    whole = write(path, "llama", metadata=many).read_bytes()
    count = whole.index(b"ggml.scores") + len(b"ggml.scores") + 8
    assert whole[count] == 7
    path.write_bytes(whole[: count + 4] + b"\xff" + whole[count + 5 :])  # 10¹² of them
    with pytest.raises(ValueError, match="it ends before what it announces"):
        nys.models.load(path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match="is not a sound GGUF file: GGUF magic invalid"):
        nys.models.load(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"not a sound GGUF file.*No such file"):
        nys.models.load(path)


def entry(path, name):
    """The file's bytes, and where the entry of a tensor has its shape, its type and its offset."""
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
    shape = tensor.field.offset + 8 + len(name) + 4
    kind = shape + 8 * len(tensor.shape)
    return path.read_bytes(), shape, kind, kind + 4


def changed(whole, place, form, value):
    return whole[:place] + struct.pack(form, value) + whole[place + struct.calcsize(form) :]


LAYOUT = "is not a sound GGUF file: .*(lies at|ends before|goes on for|which is not known|has rows)"


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.ffn_up.weight", "output_norm.weight"])
def test_tensors_lie_where_the_ones_before_them_end(name, path):
    """As llama.cpp has it: otherwise a tensor has another's bytes, or the header's."""
    whole, shape, kind, offset = entry(write(path, "llama"), name)
    (there,) = struct.unpack_from("<Q", whole, offset)
    offsets = {0, 4, there + 4, there - 32, there + 32, 2**63, 2**64 - 1, 2**64 - 32} - {there}
    for value in offsets:
        path.write_bytes(changed(whole, offset, "<Q", value % 2**64))
        with pytest.raises(ValueError, match=LAYOUT):
            open_gguf(path)
    for value in {*range(45)} - {Kind.F32, Kind.I32}:  # which have as many bytes
        path.write_bytes(changed(whole, kind, "<I", value))
        with pytest.raises(ValueError, match=LAYOUT):
            open_gguf(path)
    for value in (0, 1, 2**62, 2**64 - 1):
        path.write_bytes(changed(whole, shape, "<Q", value))
        with pytest.raises(ValueError, match=LAYOUT):
            open_gguf(path)
    for value in (0, 5, 2**32 - 1):
        path.write_bytes(changed(whole, shape - 4, "<I", value))
        with pytest.raises(ValueError, match=r"not a sound GGUF file: .*expected 1 to 4"):
            open_gguf(path)


@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_alignments(alignment, path):
    """A power of two, for which all offsets are then right."""
    opened = open_gguf(write(path, "llama"))
    wanted = {name: opened.read(name).copy() for name in opened.names}
    got = open_gguf(write(path, "llama", metadata={"general.alignment": alignment}))
    for name, value in wanted.items():
        np.testing.assert_array_equal(got.read(name), value)


def test_files_whose_parts_do_not_fit_are_refused(path):
    whole = write(path, "llama").read_bytes()
    (tensors, pairs) = struct.unpack_from("<QQ", whole, 8)
    twice = b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"
    same = b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"
    cases = {
        "goes on for .* bytes after": whole + b"\0" * 64,
        r"has the key 'tokenizer\.ggml\.bos_token_id' twice": whole.replace(*twice[::-1]),
        r"has the tensor 'blk\.1\.ffn_up\.weight' twice": whole.replace(*same),
        "ends before what it announces": changed(whole, 8, "<Q", 2**60),
        "ends before what it announces.*": changed(whole, 16, "<Q", 2**64 - 1),
        "version 1; expected 2 or 3": changed(whole, 4, "<I", 1),
        "sound GGUF file": changed(whole, 16, "<Q", pairs - 1),
        "sound GGUF file.*": changed(whole, 8, "<Q", tensors - 1),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_gguf(path)
    for alignment in (0, 3, 48):
        with pytest.raises(ValueError, match=r"alignment is \d+; expected a power of two"):
            open_gguf(
                rewritten(write(path, "llama", metadata={"general.alignment": 32}), alignment)
            )
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        nys.models.load(path)


def rewritten(path, alignment):
    whole = path.read_bytes()
    place = whole.index(b"general.alignment") + len(b"general.alignment") + 4
    path.write_bytes(changed(whole, place, "<I", alignment))
    return path


def test_large_arrays_are_read_at_once(path):
    """A million bytes; through Python one by one they took seconds. Beyond a limit they are refused."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value("x", np.zeros(10**6, np.uint8).tobytes(), gguf.GGUFValueType.ARRAY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    start = time.process_time()
    with pytest.raises(ValueError, match="it lacks"):
        open_gguf(path)
    assert time.process_time() - start < 1
    monkey = pytest.MonkeyPatch()
    monkey.setattr(gguf_layout, "MAX_ELEMENTS", 10**6 - 1)
    with monkey.context(), pytest.raises(ValueError, match="more than 999999 elements"):
        open_gguf(path)
    monkey.undo()


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
        ({"llama.expert_count": 8}, {}, "expert_count 8; which is not known here"),
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
    wanted, _ = nys.models.load(MODELS / "llama")
    jax.tree.map(np.testing.assert_array_equal, arrays(got), arrays(wanted))


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


def test_the_other_byte_order_is_refused(path):
    write(path, "llama", order=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="has the other byte order; expected this machine's"):
        nys.models.load(path)


def test_head_counts_that_the_folder_form_refuses(path):
    write(path, "llama", metadata={"llama.attention.head_count_kv": 3})
    with pytest.raises(ValueError, match=r"model\.gguf: .*num_key_value_heads 3"):
        nys.models.load(path)


TOOLS = "additional_chat_templates/tool_use.jinja"


class Hub:
    """Stands for huggingface_hub: one repository, whose files are a fixture's."""

    def __init__(self, monkeypatch, cache):
        import huggingface_hub

        self.cache, self.asked = cache, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def download(self, name, *, revision, allow_patterns, ignore_patterns):
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append((name, revision))
        if name == "owner/broken":
            raise RuntimeError("the connection broke")
        if name != "owner/llama":
            raise LocalEntryNotFoundError(f"no {name} in the cache, and no network")
        names = ["config.json", "model.safetensors", "merges.txt", "pytorch_model.bin", "a/b.json"]
        names += [
            "onnx/config.json",
            "model/x.safetensors",
            "other.json",
            TOOLS,
            "a/tool_use.jinja",
        ]
        options = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for file in filter_repo_objects(names, **options):
            there = MODELS / "llama" / file
            (self.cache / file).parent.mkdir(exist_ok=True)
            (self.cache / file).write_bytes(there.read_bytes() if there.is_file() else b"")
        if revision == "pickled":
            (self.cache / "model.safetensors").unlink()
        return str(self.cache)


def test_models_of_the_hub(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, tmp_path)
    got, _ = nys.models.load("owner/llama", revision="v1")
    wanted, _ = nys.models.load(MODELS / "llama")
    jax.tree.map(np.testing.assert_array_equal, arrays(got), arrays(wanted))
    assert hub.asked == [("owner/llama", "v1")]
    wanted = {"config.json", "model.safetensors", "merges.txt", TOOLS}
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == wanted
    with pytest.raises(ValueError, match=r"owner/other is no folder here.*no network"):
        nys.models.load("owner/other")
    with pytest.raises(ValueError, match=r"owner/broken is no folder here.*connection broke"):
        nys.models.load("owner/broken")
    for local in (MODELS / "llama", str(MODELS / "llama"), Path("owner/llama")):
        with pytest.raises(ValueError, match="is not from the hub; expected no revision, got 'v1'"):
            nys.models.load(local, revision="v1")
    with pytest.raises(ValueError, match=r"came without model\*\.safetensors: .*refs/pr/N"):
        nys.models.load("owner/llama", revision="pickled")
    assert len(hub.asked) == 4
    # A folder here comes before a repository of the same name.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODELS / "llama3", "owner/llama")
    assert nys.models.load("owner/llama")[0].config.head_dim == 8
    assert len(hub.asked) == 4
    assert json.loads(Path("owner/llama/config.json").read_text())["head_dim"] == 8
