"""GGUF files, llama.cpp's format: metadata and tensors, often quantized, in one file.

The file is read as the model folder that it was converted from: `config.json` is rebuilt from the
metadata, names are transformers', tensors are dequantized to float32 one by one from the mapped
file, and what the converter did to them is undone. A `GgufMap` says for each family what that is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nyscaled.checkpoints import files, gguf_config, gguf_layout
from nyscaled.checkpoints.gguf_layout import Tensor
from nyscaled.checkpoints.source import blocks_of

SUFFIX = ".gguf"

_EMBEDDING = "token_embd"
_BLOCK = re.compile(r"blk\.(\d+)\.")
_ROTATED = re.compile(r"self_attn\.[qk]_proj\.")


class GgufMap(NamedTuple):
    """How llama.cpp's converter writes the models of a family.

    Attributes:
        layers: transformers' names of layers by llama.cpp's, with `{}` for the number of a block:
            `{"blk.{}.attn_q": "model.layers.{}.self_attn.q_proj"}`.
        interleaved: whether the rows of queries and keys are in the order that llama.cpp rotates.
        norm_offset: what the file adds to the weights of norms.
    """

    layers: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0

    def name(self, name: str) -> str | None:
        """Return transformers' name of a tensor, None if it is not known.

        Args:
            name: llama.cpp's name.
        """
        layer, _, ending = name.rpartition(".")
        block = _BLOCK.match(layer)
        known = self.layers.get(_BLOCK.sub("blk.{}.", layer, count=1))
        if known is None or ending not in ("weight", "bias"):
            return None
        return f"{known.format(block[1]) if block else known}.{ending}"

    def undone(self, name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
        """Return a tensor as transformers has it.

        Args:
            name: transformers' name.
            value: the tensor of the file.
            head_dim: width of a head.
        """
        if self.interleaved and _ROTATED.search(name):
            # llama.cpp rotates neighbours (2i, 2i + 1), transformers the pairs (i, i + d/2).
            pairs = value.reshape(-1, head_dim // 2, 2, *value.shape[1:])
            return pairs.swapaxes(1, 2).reshape(value.shape)
        if self.norm_offset and name.endswith("norm.weight"):
            return value - self.norm_offset
        return value


class Gguf:
    """An open GGUF file, a `WeightSource`; see `open_gguf`.

    Attributes:
        path: path of the file.
        config: what `config.json` would hold.
        metadata: metadata of the file, those of the tokenizer among them.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        layout: GgufMap,
    ) -> None:
        self.path = path
        self.config = config
        self.metadata = metadata
        self._tensors = tensors
        self._map = layout

    @property
    def config_path(self) -> Path:
        """The file itself."""
        return self.path

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it.

        Args:
            name: name of the tensor.

        Raises:
            ValueError: if no tensor has this name.
        """
        return self._tensor(name).shape

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in float32, dequantized, in transformers' layout.

        Args:
            name: name of the tensor.

        Raises:
            ValueError: if no tensor has this name, or its quantization is unknown.
        """
        value = _dequantized(self._tensor(name), self.path)
        return self._map.undone(name, value, self.config["head_dim"])

    def blocks(self, name: str, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a tensor in blocks of rows, each with the number of its first row.

        The tensor is dequantized as a whole.

        Args:
            name: name of the tensor.
            size: most bytes in a block, which has at least one row.

        Raises:
            ValueError: as `read` does.
        """
        value = self.read(name)
        return blocks_of(value.shape, lambda: value, value.__getitem__, size)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self._tensors[name]


def open_gguf(path: str | os.PathLike[str], maps: Mapping[str, GgufMap]) -> Gguf:
    """Open a GGUF file.

    Args:
        path: path of the file.
        maps: how the files of each architecture are read.

    Returns:
        The file. Its metadata has been read, its tensors have not.

    Raises:
        ValueError: on a file that is not GGUF, is cut short or laid out in another way than
            `gguf_layout` says, is one of several parts, lacks metadata, or has an architecture, a
            setting or a tensor that is not known here.
        ImportError: without the package gguf.

    Examples:
        >>> import gguf, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = gguf.GGUFWriter(f"{folder}/model.gguf", "mamba")
        ...     writer.write_header_to_file()
        ...     writer.write_kv_data_to_file()
        ...     writer.write_tensors_to_file()
        ...     writer.close()
        ...     open_gguf(f"{folder}/model.gguf", {"llama": GgufMap({})})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: .../model.gguf has general.architecture 'mamba'; expected one of llama
    """
    path = files.as_folder(path)
    try:
        return _open(path, maps)
    except ValueError as error:  # with names and values from the file
        raise ValueError(files.brief(error)) from error


def _open(path: Path, maps: Mapping[str, GgufMap]) -> Gguf:
    try:
        metadata, tensors = gguf_layout.read(path)
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} needs gguf: pip install 'nyscaled[models]'") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a sound GGUF file: {error}") from error
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in maps:
        raise ValueError(
            f"{path} has general.architecture {architecture!r}; expected one of "
            f"{', '.join(sorted(maps))}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(f"{path} is one of {metadata['split.count']} parts; expected them merged")
    rope = tensors.pop(gguf_config.ROPE, None)
    factors = None if rope is None else _dequantized(rope, path).astype(float)
    layout = maps[architecture]
    embedding = tensors.get(f"{_EMBEDDING}.weight")
    try:
        named = _named(tensors, layout)
        if embedding is None:
            raise ValueError(f"it lacks {_EMBEDDING}.weight")
        config = gguf_config.read_config(metadata, named, embedding.shape[0], factors)
    except Exception as error:  # of many classes, on values of other types
        raise ValueError(f"{path}: {error}") from error
    return Gguf(path, config, metadata, named, layout)


def _named(tensors: Mapping[str, Tensor], layout: GgufMap) -> dict[str, Tensor]:
    """Return the tensors by transformers' names."""
    names = {name: layout.name(name) for name in tensors}
    if unknown := sorted(name for name, known in names.items() if known is None):
        raise ValueError(f"it has tensors that are not known here: {', '.join(unknown[:8])}")
    return {names[name] or name: tensor for name, tensor in tensors.items()}


def _dequantized(tensor: Tensor, path: Path) -> np.ndarray:
    import gguf

    try:
        return np.asarray(gguf.dequantize(tensor.data, tensor.kind), np.float32)
    except NotImplementedError as error:
        raise ValueError(f"{path} has {tensor.name} in {tensor.kind.name}: {error}") from None
