"""Rows of data files, each with the file and the line that it comes from."""

from __future__ import annotations

import codecs
import dataclasses
import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from nyscaled.finetune.json_objects import lines_of, objects_of

HUB = "hf:"
"""Beginning of the name of a data set of the package datasets, as in `hf:aps/super_glue:cb`."""

_SPLITS = {
    "train": ("train", "training"),
    "dev": ("dev", "development", "validation", "valid", "val"),
    "test": ("test",),
}
_ENDINGS = (".json", ".jsonl", ".tsv")


class UnlabelledError(ValueError):
    """A file has a header without the column of the labels."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a data file.

    Attributes:
        fields: values by their names.
        source: file and line, such as "train.tsv:17", for messages.
    """

    fields: Mapping[str, object]
    source: str

    @property
    def names(self) -> str:
        """The names of the fields, for messages."""
        shown = (
            name if value is not None else f"{name} (null)" for name, value in self.fields.items()
        )
        return ", ".join(shown) or "no fields"

    def value(self, *names: str) -> object:
        """Return the value of the first of these fields that the row has.

        Args:
            *names: names that a field has in different releases of a data set.

        Raises:
            ValueError: if the row has none of them.
        """
        for name in names:
            if self.fields.get(name) is not None:
                return self.fields[name]
        expected = " or ".join(names)
        raise ValueError(f"{self.source} has {self.names:.200}; expected a field {expected}")

    def text(self, *names: str) -> str:
        """Return the text of the first of these fields that the row has.

        Args:
            *names: names that a field has in different releases of a data set.

        Raises:
            ValueError: if the row has none of them, or its value is not a text.
        """
        return self.as_text(" or ".join(names), self.value(*names))

    def as_text(self, name: str, value: object) -> str:
        """Return a value if it is a text that can be written as UTF-8; ValueError if not.

        Args:
            name: what errors call the value.
            value: a part of the row.
        """
        if not isinstance(value, str):
            raise ValueError(f"{self.source}: {name} is {value!r:.80}; expected a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.source}: {name} has half of a character, {value[error.start]!r}; expected "
                "both halves of the pair (the text was cut within a character)"
            ) from None
        return value


def find_splits(data: str | os.PathLike[str]) -> dict[str, tuple[Path, ...]]:
    """Return the files of data by split: "train", "dev" and "test".

    In a folder, the name of a file says its split: `train.tsv`, `dev.json` or `validation.jsonl`,
    `test.json`; `train-00000-of-00002.jsonl` is a part of one. Other files are left out. A file
    whose name does not say it is for training.

    Args:
        data: a file, or a folder.

    Raises:
        ValueError: if there is no such file or folder, or the folder has no file of a split, or
            files of one split in two formats.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("train.tsv", "dev.tsv", "notes.txt"):
        ...     _ = (folder / name).write_text("")
        >>> {split: [path.name for path in paths] for split, paths in find_splits(folder).items()}
        {'train': ['train.tsv'], 'dev': ['dev.tsv']}
    """
    path = Path(data)
    if path.is_file():
        return {_split_of(path) or "train": (path,)}
    if not path.is_dir():
        raise ValueError(
            f"data is {str(data)!r}, which does not exist; expected a file, a folder, or "
            f"{HUB}owner/name of a data set of the package datasets"
        )
    paths = [p for p in sorted(path.iterdir()) if p.suffix in _ENDINGS and p.is_file()]
    splits = {name: tuple(p for p in paths if _split_of(p) == name) for name in _SPLITS}
    for name, parts in splits.items():
        if len({part.suffix for part in parts}) > 1:
            both = ", ".join(part.name for part in parts)
            raise ValueError(f"{path} has {both}; expected the {name} split in one format")
    if not any(splits.values()):
        names = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise ValueError(
            f"{path} has {names:.200}; expected train, dev or test files in "
            f"{', '.join(_ENDINGS)}, such as train.jsonl"
        )
    return {name: parts for name, parts in splits.items() if parts}


def _split_of(path: Path) -> str | None:
    first = re.split(r"[-_.]", path.name.lower())[0]
    return next((name for name, words in _SPLITS.items() if first in words), None)


def read_split(
    data: str | os.PathLike[str], split: str, layouts: Sequence[Sequence[str]] = ()
) -> list[Row]:
    """Return the rows of one split of data.

    Args:
        data: a file, a folder, or `hf:owner/name:configuration`, where the package datasets is
            installed.
        split: "train", "dev" or "test".
        layouts: orders of columns that a TSV file without a header may have, the label last.

    Raises:
        UnlabelledError: as `read_rows` does.
        ValueError: if the data has no such split, and as `read_rows` does.
        ImportError: on a data set of the package datasets without this package.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "train.tsv")
        >>> _ = path.write_text("a fine film\\t1\\n")
        >>> read_split(path, "train", [("sentence", "label")])[0].fields
        {'sentence': 'a fine film', 'label': '1'}
    """
    if os.fspath(data).startswith(HUB):
        return _read_hub(os.fspath(data), split)
    splits = find_splits(data)
    if split not in splits:
        raise ValueError(
            f"{data} has {', '.join(splits)}; expected a {split} split (a file {split}.jsonl, "
            ".json or .tsv)"
        )
    return [row for path in splits[split] for row in read_rows(path, layouts)]


def read_rows(path: str | os.PathLike[str], layouts: Sequence[Sequence[str]] = ()) -> list[Row]:
    """Return the rows of a data file.

    The name of a file gives its format: `.json` and `.jsonl` hold a list of objects, or an object
    per line; `.tsv` columns between tabs, without quoting, as GLUE has them. The first line of a
    TSV file is a header if it names the columns of one of the layouts, in any order and case.

    Args:
        path: path of the file.
        layouts: orders of columns that a TSV file may have, the label last. Without a header, the
            one with as many columns as the file is used.

    Raises:
        UnlabelledError: on a TSV file whose header names all columns of a layout but the label.
        ValueError: on a file that cannot be read, is not UTF-8, is cut, has no rows, or has a row
            of another form, or half a header; the message names the line.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "train.json")
        >>> _ = path.write_text('[{"instruction": "2 + 2?"},\\n {"instruction": "3 + 3?"}]')
        >>> [row.source for row in read_rows(path)]
        ['train.json:1', 'train.json:2']
    """
    path = Path(path)
    text = _read_text(path)
    if path.suffix == ".tsv":
        rows = list(_tsv(path.name, text, layouts))
    elif path.suffix in (".json", ".jsonl"):
        rows = [Row(*pair) for pair in objects_of(path.name, text)]
    else:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; expected a file that ends in {', '.join(_ENDINGS)}"
        )
    if not rows:
        raise ValueError(f"{path} has no rows; expected one at least")
    return rows


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(
                f"{path.name} is in UTF-16, as its first two bytes say; expected a file in UTF-8 "
                "(iconv -f UTF-16 -t UTF-8 converts it)"
            ) from None
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path.name}:{line} has the byte 0x{content[error.start]:02x}, which is not UTF-8; "
            "expected a file in UTF-8 (iconv -f LATIN1 -t UTF-8 converts one in Latin-1)"
        ) from None


def _tsv(name: str, text: str, layouts: Sequence[Sequence[str]]) -> Iterator[Row]:
    lines = [(i, line.split("\t")) for i, line in enumerate(lines_of(text), 1) if line.strip()]
    if not lines:
        return
    number, first = lines[0]
    header = _header(f"{name}:{number}", first, layouts) if layouts else first
    columns = header or next((layout for layout in layouts if len(layout) == len(first)), ())
    if not columns:
        raise ValueError(
            f"{name}:{number} has {len(first)} columns, {first!r:.100}; expected {_choice(layouts)}"
        )
    for number, cells in lines[1 if header else 0 :]:
        if len(cells) != len(columns):
            raise ValueError(
                f"{name}:{number} has {len(cells)} columns; expected {len(columns)} between tabs "
                f"({', '.join(columns)}; the line may be cut)"
            )
        yield Row(dict(zip(columns, cells, strict=True)), f"{name}:{number}")


def _header(source: str, first: Sequence[str], layouts: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the names of columns with those of the layouts in lower case; none for an example."""
    fields = {field for layout in layouts for field in layout}
    columns = [x.strip().lower() if x.strip().lower() in fields else x for x in first]
    named = [column for column in columns if column in fields]
    if not named:
        return ()
    twice = len(set(named)) < len(named)
    if not twice and any(set(layout) <= set(named) for layout in layouts):
        return columns
    if not twice and any(set(layout[:-1]) <= set(named) for layout in layouts):
        raise UnlabelledError(
            f"{source} has the columns {', '.join(first):.100} and no labels; expected a column "
            f"{layouts[0][-1]} (a test file that is published without labels gives no scores)"
        )
    raise ValueError(
        f"{source} is {first!r:.100}, part of a header; expected {_choice(layouts)} (if it is an "
        "example, write a header above it)"
    )


def _choice(layouts: Sequence[Sequence[str]]) -> str:
    return " or ".join(f"the columns {', '.join(layout)}" for layout in layouts)


def _read_hub(data: str, split: str) -> list[Row]:
    name, _, configuration = data.removeprefix(HUB).partition(":")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ImportError(f"{data} needs the package datasets: pip install datasets") from error
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # of many classes: of the hub, of the network, of the data
        raise ValueError(f"{data} cannot be loaded: {error!s:.300}") from error
    key = next((key for key in _SPLITS[split] if key in loaded), None)
    if key is None:
        raise ValueError(f"{data} has {', '.join(loaded)}; expected a {split} split")
    rows = cast("Iterable[Mapping[str, object]]", loaded[key])
    return [Row(row, f"{name}[{key}]:{i}") for i, row in enumerate(rows, 1)]
