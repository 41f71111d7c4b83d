"""Methods, controls and endpoints of `experiments/tier_*.py`."""

from __future__ import annotations

from experiments.lib.adapter_runs import Variant
from experiments.lib.comparison import Endpoint
from experiments.lib.tuning import Grid

Methods = dict[str, tuple[Variant, Grid]]
BASE = "LoRA"
METHODS: Methods = {
    BASE: (Variant("lora", number="size"), Grid(numbers=(1.0, 0.5, 2.0))),
    "NoRA": (Variant("nora", number="scale"), Grid(numbers=(0.1, 0.05, 0.2))),
    "NoRA, rule": (Variant("nora", "rule"), Grid()),
    "PiSSA": (Variant("pissa"), Grid()),
    "NoRA+": (Variant("nora+", number="scale"), Grid(numbers=(0.1, 0.05, 0.2))),
    "EVA": (Variant("eva", number="size"), Grid(numbers=(1.0, 0.5, 2.0))),
    "LoRA-One": (Variant("lora-one", number="gamma"), Grid(numbers=(16.0, 4.0, 64.0))),
    "LoRA-P": (Variant("lora-p", number="damping"), Grid(numbers=(1e-2, 1e-4, 1.0))),
    "LoRA+": (Variant("lora+", number="ratio"), Grid(numbers=(16.0, 4.0, 64.0)).times(0.32)),
    "OLoRA": (Variant("olora"), Grid()),
}
"""Methods with their grids."""
SIZED, ROTATED, AGAIN, SHUFFLED = (
    "LoRA of NoRA's size",
    "NoRA, rotated",
    "LoRA again",
    "LoRA, shuffled labels",
)
CONTROLS = {
    SIZED: Variant("nora", "gaussian", "scale"),
    ROTATED: Variant("nora", "rotated", "scale"),
}
REFERENCES: Methods = {
    "linear probe": (Variant("linear-probe"), Grid().times(10)),
    "full": (Variant("full"), Grid().times(0.032)),
}
AT_ONE_RATE = {f"{name}, LoRA's rate": name for name in METHODS if name != BASE}
"""Rows at LoRA's learning rate and their methods: papers compare so."""
CONTROLS_AT_ONE_RATE = {f"{name}, NoRA's rate": name for name in CONTROLS}
"""Rows at NoRA's learning rate and their controls."""
VARIANTS = (
    {name: variant for name, (variant, _) in (METHODS | REFERENCES).items()}
    | CONTROLS
    | {AGAIN: METHODS[BASE][0], SHUFFLED: METHODS[BASE][0]}
    | {label: METHODS[name][0] for label, name in AT_ONE_RATE.items()}
    | {label: CONTROLS[name] for label, name in CONTROLS_AT_ONE_RATE.items()}
)
"""What each row of the table runs."""
FIRST = 3
"""How many of the methods are run first, seed by seed; one more is before the controls."""
PAIRS = (
    *(("NoRA", "NoRA, rule"), ("NoRA", SIZED), ("NoRA", ROTATED)),
    *((AGAIN, BASE), ("NoRA+", "NoRA")),
)
"""Further pairs that are compared."""
UPDATES = (BASE, "NoRA", "PiSSA", SHUFFLED)
"""Whose updates are kept for Figure 2."""
ENDPOINTS = (
    Endpoint("training_loss", "training loss", 0.02),
    Endpoint("validation_loss", "validation loss", 0.02),
    Endpoint("test_accuracy", "test accuracy", 0.01, relative=False),
)
