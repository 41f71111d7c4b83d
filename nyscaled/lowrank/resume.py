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
import zipfile
from pathlib import Path
from typing import cast

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


class Journal:
    """The folder of a run.

    Args:
        folder: its path; made if it is missing.
        source: what tells one source from another, as texts.
    """

    def __init__(self, folder: str | os.PathLike[str], source: Description) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; expected a folder for a run to resume from")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._source = source

    def load(self, number: int, product: Description) -> tuple[Pass, dict[int, int]] | None:
        """Return a pass and the checksums of blocks, as far as the folder has them.

        Args:
            number: how many passes came before.
            product: from `describe`.

        Raises:
            ValueError: on a broken file, and on one of another run; it shows the difference.
        """
        for path in (self._ended(number), self.folder / _PARTIAL):
            if not path.exists():
                continue
            expected = {**self._source, **product, "pass": str(number)}
            try:
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
                found = cast(Description, json.loads(str(arrays["description"])))
                row, checksums = int(arrays["row"]), dict(arrays["checksums"].tolist())
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{path} is not a sound file of a run: {error}; delete {self.folder}"
                ) from error
            if path.name == _PARTIAL and found.get("pass") != str(number):
                return None  # of a pass that ended: another file has it
            self._require_same(found, expected)
            return Pass(row, arrays.get("image"), arrays.get("sums")), checksums
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

    def _require_same(self, found: Description, expected: Description) -> None:
        differences = [
            f"{name} is {found.get(name)} there and {expected.get(name)} here"
            for name in {**expected, **found}
            if found.get(name) != expected.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.folder} belongs to another run: {'; '.join(differences)}; expected the "
                "same matrix, key, rank and settings (name another folder, or delete this one)"
            )
