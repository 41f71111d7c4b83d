"""The `config.json` that a GGUF file stands for, rebuilt from the file's metadata."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

ROPE = "rope_freqs.weight"

# Metadata that an architecture must have, and may have, by their names in `config.json`.
_NEEDED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
# Settings of biases, by a layer that has one then.
_BIASES = {"attention_bias": "q_proj", "mlp_bias": "up_proj"}
# Metadata that may have these values only; all others must be off (0, "", …).
_NEUTRAL = {
    "rope.scaling.finetuned": (True, False),  # for the record
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # the second for the default, which is 1
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
}


def read_config(
    metadata: Mapping[str, Any],
    names: Collection[str],
    vocabulary: int,
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """Return what `config.json` would hold.

    Args:
        metadata: metadata of the file.
        names: transformers' names of the tensors.
        vocabulary: number of tokens in the embedding.
        rope_factors: divisors of the frequencies of rotations, None if the file has none.

    Raises:
        ValueError: on metadata that is missing, unsound or not known here.
    """
    architecture = metadata["general.architecture"]
    prefix = f"{architecture}."
    fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    if missing := [prefix + key for key in _NEEDED if key not in fields]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    config = {
        new: _decimal(fields.pop(old))
        for old, new in (_NEEDED | _OPTIONAL).items()
        if old in fields
    }
    for name in config.keys() - {"rms_norm_eps", "rope_theta"}:
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"it has {config[name]!r} for {name}; expected a positive integer")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    width = config["head_dim"]
    config["rope_scaling"] = _scaling(fields, config.get("max_position_embeddings"))
    for setting, layer in _BIASES.items():
        config[setting] = any(name.endswith(f".{layer}.bias") for name in names)
    neutral = _NEUTRAL | {
        "rope.dimension_count": (width,),
        "attention.value_length": (width,),
        "vocab_size": (vocabulary,),
    }
    for key, value in fields.items():
        allowed = neutral.get(key, ())
        # False and 0 have a meaning where there are values that have none.
        if (value not in allowed) if allowed else value:
            hint = (
                f"expected {allowed[0]!r}"
                if allowed
                else "expected no such setting, whose meaning is not known here"
            )
            raise ValueError(f"it has {prefix}{key} {value!r}; {hint}")
    if rope_factors is not None:
        if config["rope_scaling"]:
            raise ValueError(f"it has {ROPE} and rope.scaling; expected one of them")
        config["rope_scaling"] = _llama3(rope_factors, config["rope_theta"], width)
    roles = "bos", "eos", "eot", "padding"
    bos, eos, eot, padding = (token_id(metadata, role, vocabulary) for role in roles)
    ends = list(dict.fromkeys(i for i in (eos, eot) if i is not None))
    return {
        **config,
        "model_type": architecture,
        "vocab_size": vocabulary,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": bos,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": padding,
    }


def token_id(metadata: Mapping[str, Any], role: str, count: int) -> int | None:
    """Return the id of a special token, None where the metadata of a GGUF file does not have it.

    Args:
        metadata: metadata of the file.
        role: what the token is for, in llama.cpp's words, such as `"bos"`.
        count: number of tokens.

    Raises:
        ValueError: on an id outside of the vocabulary.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    i = metadata.get(key)
    if i is not None and (type(i) is not int or not 0 <= i < count):
        raise ValueError(f"{key} is {i!r}; expected an integer from 0 to {count - 1}")
    return i


def _scaling(fields: dict[str, Any], length: Any) -> dict[str, Any] | None:
    """Return the scaling of rotations, and remove its keys from the metadata."""
    name = fields.pop("rope.scaling.type", "linear")
    older = fields.pop("rope.scale_linear", None)
    factor = _decimal(fields.pop("rope.scaling.factor", older)) or 1.0
    original = fields.pop("rope.scaling.original_context_length", length)
    betas = {
        beta: _decimal(fields.pop(f"rope.scaling.yarn_{beta}"))
        for beta in ("beta_fast", "beta_slow")
        if f"rope.scaling.yarn_{beta}" in fields
    }
    if name not in ("none", "linear", "yarn"):
        raise ValueError(f"it has rope.scaling.type {name!r}; expected none, linear or yarn")
    if name == "none" or factor == 1:
        return None
    scaling = {"rope_type": name, "factor": factor}
    if name == "yarn":
        scaling |= {"original_max_position_embeddings": original, **betas}
    return scaling


def _llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the parameters of Llama 3 that give the file's divisors of the frequencies.

    The divisors determine `factor`, and the other three up to a common multiple. As published,
    slow rotations turn once and fast ones four times within the original context.
    """
    factor, low, high, original = float(factors.max(initial=1)), 1.0, 4.0, 8192
    if factors.size and np.all(factors == 1):
        return None
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # in one position
    if factors.shape == turns.shape and np.all(factors >= 1):
        between = (factors > 1) & (factors < factor)
        kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
        if between.any():
            original = round(np.median((low + (high - low) * kept[between]) / turns[between]))
        kept = np.clip((original * turns - low) / (high - low), 0, 1)
        if np.allclose(1 / (kept + (1 - kept) / factor), factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": _decimal(factor),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(f"it has {ROPE} that is not of Llama 3: {factors}")


def _decimal(value: Any) -> Any:
    """Return the shortest decimal of a float32, 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
