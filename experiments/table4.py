"""Table 4: instruction tuning for commonsense questions, scored on eight sets, by method.

    python experiments/table4.py --train FILE --data FOLDER            # LLaMA-7B
    python experiments/table4.py --model FILE --train boolq/train.json --data FOLDER --steps 100
    python experiments/table4.py --quick --out /tmp                    # a random model

FILE is LLM-Adapters' JSON (commonsense_170k.json in the paper), and FOLDER has SET/test.json of the
sets that are scored. The defaults are the published settings: rank 32, α = 64, dropout 0.05 on the
q, k, v, up and down projections, 3 epochs of batches of 16 with AdamW at 3e-4, 100 steps of
warm-up, the loss on all tokens, 120 rows for validation every 80 steps. NoRA's ξ is 0.02.

What differs: answers are compared by their likelihood, where the published evaluation generates
text with four beams (`--generated` generates it greedily), and the prompt of training is that of
testing too.
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
from experiments.lib.score_table import scored, write

SETS = {
    "boolq": "commonsense-boolq",
    "piqa": "commonsense-piqa",
    "social_i_qa": "commonsense-siqa",
    "hellaswag": "commonsense-hellaswag",
    "winogrande": "commonsense-winogrande",
    "ARC-Easy": "commonsense-arc-easy",
    "ARC-Challenge": "commonsense-arc-challenge",
    "openbookqa": "commonsense-openbookqa",
}
"""Folders of the sets in LLM-Adapters, and their tasks here."""


@dataclasses.dataclass(frozen=True)
class Config(InstructionConfig):
    """Instruction tuning for commonsense questions.

    --quick: a random model and made-up questions, two methods, a few steps.
    """

    model: str = "huggyllama/llama-7b"
    """Model: a folder, a GGUF file or a hub id."""
    train: Path = Path("build/data/commonsense_170k.json")
    """File of the questions to train on."""
    data: Path = Path("build/data/commonsense")
    """Folder with SET/test.json for each set that is scored."""
    test_examples: int | None = None
    """Most questions of each set; None for all."""
    generated: bool = False
    """Read answers from generated text."""
    runs: Path = Path("build/table4")
    """Folder of the runs."""


def run(config: Config, method: str, seed: int) -> nys.finetune.Result:
    """Return the result of one run."""
    return instructed(
        config,
        config.train,
        "commonsense",
        method,
        seed,
        targets=r".*\.(q_proj|k_proj|v_proj|up_proj|down_proj)",
        dropout=0.05,
        warmup_steps=100 if config.steps is None else None,
        max_length=256,
        loss_on="all",
        validation_examples=120,
        eval_every=80 if config.steps is None else None,
    )


def score(config: Config, adapter: Path, name: str) -> float:
    """Return the accuracy of an adapter on a set."""
    scores = scored(
        config.model,
        adapter,
        config.data / name / "test.json",
        SETS[name],
        dtype=config.dtype,
        examples=config.test_examples,
        generated=config.generated,
    )
    return scores["accuracy"]


def write_questions(folder: Path) -> None:
    """Write made-up questions in the format of LLM-Adapters."""
    for part, count in (("train", 40), ("boolq/test", 8), ("ARC-Easy/test", 8)):
        rows: list[dict[str, str]] = []
        for i in range(count):
            words = ("answer1", "answer2") if "ARC" in part else ("true", "false")
            answer = words[i % 2]
            mood = ("good", "bad")[i % 2]
            instruction = f"It was {mood} . Answer format: {'/'.join(words)}"
            output = f"the correct answer is {answer}"
            row = {"instruction": instruction, "input": "", "output": output, "answer": answer}
            rows.append(row)
        path = folder / f"{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")


def main(config: Config) -> None:
    """Make the runs that are missing, score them, and write the table."""
    with tempfile.TemporaryDirectory() as name:
        if config.quick:
            folder = Path(name)
            write_questions(folder)
            config = dataclasses.replace(
                config,
                model=made_up.write_model(folder / "llama", "llama"),
                train=folder / "train.json",
                data=folder,
                methods=("nora",),
                rank=2,
                steps=3,
                dtype="float32",
                runs=folder / "runs",
            )
        sets = [folder for folder in SETS if (config.data / folder / "test.json").exists()]
        if not sets:
            raise ValueError(
                f"{config.data} has no test sets; expected SET/test.json of {', '.join(SETS)}"
            )
        scores: dict[str, dict[str, list[float]]] = {}
        for method in config.methods:
            for seed in range(config.seed, config.seed + config.seeds):
                result = run(config, method, seed)
                for folder in sets:
                    value = score(config, result.out / "adapter", folder)
                    scores.setdefault(folder, {}).setdefault(method, []).append(value)
        write(config.out, "table4", config, scores)


if __name__ == "__main__":
    command_line(main, Config)
