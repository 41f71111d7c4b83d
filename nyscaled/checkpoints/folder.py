"""Hugging Face model folders: `config.json` and tensors in safetensors files.

Tensors are read one by one from files that are mapped into memory, so that a model never needs
twice its size. Pickled weights (`pytorch_model.bin`) can run code and are not read.
"""

from __future__ import annotations

import functools
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nyscaled.checkpoints import files, swap
from nyscaled.checkpoints.source import CONFIG, blocks_of

STEM = "model"  # of the names of files of weights
SHARD_SIZE = 2**30  # bytes


class Folder:
    """An open model folder, a `WeightSource`; see `open_folder`.

    Attributes:
        path: path of the folder.
        config: what `config.json` holds.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], places: Mapping[str, tuple[Path, Any]]
    ) -> None:
        self.path = path
        self.config = config
        self._places = places

    @property
    def config_path(self) -> Path:
        """The file that `config` comes from."""
        return self.path / CONFIG

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it.

        Args:
            name: name of the tensor.

        Raises:
            ValueError: if no tensor has this name.
        """
        _, file = self._place(name)
        return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype of the file (for example `ml_dtypes.bfloat16`).

        Args:
            name: name of the tensor.

        Raises:
            ValueError: if no tensor has this name, or NumPy lacks its dtype.
        """
        path, file = self._place(name)
        return files.read_tensor(file, path, name)

    def blocks(self, name: str, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a tensor in blocks of rows, each with the number of its first row.

        A block is read from the mapped file when it is asked for, so that a large tensor is never
        whole in memory.

        Args:
            name: name of the tensor.
            size: most bytes in a block, which has at least one row.

        Raises:
            ValueError: as `read` does.
        """
        path, file = self._place(name)
        rows = functools.partial(files.read_tensor, file, path, name)
        return blocks_of(self.shape(name), lambda: self.read(name), rows, size)

    def _place(self, name: str) -> tuple[Path, Any]:
        if name not in self._places:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self._places[name]


def open_folder(path: str | os.PathLike[str], stem: str = STEM) -> Folder:
    """Open a model folder, whose tensors are in one file or in shards with an index.

    Args:
        path: path of the folder.
        stem: name of the file of weights without its ending, with the variant if it is one:
            `diffusion_pytorch_model`, `model.fp16`.

    Returns:
        The folder, with the files of one save if it was written here. Headers have been read,
        tensors have not. While it is open, another program may replace its files, but not write
        into them.

    Raises:
        ValueError: on a missing or unreadable `config.json`, on missing, pickled or broken
            weights, and on an index that names files outside the folder or disagrees with them.

    Examples:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     write(path, {"model_type": "mine"}, [("head.weight", np.ones((2, 3), "f"))])
        ...     folder = open_folder(path)
        >>> folder.config["model_type"], folder.names, folder.shape("head.weight")
        ('mine', ('head.weight',), (2, 3))
    """
    path = files.as_folder(path)
    return swap.consistent(path, functools.partial(_open, path, stem))


def _index(stem: str) -> str:
    """The name of the index of shards, of which a variant is the last part."""
    name, _, variant = stem.partition(".")
    return f"{name}.safetensors.index.{variant}{'.' if variant else ''}json"


def _open(path: Path, stem: str) -> Folder:
    tensors, index = f"{stem}.safetensors", _index(stem)
    config = files.read_object(path / CONFIG, f"a model folder with {CONFIG} and {tensors}")
    if files.exists(path / tensors):
        file = files.open_tensors(path / tensors)
        places = dict.fromkeys(file.keys(), (path / tensors, file))
    elif files.exists(path / index):
        places = dict(_sharded(path / index))
    else:
        pickled = sorted(p.name for p in path.glob("*.bin"))
        why = f" (it has {pickled[0]}: a pickle can run code, and is not read)" if pickled else ""
        others = sorted(p.name for p in path.glob(f"{stem.partition('.')[0]}*.safetensors"))
        why = f" (it has {files.brief(', '.join(others))})" if others else why
        raise ValueError(f"{path} has no {tensors} and no {index}{why}")
    return Folder(path, config, places)


def write(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_size: int = SHARD_SIZE,
    texts: Mapping[str, str | None] | None = None,
    stem: str = STEM,
) -> None:
    """Write a model folder that transformers loads; each of its files is whole or absent.

    Tensors go into `model.safetensors`, or into several files with an index. They are asked for
    one by one, and memory holds those of one file at a time.

    Everything is written aside, and replaces the old files at the end. After a process was killed,
    the next program that opens the folder with this package finds the old files or the new ones
    (`nyscaled.checkpoints.swap`).

    Args:
        path: path of the folder, made if missing. Earlier weights are replaced, other files are
            kept.
        config: content of `config.json`.
        tensors: names and values.
        max_shard_size: most bytes of tensors in one file; a larger tensor has a file to itself.
        texts: contents of other files by name, replaced at the same time; None removes a file.
        stem: name of the file of weights without its ending.

    Raises:
        ValueError: on a size that is not positive, or a directory in the place of a file.
        OSError: if a file cannot be written, and nothing has changed; or if the swap fails, and
            the message says how it is ended.
    """
    if not isinstance(max_shard_size, numbers.Real) or not max_shard_size > 0:
        raise ValueError(
            f"max_shard_size is {max_shard_size!r}; expected a positive number of bytes"
        )
    texts = {**(texts or {}), CONFIG: files.as_json(config)}
    whole, digits = f"{stem}.safetensors", "[0-9]" * 5
    # What an earlier save may have written, for any number of shards.
    stale = whole, _index(stem), f"{stem}-{digits}-of-{digits}.safetensors"
    with swap.replacing(path, texts, last=CONFIG, stale=stale) as aside:
        held: dict[str, np.ndarray] = {}
        shards: list[list[str]] = []
        total = size = 0

        def close() -> None:
            files.write_tensors(aside / str(len(shards)), held, {"format": "pt"})
            shards.append(list(held))
            held.clear()

        for name, value in tensors:
            if held and size + value.nbytes > max_shard_size:
                close()
                size = 0
            held[name] = value
            size += value.nbytes
            total += value.nbytes
        close()
        count = len(shards)
        named = {
            f"{stem}-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else whole: names
            for i, names in enumerate(shards)
        }
        for i, file in enumerate(named):
            os.rename(aside / str(i), aside / file)
        if count > 1:
            weight_map = {name: file for file, names in named.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / _index(stem)).write_text(files.as_json(index))


def _sharded(index: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
    """Yield each tensor of the shards that the index names, with its shard.

    The shards of early files hold constants that the index does not name.
    """
    path = index.parent
    weight_map = files.read_object(index, "an index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from names to files")
    shards: dict[str, Any] = {}
    places: dict[str, str] = {}
    named: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        named.setdefault(shard, []).append(name)
    for shard in sorted(named):
        outside = Path(shard).name != shard or shard == ".."
        if outside or not files.exists(path / shard):
            raise ValueError(
                f"{index} names {files.brief(repr(shard))}; expected a file in the folder itself"
            )
        shards[shard] = files.open_tensors(path / shard)
        held = set(shards[shard].keys())
        lost = sorted(set(named[shard]) - held)
        if lost:
            names = files.brief(", ".join(lost[:4]))
            raise ValueError(f"{index} names {names} in {shard}, which does not have them")
        for name in held - places.keys():
            places[name] = shard
        twice = sorted(n for n in held - weight_map.keys() if places[n] != shard)
        if twice:
            raise ValueError(
                f"{path / shard} has {files.brief(', '.join(twice[:4]))}, as "
                f"{places[twice[0]]} has; "
                f"expected {index.name} to name the one to read"
            )
    for name, shard in (weight_map | (places | weight_map)).items():  # in the order of the index
        yield name, (path / shard, shards[shard])
