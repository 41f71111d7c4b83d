"""Methods, controls and endpoints of `experiments/table3.py`."""

from __future__ import annotations

import dataclasses

from experiments.lib.comparison import Endpoint
from experiments.lib.tuning import HALF, STEP, Point

RATES = (3.2e-4, 1e-3, 3.2e-3, 1e-2)
PAPER_RATE = 1e-4
"""Learning rate of all methods in the paper."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        method: name of the method in the library.
        start: "own"; "gaussian", random with the norm of the method's start in each layer;
            "rotated", the method's start times a random orthogonal matrix.
        options: options of the start.
        number: name of the second number that is tuned, None for none.
        numbers: its values, the default first.
    """

    method: str
    start: str = "own"
    options: tuple[tuple[str, str], ...] = ()
    number: str | None = None
    numbers: tuple[float, ...] = ()

    @property
    def first(self) -> float | None:
        """The default of the second number."""
        return self.numbers[0] if self.numbers else None

    def grid(self) -> list[Point]:
        """Return the points that are tried first."""
        return [Point(rate, self.first) for rate in RATES]

    def others(self, best: Point) -> list[Point]:
        """Return as many points again, around the best one.

        Args:
            best: the point with the lowest loss so far.
        """
        at_end = {RATES[0]: 1 / STEP, RATES[-1]: STEP}.get(best.rate)
        between = [1 / HALF, HALF] if at_end is None else [at_end, HALF if at_end < 1 else 1 / HALF]
        near = [1 / HALF**0.5, HALF**0.5]
        numbers = [Point(best.rate, number) for number in self.numbers[1:]]
        factors = (between + near)[: len(RATES) - len(numbers)]
        return [*(Point(float(f"{best.rate * f:.3g}"), self.first) for f in factors), *numbers]


SCALES = (0.1, 0.05, 0.2)
BASE = "LoRA"
METHODS = {
    BASE: Row("lora"),
    "LoRA, Gaussian": Row("lora", options=(("distribution", "gaussian"),)),
    "LoRA-P": Row("lora-p", number="damping", numbers=(1e-2, 1e-4, 1.0)),
    "NoRA": Row("nora", number="scale", numbers=SCALES),
    "NoRA+": Row("nora+", number="scale", numbers=SCALES),
    "PiSSA": Row("pissa"),
    "OLoRA": Row("olora"),
}
"""Rows with the paper's methods and two more starts; "LoRA" has PEFT's default start, "LoRA,
Gaussian" that of the published script."""
SIZED, ROTATED = "LoRA of NoRA's size", "NoRA, rotated"
CONTROLS = {
    SIZED: Row("nora", "gaussian", number="scale", numbers=SCALES),
    ROTATED: Row("nora", "rotated", number="scale", numbers=SCALES),
}
ROWS = METHODS | CONTROLS
AT_PAPER_RATE = {f"{name}, paper's rate": name for name in METHODS}
PAIRS = (
    *(("NoRA", SIZED), ("NoRA", ROTATED), ("NoRA", "LoRA, Gaussian")),
    *(("NoRA+", "NoRA"), ("NoRA+", "LoRA-P")),
)
"""Further pairs that are compared."""
ENDPOINTS = (
    Endpoint("instance", "images to train on", 0.02),
    Endpoint("held_out", "other images of the subject", 0.02),
    Endpoint("others", "images of other subjects", 0.02),
    Endpoint("training", "draws of the last 100 steps", 0.02),
)
