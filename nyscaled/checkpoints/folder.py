"""Model folders of the Hugging Face kind: `config.json` and tensors in safetensors files.

Tensors are read one by one from files that are mapped into memory, so that a model never needs
twice its size. Pickled weights (`pytorch_model.bin`) can run code and are not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nyscaled.checkpoints import files

CONFIG = "config.json"
TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Folder:
    """An open model folder, see `open_folder`.

    Attributes:
        path: where it is.
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
        """The file that `config` is from."""
        return self.path / CONFIG

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it.

        Raises:
            ValueError: if there is none of this name.
        """
        _, file = self._place(name)
        return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the dtype of the file (`ml_dtypes.bfloat16`, say).

        Raises:
            ValueError: if there is none of this name, or its dtype is none of NumPy's.
        """
        path, file = self._place(name)
        return files.read_tensor(file, path, name)

    def _place(self, name: str) -> tuple[Path, Any]:
        if name not in self._places:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self._places[name]


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Opens a model folder, whose tensors are in one file or in shards with an index.

    Args:
        path: of the folder.

    Returns:
        The folder; headers have been read, tensors not.

    Raises:
        ValueError: on a missing or unreadable `config.json`, on missing, pickled or broken
            weights, and on an index that names files outside the folder or disagrees with them.

    Example:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     write(path, {"model_type": "mine"}, {"head.weight": np.ones((2, 3), "f")})
        ...     folder = open_folder(path)
        >>> folder.config["model_type"], folder.names, folder.shape("head.weight")
        ('mine', ('head.weight',), (2, 3))
    """
    path = Path(path)
    config = files.read_object(path / CONFIG, f"a model folder with {CONFIG} and {TENSORS}")
    if (path / TENSORS).is_file():
        file = files.open_tensors(path / TENSORS)
        places = dict.fromkeys(file.keys(), (path / TENSORS, file))
    elif (path / INDEX).is_file():
        places = dict(_sharded(path))
    else:
        pickled = sorted(p.name for p in path.glob("*.bin"))
        why = f" (it has {pickled[0]}: a pickle can run code, and is not read)" if pickled else ""
        raise ValueError(f"{path} has no {TENSORS} and no {INDEX}{why}")
    return Folder(path, config, places)


def write(
    path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes a model folder that transformers loads; each of its files is whole or not there.

    Args:
        path: of the folder, made if missing; other files in it are left alone.
        config: for `config.json`.
        tensors: by name, for one `model.safetensors`.
    """
    files.write_pair(path, (TENSORS, tensors), (CONFIG, config), {"format": "pt"})


def _sharded(path: Path) -> Iterator[tuple[str, tuple[Path, Any]]]:
    """Each tensor of the index, with its shard."""
    weight_map = files.read_object(path / INDEX, "an index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path / INDEX} has no weight_map from names to files")
    shards: dict[str, Any] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (path / shard).is_file():
            raise ValueError(f"{path / INDEX} names {shard!r}; wanted a file in the folder itself")
        shards[shard] = files.open_tensors(path / shard)
        held = set(shards[shard].keys())
        named = {name for name, file in weight_map.items() if file == shard}
        if held != named:
            raise ValueError(
                f"{path / shard} and {INDEX} disagree: only one of them has "
                f"{', '.join(sorted(held ^ named)[:4])}"
            )
    for name, shard in weight_map.items():
        yield name, (path / shard, shards[shard])
