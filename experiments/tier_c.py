"""Starts of adapters in a small language model in the format of Table 2, in paired runs.

    python experiments/tier_c.py --data FOLDER                # figures/tier_c.*, runs in a .jsonl
    python experiments/tier_c.py --data FOLDER --minutes 0    # draws what is there
    python experiments/tier_c.py --quick --out /tmp           # a random model, made-up sentences

FOLDER has train.tsv, dev.tsv and test.tsv of SST-2. The model is SmolLM2-135M-Instruct
(`make weights`), dequantized to float32: a tenth of the paper's OPT-1.3B. `table2.py` is the same
with the published settings, through the command of the library.

This was written down before the runs, and is what the script does.

- Runs: adapters of rank 8, α = 16, on q_proj and v_proj of all layers; 375 steps of 8, three epochs
  of 1,000 sentences; AdamW without decay, clipping at 1, a learning rate that falls linearly to
  zero. The loss is the cross-entropy of "terrible" and "great" after MeZO's prompt.
- Tuning, final runs, endpoints, what counts as a difference and as "equal", and controls are those
  of `tier_a.py`, with learning rates from 1e-4 to 1e-2 in the place of its grid.
- Expected: no difference between starts with b = 0, as in `tier_a.py`.

Added when the runs at tuned rates had been seen: a control that was tuned to another rate than NoRA
runs at NoRA's rate too, and is compared with NoRA in a group of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.lib import tier_language
from experiments.lib.config import command_line
from experiments.lib.tier_study import TierConfig

METHODS = ("LoRA", "NoRA", "PiSSA", "NoRA+", "OLoRA")


@dataclasses.dataclass(frozen=True)
class Config(TierConfig):
    """Starts of adapters in a small language model in the format of Table 2, in paired runs.

    --quick: a random model and made-up sentences, two methods, three seeds.
    """

    model: str = tier_language.MODEL
    """File or folder of the model."""
    data: Path = Path("build/data/sst2")
    """Folder of train.tsv, dev.tsv and test.tsv."""
    steps: int = 375
    """Steps of a run."""
    updates: Path = Path("build/updates_c")
    """Folder for the trained updates."""


def main(config: Config) -> None:
    """Make the runs that are missing, and compare all."""
    tier_language.run(config, "sst2", METHODS, "tier_c")


if __name__ == "__main__":
    command_line(main, Config)
