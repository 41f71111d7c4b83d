"""Which images a step reads, and which squares of them, as functions of the seed and the step."""

from __future__ import annotations

import dataclasses

import numpy as np

from nyscaled.finetune.dreambooth.images import Corner, Picture

PERMUTATIONS, CORNERS = 0, 1


@dataclasses.dataclass(frozen=True)
class Collection:
    """Images of one text.

    Attributes:
        pictures: the images.
        rows: number of images in a step.
        random: whether squares are drawn; else they are those in the middle.
        seed: seeds of what is drawn.
    """

    pictures: tuple[Picture, ...]
    rows: int
    random: bool
    seed: tuple[int, ...]

    def of_step(self, step: int) -> list[tuple[Picture, Corner]]:
        """Return the images of a step, and the corners of the squares of them.

        All images come once before one comes again.

        Args:
            step: number of steps that were made before.

        Examples:
            >>> from pathlib import Path
            >>> names = (Path(name) for name in "abc")
            >>> pictures = tuple(Picture(n, (5, 4), np.zeros((4, 5, 3), np.uint8)) for n in names)
            >>> collection = Collection(pictures, 1, True, (0,))
            >>> sorted(collection.of_step(step)[0][0].path.name for step in range(3))
            ['a', 'b', 'c']
        """
        generator = np.random.default_rng([*self.seed, CORNERS, step])
        chosen: list[tuple[Picture, Corner]] = []
        for place in range(step * self.rows, (step + 1) * self.rows):
            epoch, index = divmod(place, len(self.pictures))
            order = np.random.default_rng([*self.seed, PERMUTATIONS, epoch])
            picture = self.pictures[order.permutation(len(self.pictures))[index]]
            rows, columns = picture.room
            corner = int(generator.integers(rows + 1)), int(generator.integers(columns + 1))
            chosen.append((picture, corner if self.random else picture.center))
        return chosen
