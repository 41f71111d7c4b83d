"""A folder from which a killed run of passes over a stream continues.

It holds a file for every pass that has ended, with the thin arrays that it gave, and one for the
pass that has begun. A run that continues makes the same products again, in the same order. Those
that have ended are read from the folder, and the one that has begun goes on at its next block. So
the arrays are the same to the last bit as without an interruption, and whoever asked for the
products does not notice. Each file is replaced at one moment. They are `.npz` without pickles:
nothing in them is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from nyscaled._files import replacing

_PARTIAL = "begun.npz"

Description = dict[str, str]


@dataclasses.dataclass
class Pass:
    """A product as far as it was made.

    Args:
        row: the row at which the next block begins.
        image: A x, of which the rows before `row` are known; None if it is not asked for.
        sums: the sum over blocks of wᴴ A (k, n), in double precision; None if not asked for.
    """

    row: int
    image: np.ndarray | None
    sums: np.ndarray | None


def describe(product: str, argument: np.ndarray) -> Description:
    """Return what tells one product from another, as texts.

    Args:
        product: its name.
        argument: the thin matrix that A is multiplied by.
    """
    digest = hashlib.sha256(np.ascontiguousarray(argument).tobytes()).hexdigest()[:16]
    rows, columns = argument.shape
    return {
        "product": product,
        "argument": f"({rows}, {columns}) {argument.dtype}",
        "digest of its entries": digest,
    }


def describe_file(path: str) -> Description:
    """Return what tells one state of a file, or of the files in a folder, from another, as texts.

    Args:
        path: its path, which may change.
    """
    if not os.path.isdir(path):
        status = os.stat(path)
        return {
            "size of its file": f"{status.st_size} bytes",
            "last change of its file": f"{status.st_mtime_ns} ns after 1970",
        }
    states = [os.stat(os.path.join(at, name)) for at, _, names in os.walk(path) for name in names]
    latest = max((status.st_mtime_ns for status in states), default=0)
    return {
        "size of its folder": f"{sum(status.st_size for status in states)} bytes",
        "number of its files": str(len(states)),
        "last change of its files": f"{latest} ns after 1970",
    }


class Journal:
    """The folder of a run.

    Args:
        folder: its path; made if it is missing.
        source: what tells one source from another, as texts.
    """

    def __init__(self, folder: str | os.PathLike[str], source: Description) -> None:
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ValueError(f"resume is {folder!r}; expected the path of a folder")
        self.folder = Path(folder)
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(
                    f"{self.folder} is a file; expected a folder for a run to resume from"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be made: {error}; expected a folder") from error
        self._source = source

    def load(
        self, number: int, product: Description, empty: Pass, rows: int
    ) -> tuple[Pass, dict[int, int]] | None:
        """Return a pass and the checksums of blocks, as far as the folder has them.

        Args:
            number: how many passes came before.
            product: from `describe`.
            empty: the pass before its first block.
            rows: how many rows the matrix has.

        Raises:
            ValueError: on a broken file, and on one of another run; it shows the difference.
        """
        for path in (self._ended(number), self.folder / _PARTIAL):
            if not path.exists():
                continue
            expected = {**self._source, **product, "pass": str(number)}
            try:
                arrays, found = _read(path)
                if path.name == _PARTIAL and found.get("pass") != str(number):
                    return None  # of a pass that ended: another file has it
                same = found == expected
                state = _state(arrays, empty, rows) if same else empty
                checksums = dict(arrays["checksums"].tolist())
            except Exception as error:  # of many classes, on files of other kinds
                raise ValueError(
                    f"{path} is not a sound file of a run: {error}; delete {self.folder}"
                ) from error
            if not same:
                self._refuse(found, expected)
            return state, checksums
        return None

    def save(
        self,
        number: int,
        product: Description,
        state: Pass,
        checksums: dict[int, int],
        *,
        ended: bool = False,
    ) -> None:
        """Write a pass as far as it was made.

        Args:
            number: how many passes came before.
            product: from `describe`.
            state: the pass.
            checksums: of the blocks that were read, by their first rows.
            ended: whether nothing is missing.
        """
        thin = {"image": state.image, "sums": state.sums}
        description = {**self._source, **product, "pass": str(number)}
        with replacing(self._ended(number) if ended else self.folder / _PARTIAL) as file:
            np.savez(
                file,
                description=np.array(json.dumps(description)),
                row=np.array(state.row),
                checksums=np.array(list(checksums.items()), np.uint64),
                allow_pickle=False,
                **{name: array for name, array in thin.items() if array is not None},
            )

    def _ended(self, number: int) -> Path:
        return self.folder / f"pass-{number:03d}.npz"

    def _refuse(self, found: Description, expected: Description) -> NoReturn:
        differences = [
            f"{name} is {found.get(name)} there and {expected.get(name)} here"
            for name in {**expected, **found}
            if found.get(name) != expected.get(name)
        ]
        raise ValueError(
            f"{self.folder} belongs to another run: {'; '.join(differences)}; expected the "
            "same matrix, key, rank and settings (name another folder, or delete this one)"
        )


def _read(path: Path) -> tuple[Mapping[str, np.ndarray], Description]:
    """The arrays of a file, and the texts among them."""
    if not path.is_file():
        raise ValueError("it is not a file")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    texts: object = json.loads(str(arrays["description"]))
    if not isinstance(texts, dict):
        raise ValueError(f"its description is a {type(texts).__name__}")
    return arrays, {str(name): str(text) for name, text in texts.items()}


def _state(arrays: Mapping[str, np.ndarray], empty: Pass, rows: int) -> Pass:
    """The pass in a file, of which the arrays are those that it needs."""
    state = Pass(int(arrays["row"]), arrays.get("image"), arrays.get("sums"))
    if not 0 <= state.row <= rows:
        raise ValueError(f"its row is {state.row}; expected at most {rows}")
    for name in ("image", "sums"):
        array, like = getattr(state, name), getattr(empty, name)
        got, expected = (None if x is None else (x.shape, x.dtype) for x in (array, like))
        if got != expected:
            raise ValueError(f"its {name} is {got}; expected {expected}")
    return state
