"""GGUF files, llama.cpp's format: metadata and tensors, often quantized, in one file.

The file is read as the model folder that it was converted from: `config.json` is rebuilt from the
metadata, names are transformers', tensors are dequantized to float32 one by one from the mapped
file, and what the converter did to them is undone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nyscaled.checkpoints import files, gguf_layout
from nyscaled.checkpoints.folder import Folder
from nyscaled.checkpoints.gguf_layout import Tensor

ARCHITECTURES = "gemma", "llama"
SUFFIX = ".gguf"

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROTATED = re.compile(r"self_attn\.[qk]_proj\.")
_ROPE = "rope_freqs.weight"

# What is read of an architecture's metadata, which it must have and which it may have.
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
# These must say that nothing special is meant, or repeat what is known; others be off (0, "", …).
_NEUTRAL = {
    "rope.scaling.finetuned": (True, False),  # for the record
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # the second for the default, which is 1
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
}


class Gguf(Folder):
    """An open GGUF file, see `open_gguf`; what it is asked is what a `Folder` is.

    Attributes:
        path: of the file.
        config: what `config.json` would hold.
        metadata: of the file, by its keys; those of the tokenizer among them.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__(path, config, {name: (path, tensor) for name, tensor in tensors.items()})
        self.metadata = metadata

    @property
    def config_path(self) -> Path:
        """The file itself."""
        return self.path

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it.

        Raises:
            ValueError: if there is none of this name.
        """
        _, tensor = self._place(name)
        return tensor.shape

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantized, in transformers' layout.

        Raises:
            ValueError: if there is none of this name, or its quantization is unknown.
        """
        _, tensor = self._place(name)
        value = _dequantized(tensor, self.path)
        kind = self.config["model_type"]
        if kind == "llama" and _ROTATED.search(name):
            # llama.cpp rotates neighbours (2i, 2i + 1), transformers the pairs (i, i + d/2).
            pairs = value.reshape(-1, self.config["head_dim"] // 2, 2, *value.shape[1:])
            return pairs.swapaxes(1, 2).reshape(value.shape)
        if kind == "gemma" and name.endswith("norm.weight"):
            return value - 1  # the file has 1 + w
        return value

    def _rows(self, name: str) -> Callable[[slice], np.ndarray]:
        """Rows of the tensor dequantized, which is whole in memory for that."""
        return self.read(name).__getitem__


def open_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Opens a GGUF file of a LLaMA or a Gemma 1.

    Args:
        path: of the file.

    Returns:
        The file; metadata has been read, tensors not.

    Raises:
        ValueError: on a file that is none of GGUF, is cut short or laid out in another way than
            `gguf_layout` says, is one of several parts, lacks metadata, or has an architecture, a
            setting or a tensor that is not known here.
        ImportError: without the package gguf.

    Examples:
        >>> import gguf, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = gguf.GGUFWriter(f"{folder}/model.gguf", "qwen2")
        ...     writer.write_header_to_file()
        ...     writer.write_kv_data_to_file()
        ...     writer.write_tensors_to_file()
        ...     writer.close()
        ...     open_gguf(f"{folder}/model.gguf")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: .../model.gguf has general.architecture 'qwen2'; expected one of gemma, llama
    """
    path = files.as_folder(path)
    try:
        return _open(path)
    except ValueError as error:  # with names and values from the file
        raise ValueError(files.brief(error)) from error


def _open(path: Path) -> Gguf:
    try:
        metadata, tensors = gguf_layout.read(path)
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} needs gguf: pip install 'nyscaled[models]'") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a sound GGUF file: {error}") from error
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path} has general.architecture {architecture!r}; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(f"{path} is one of {metadata['split.count']} parts; expected them merged")
    rope = tensors.pop(_ROPE, None)
    factors = None if rope is None else _dequantized(rope, path).astype(float)
    try:
        named = _named(tensors)
        config = _config(metadata, named)
        if factors is not None:
            theta, width = config["rope_theta"], config["head_dim"]
            if config["rope_scaling"]:
                raise ValueError(f"it has {_ROPE} and rope.scaling; expected one of them")
            config["rope_scaling"] = _llama3(factors, theta, width)
    except Exception as error:  # of many classes, on values of other types
        raise ValueError(f"{path}: {error}") from error
    return Gguf(path, config, metadata, named)


def token_id(metadata: Mapping[str, Any], role: str, count: int) -> int | None:
    """The id of a special token, None where the metadata of a GGUF file does not say it.

    Raises:
        ValueError: on an id that is none of `count` tokens.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    i = metadata.get(key)
    if i is not None and (type(i) is not int or not 0 <= i < count):
        raise ValueError(f"{key} is {i!r}; expected an integer from 0 to {count - 1}")
    return i


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by transformers' names."""
    named, unknown = {}, []
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        if name in _OUTER:
            named[_OUTER[name]] = tensor
        elif block and block[2] in _INNER:
            named[f"model.layers.{block[1]}.{_INNER[block[2]]}.{block[3]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        first = ", ".join(sorted(unknown)[:8])
        raise ValueError(f"it has tensors that are not known here: {first}")
    return named


def _config(metadata: Mapping[str, Any], named: Mapping[str, Tensor]) -> dict[str, Any]:
    kind = metadata["general.architecture"]
    prefix = f"{kind}."
    found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    missing = [prefix + key for key in _NEEDED if key not in found]
    if missing or "model.embed_tokens.weight" not in named:
        raise ValueError(f"it lacks {', '.join(missing) or 'token_embd.weight'}")
    config = {
        new: _decimal(found.pop(old)) for old, new in (_NEEDED | _OPTIONAL).items() if old in found
    }
    for name in config.keys() - {"rms_norm_eps", "rope_theta"}:
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"it has {config[name]!r} for {name}; expected a positive integer")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    config["rope_scaling"] = _scaling(found, config.get("max_position_embeddings"))
    for setting, layer in (("attention_bias", "q_proj"), ("mlp_bias", "up_proj")):
        config[setting] = any(name.endswith(f".{layer}.bias") for name in named)
    vocabulary, width = named["model.embed_tokens.weight"].shape[0], config["head_dim"]
    neutral = _NEUTRAL | {
        "rope.dimension_count": (width,),
        "attention.value_length": (width,),
        "vocab_size": (vocabulary,),
    }
    for key, value in found.items():
        wanted = neutral.get(key, ())
        # False and 0 have a meaning where there are values that have none.
        if (value not in wanted) if wanted else value:
            hint = f"expected {wanted[0]!r}" if wanted else "which is not known here"
            raise ValueError(f"it has {prefix}{key} {value!r}; {hint}")
    roles = "bos", "eos", "eot", "padding"
    bos, eos, eot, padding = (token_id(metadata, role, vocabulary) for role in roles)
    ends = list(dict.fromkeys(i for i in (eos, eot) if i is not None))
    return {
        **config,
        "model_type": kind,
        "vocab_size": vocabulary,
        "tie_word_embeddings": "lm_head.weight" not in named,
        "bos_token_id": bos,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": padding,
    }


def _scaling(found: dict[str, Any], length: Any) -> dict[str, Any] | None:
    """The scaling of rotations, of which the keys are taken from the metadata, with their defaults."""
    kind = found.pop("rope.scaling.type", "linear")
    older = found.pop("rope.scale_linear", None)
    factor = _decimal(found.pop("rope.scaling.factor", older)) or 1.0
    original = found.pop("rope.scaling.original_context_length", length)
    betas = {
        name: _decimal(found.pop(f"rope.scaling.yarn_{name}"))
        for name in ("beta_fast", "beta_slow")
        if f"rope.scaling.yarn_{name}" in found
    }
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"it has rope.scaling.type {kind!r}; expected none, linear or yarn")
    if kind == "none" or factor == 1:
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {"original_max_position_embeddings": original, **betas}
    return scaling


def _llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The parameters of Llama 3 from which the file's divisors of the frequencies came.

    The divisors tell `factor` and the other three up to a common multiple. As published, slow
    rotations turn once and fast ones four times within the original context.
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
    raise ValueError(f"it has {_ROPE} that is not of Llama 3: {factors}")


def _decimal(value: Any) -> Any:
    """The shortest decimal of a float32, 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _dequantized(tensor: Tensor, path: Path) -> np.ndarray:
    import gguf

    try:
        return np.asarray(gguf.dequantize(tensor.data, tensor.kind), np.float32)
    except NotImplementedError as error:
        raise ValueError(f"{path} has {tensor.name} in {tensor.kind.name}: {error}") from None
