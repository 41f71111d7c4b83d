"""Starts and optimizers of adapters on SST-2 with a small encoder, in paired runs.

    python experiments/tier_a.py --data FOLDER                # figures/tier_a.*, runs in a .jsonl
    python experiments/tier_a.py --data FOLDER --minutes 60   # starts no run after an hour
    python experiments/tier_a.py --data FOLDER --minutes 0    # draws what is there
    python experiments/tier_a.py --quick --out /tmp           # a random encoder, made-up sentences

FOLDER has train.tsv, dev.tsv and test.tsv of SST-2 (`sentence<TAB>label`). The encoder is MiniLM
(`make weights`). Each run is a line of `tier_a.jsonl`; a script that is started again goes on.

This was written down before the runs, and is what the script does.

- Runs: adapters of rank 8, α = 16, on queries and values; 200 steps of 8 of 1,000 sentences; AdamW
  without decay, clipping at 1, a learning rate that falls linearly to zero; no dropout. A seed
  decides the examples, their order, the head and the key of the start, for all methods alike.
- Tuning, the same for all: five learning rates in runs of 60 steps, extended where the best is at
  an end; at the best one two other values of the method's second number, or two learning rates
  between for a method without; the best two in full length. The lowest validation loss counts. The
  seed of tuning is not used again.
- Final: `--seeds` other seeds at the chosen point, eight unless said otherwise.
- Endpoints: the mean training loss over the steps (the area under its curve), and the mean of
  −log p of the right class over 500 validation sentences after the last step. Accuracy on 1,000
  test sentences is secondary.
- A difference to LoRA is claimed where all three hold: the 95 % t-interval of the paired
  differences excludes zero; the exact sign-flip test is below 0.05; the paired t-test, corrected by
  Holm over the methods, is below 0.05. (The sign-flip test is not corrected: of eight pairs it is
  at least 1/128, so that no eight methods could pass.) "Equal" is claimed where the 90 % interval
  lies within 2 % of LoRA's loss, or one point of accuracy. All else is "no difference was seen".
- Controls: random starts as large as NoRA's in each layer; NoRA's start times a random orthogonal
  matrix, which has its singular values and wrong directions; LoRA against LoRA with other starts;
  shuffled labels.
- Expected: no difference under Adam between starts with b = 0, as in `linear_lora.py`; an early
  gain of starts from gradients, if any.

Holm's correction is made for each endpoint and each group of rows by itself. Added after eight
seeds had been seen: eight more of them for the record, the methods at LoRA's learning rate with
their own second numbers, and that a comparison with a run that diverged says so.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from experiments.lib import made_up
from experiments.lib.adapter_data import Setting
from experiments.lib.config import command_line
from experiments.lib.tier_methods import FIRST, METHODS
from experiments.lib.tier_study import Study, TierConfig
from experiments.lib.tier_summary import check, make_and_compare


@dataclasses.dataclass(frozen=True)
class Config(TierConfig):
    """Starts and optimizers of adapters on SST-2, in paired runs.

    --quick: a random encoder and made-up sentences, three methods, three seeds.
    """

    model: str = "build/weights/all-MiniLM-L6-v2"
    """Folder of the encoder."""
    data: Path = Path("build/data/sst2")
    """Folder of train.tsv, dev.tsv and test.tsv."""


def main(config: Config) -> None:
    """Make the runs that are missing, and compare all."""
    check(config)
    with tempfile.TemporaryDirectory() as folder:
        methods = METHODS
        setting = Setting(config.model, config.data, batch_size=config.batch_size)
        if config.quick:
            model = made_up.write_model(Path(folder) / "encoder", "bert")
            data = made_up.write_sentences(Path(folder) / "sentences")
            config = dataclasses.replace(
                config, steps=20, screening_steps=5, seeds=3, updates=Path(folder)
            )
            setting = Setting(model, data, rank=2, alpha=4.0, examples=(40, 16, 16))
            methods = {name: METHODS[name] for name in list(METHODS)[: FIRST + 1]}
        make_and_compare(Study(config, setting, methods, "tier_a"))


if __name__ == "__main__":
    command_line(main, Config)
