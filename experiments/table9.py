"""Table 9: MetaMathQA to GSM8K. A smoke run of the path, unless it has the published data.

    python experiments/table9.py --train FILE --test FILE    # Gemma-7B, MetaMathQA-100K, GSM8K
    python experiments/table9.py --model FILE --test FILE    # smoke: trains on problems of the test
    python experiments/table9.py --quick --out /tmp          # smoke with a random model

The defaults are the published settings: rank 32 and α = 64 on all seven projections, 2 epochs of
batches of 128. Warm-up, schedule and length are not published; they are PiSSA's (Meng et al., 2024)
here: cosine, 3 %, 512 tokens, the loss on the answer. Rows for validation are taken from the file.

Without a file to train on, the model is trained on some problems of the test file. Such a run shows
that the path works, and its accuracy would mean nothing: it prints losses only.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import nyscaled as nys
from experiments.lib import made_up
from experiments.lib.config import command_line
from experiments.lib.instruction_runs import InstructionConfig, instructed
from experiments.lib.record import save_record
from experiments.lib.score_table import scored, write


@dataclasses.dataclass(frozen=True)
class Config(InstructionConfig):
    """MetaMathQA to GSM8K.

    --quick: a smoke run with a random model and made-up problems.
    """

    model: str = "google/gemma-7b"
    """Model: a folder, a GGUF file or a hub id."""
    train: Path | None = None
    """File of MetaMathQA; None for a smoke run on problems of the test file."""
    test: Path = Path("build/data/gsm8k/test.json")
    """File of GSM8K's test."""
    learning_rate: float = 4e-4
    """Largest learning rate; the paper chose among 3e-4, 4e-4 and 5e-4."""
    scale: float = 0.05
    """Size ξ of NoRA's start; the paper chose among 0.02, 0.05 and 0.1."""
    epochs: float = 2
    """Passes through the problems."""
    batch_size: int = 128
    """Problems in a step."""
    micro_batch_size: int | None = 8
    """Problems in memory at one time."""
    train_examples: int | None = 100_000
    """Problems to train on, the first ones in the order of the seed."""
    runs: Path = Path("build/table9")
    """Folder of the runs."""


def run(config: Config, method: str, seed: int) -> nys.finetune.Result:
    """Return the result of one run."""
    return instructed(
        config,
        config.test if config.train is None else config.train,
        "gsm8k" if config.train is None else "metamath",
        method,
        seed,
        schedule="cosine",
        micro_batch_size=config.micro_batch_size,
        train_examples=config.train_examples,
        test_examples=1,
    )


def write_problems(folder: Path) -> Path:
    """Write made-up problems in the format of LLM-Adapters, and return the file."""
    rows = [
        {"instruction": f"film {i}", "output": f"It was {i} . The answer is: {i}", "answer": str(i)}
        for i in range(40)
    ]
    path = folder / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def main(config: Config) -> None:
    """Make the runs that are missing; score them, unless they are a smoke run."""
    with tempfile.TemporaryDirectory() as name:
        if config.quick:
            folder = Path(name)
            config = dataclasses.replace(
                config,
                model=made_up.write_model(folder / "llama", "llama"),
                train=None,
                test=write_problems(folder),
                methods=("nora+",),
                rank=2,
                steps=3,
                batch_size=8,
                micro_batch_size=4,
                dtype="float32",
                runs=folder / "runs",
            )
        scores: dict[str, dict[str, list[float]]] = {}
        losses: dict[str, list[float]] = {}
        for method in config.methods:
            for seed in range(config.seed, config.seed + config.seeds):
                result = run(config, method, seed)
                losses.setdefault(method, []).append(result.validation_loss)
                if config.train is not None:
                    adapter = result.out / "adapter"
                    values = scored(config.model, adapter, config.test, "gsm8k", dtype=config.dtype)
                    for metric, value in values.items():
                        scores.setdefault(metric, {}).setdefault(method, []).append(value)
        if config.train is None:
            print("smoke run, no accuracy is meant; validation losses:", losses)
            save_record(config.out, "table9", config, smoke=True, validation_losses=losses)
        else:
            write(config.out, "table9", config, scores, validation_losses=losses)


if __name__ == "__main__":
    command_line(main, Config)
