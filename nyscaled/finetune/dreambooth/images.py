"""Images of a folder: upright, in RGB, and as large as a step reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from nyscaled._files import replacing
from nyscaled.checkpoints.files import JsonObject, brief, read_object
from nyscaled.finetune import folders

SHOWN = 4
NARROW = 16
"""Largest ratio of the sides of an image."""

Corner = tuple[int, int]
"""The row and the column at which a square of an image begins."""


class Picture(NamedTuple):
    """An image whose shorter side is that of the squares which steps read.

    Attributes:
        path: its file.
        size: its width and its height in the file.
        pixels: its pixels.
    """

    path: Path
    size: tuple[int, int]
    pixels: UInt8[np.ndarray, "height width 3"]

    @property
    def room(self) -> tuple[int, int]:
        """By how many rows and columns a square can be moved; one of them is 0."""
        height, width, _ = self.pixels.shape
        return height - min(height, width), width - min(height, width)

    @property
    def center(self) -> Corner:
        """The corner of the square in the middle."""
        rows, columns = self.room
        return rows // 2, columns // 2

    def square(self, corner: Corner) -> UInt8[np.ndarray, "side side 3"]:
        """Return the square at a corner."""
        (row, column), side = corner, min(self.pixels.shape[:2])
        return self.pixels[row : row + side, column : column + side]


def files_of(name: str, folder: Path) -> list[Path]:
    """Return the files in a folder of images, by their names; hidden files are left out.

    Args:
        name: what errors call the folder.
        folder: the folder.

    Raises:
        ValueError: if there is no such folder.
    """
    if not folder.is_dir():
        what = "which is a file" if folder.exists() else "which does not exist"
        raise ValueError(f"{name} is '{folder}', {what}; expected a folder of images")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read(path: Path, side: int) -> Picture:
    """Return an image; only the first one of an animation.

    Args:
        path: its file.
        side: length of its shorter side, to which it is reduced or enlarged.

    Raises:
        ValueError: on a file that is not an image, is broken or has more than 8 bits per color, and
            on an image too large for Pillow or too narrow.
    """
    try:
        with Image.open(path) as file:
            size, mode = file.size, file.mode
            image = ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # of many classes: each format has its own
        raise ValueError(
            f"{path} cannot be read: {brief(error)}; expected an image (and nothing else in the "
            "folder)"
        ) from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"{path} has the mode {mode} of Pillow; expected 8 bits per color")
    short, long = sorted(size)
    if long > NARROW * short:
        raise ValueError(
            f"{path} has {size[0]} × {size[1]} pixels; expected sides in a ratio up to {NARROW}"
        )
    width, height = (side * length // short for length in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return Picture(path, size, np.asarray(resized))


def write_row(path: Path, images: Sequence[Float[np.ndarray, "height width 3"]]) -> None:
    """Write images beside each other into a PNG file.

    Args:
        path: the file.
        images: images of one height, with values from 0 to 1.
    """
    row = np.concatenate([np.asarray(image, np.float32) for image in images], axis=1)
    pixels = np.round(255 * row).astype(np.uint8)
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def digest(path: Path) -> str:
    """Return what distinguishes a file from others.

    Args:
        path: the file.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_record(out: Path) -> JsonObject:
    """Return what `run.json` of a run holds; its "images" are hashes of files, by folder and name.

    Args:
        out: folder of the run.

    Raises:
        ValueError: if it does not have them.
    """
    path = out / folders.RECORD
    record = read_object(path, "the record of a run, or another --out")
    digests = record.get("images")
    for name in ("images", "class_images"):
        if not isinstance(digests, dict) or not isinstance(digests.get(name), dict):
            raise ValueError(
                f"{path} has no hashes of the files in {name}; expected the file as the run wrote "
                "it, or another --out"
            )
    return record


def require_distinct(pictures: Sequence[Picture], class_pictures: Sequence[Picture]) -> None:
    """Refuse an image of the subject among those of its class, which are to look otherwise.

    Args:
        pictures: images of the subject.
        class_pictures: images of the class.

    Raises:
        ValueError: if two files are the same; the message names them.
    """
    subjects = {digest(picture.path): picture.path for picture in pictures}
    for picture in class_pictures:
        if (same := subjects.get(digest(picture.path))) is not None:
            raise ValueError(
                f"class_images has '{picture.path}', which is '{same}' in images; expected images "
                "of others of the class"
            )


def require_same(
    what: str, out: Path, before: Mapping[str, str], now: Mapping[str, str], expected: str
) -> None:
    """Refuse images that are not those that a run began with.

    Args:
        what: what the images are, for the message.
        out: folder of the run.
        before: hashes of the files that it began with, by name.
        now: those of the files that there are.
        expected: what the user is to do.

    Raises:
        ValueError: if they differ; the message names the files.
    """
    differences = [
        f"{name} is {'missing' if name not in now else 'changed' if name in before else 'new'}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN} others" if len(differences) > SHOWN else ""
        raise ValueError(
            f"{what} are not those that the run in {out} began with: "
            f"{', '.join(differences[:SHOWN])}{more}; expected {expected}, or another --out"
        )
