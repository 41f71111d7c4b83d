"""Models of the fixtures as GGUF files in llama.cpp's layout."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from model_cases import MODELS

from nyscaled.checkpoints import gguf as gguf_files
from nyscaled.checkpoints.folder import open_folder
from nyscaled.models.family import gguf_maps

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
