"""Starts of adapters in the upper layers of a small language model, in paired runs.

    python experiments/tier_b.py --data FOLDER                   # SST-2; figures/tier_b_sst2.*
    python experiments/tier_b.py --data FOLDER --task commonsense-arc-easy   # tier_b_arc_easy.*
    python experiments/tier_b.py --data FOLDER --minutes 0       # draws what is there
    python experiments/tier_b.py --quick --out /tmp              # a random model, made-up sentences

FOLDER has train.tsv, dev.tsv and test.tsv of SST-2, or train.json and test.json of ARC-Easy in the
format of LLM-Adapters. The model is SmolLM2-135M-Instruct (`make weights`), dequantized to float32.
Its lower 22 layers are computed once for each example; adapters are in the upper eight. So this is
not the setting of the paper, but a step costs a quarter of that of the whole model.

This was written down before the runs, and is what the script does.

- Runs: adapters of rank 8, α = 16, on q_proj and v_proj of the upper eight layers; 250 steps of 8
  of 1,000 examples; AdamW without decay, clipping at 1, a learning rate that falls linearly to
  zero. The loss is the cross-entropy of the candidates: "terrible" and "great" after MeZO's prompt;
  the digits of answer1 to answer4 after the prompt of LLM-Adapters and "the correct answer is
  answer". Questions of ARC-Easy with other numbers of answers are left out.
- Tuning, final runs, endpoints, what counts as a difference and as "equal", and controls are those
  of `tier_a.py`, with learning rates from 1e-4 to 1e-2 in the place of its grid.
- Expected: no difference between starts with b = 0, as in `tier_a.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.lib import tier_language
from experiments.lib.config import command_line
from experiments.lib.tier_study import TierConfig

METHODS = ("LoRA", "NoRA", "PiSSA", "NoRA+", "LoRA-One")
UPPER = 8


@dataclasses.dataclass(frozen=True)
class Config(TierConfig):
    """Starts of adapters in the upper layers of a small language model, in paired runs.

    --quick: a random model and made-up sentences, two methods, three seeds.
    """

    model: str = tier_language.MODEL
    """File or folder of the model."""
    data: Path = Path("build/data/sst2")
    """Folder of the examples."""
    task: str = "sst2"
    """The task: sst2 or commonsense-arc-easy."""
    steps: int = 250
    """Steps of a run."""
    updates: Path = Path("build/updates_b")
    """Folder for the trained updates."""


def main(config: Config) -> None:
    """Make the runs that are missing, and compare all."""
    file = "tier_b_" + config.task.removeprefix("commonsense-").replace("-", "_")
    tier_language.run(config, config.task, METHODS, file, upper=UPPER)


if __name__ == "__main__":
    command_line(main, Config)
