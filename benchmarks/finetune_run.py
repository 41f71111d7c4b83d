"""A whole run of `nyscaled finetune` against transformers and PEFT, in examples per second.

    python benchmarks/finetune_run.py --model build/weights/all-MiniLM-L6-v2 --data SST2
    python benchmarks/finetune_run.py --model build/weights/SmolLM2-135M-Instruct.Q4_1.gguf \
        --data SST2 --epochs 1
    python benchmarks/finetune_run.py --model build/weights/all-MiniLM-L6-v2 --quick

LoRA, r = 8 on all linear layers of the stack, AdamW, batch 16, float32, 1,000 examples. Each side
is a process of its own, from its start to its end: imports, weights, compilation, training. The
second run here reads the programs that the first one compiled. Neither side has dropout. Both pad a
batch to its longest example; here batches have examples of like lengths. The peer is a plain
loop over batches that were tokenized before, without a Trainer. A language model is trained on the
label word; here the logits are computed where that word stands, in transformers at every token.
Without --data the sentences are drawn: 4 to 40 words.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RANK, BATCH, RATE = 8, 16, 3e-4
VOCABULARY = ["good", "bad", "film", "story"]


def words(count: int, seed: int) -> str:
    """Lines of drawn words with a label, as in SST-2's files."""
    rng = np.random.default_rng(seed)
    lines = [
        f"{' '.join(rng.choice(VOCABULARY, rng.integers(4, 40)))}\t{rng.integers(2)}"
        for _ in range(count)
    ]
    return "\n".join(lines) + "\n"


def write_data(source: Path | None, folder: Path, examples: int) -> None:
    """Files with as many examples to train on as are timed, and few others."""
    for name, count in (("train", examples), ("dev", 16)):
        text = words(count, 0)
        if source is not None:
            lines = (source / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
            text = "\n".join(lines[:count]) + "\n"
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")


def here(model: Path, data: Path, out: Path, epochs: int) -> list[str]:
    """The command of this project."""
    options = {
        "model": model,
        "data": data,
        "task": "sst2",
        "method": "lora",
        "rank": RANK,
        "learning-rate": RATE,
        "batch-size": BATCH,
        "epochs": epochs,
        "validation-examples": 16,
        "eval-every": 10**6,
        "out": out,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [str(Path(sys.executable).with_name("nyscaled")), "finetune", *flags]


def write_peer(model: Path, data: Path, folder: Path) -> None:
    """The model as transformers reads it, and the tokens of the examples."""
    import nyscaled as nys
    from nyscaled.finetune import Config, preparation

    config = Config(model=str(model), data=data, task="sst2", out=folder / "none", rank=RANK)
    prepared = preparation.prepare(config, outline=True)
    network, _ = nys.models.load(str(model))
    nys.models.save(network, folder)
    train: Any = prepared.plan.train
    encoder = prepared.objective == "class"
    ids = [
        [*map(int, rows[0].tokens), *(() if encoder else (train.candidates[label],))]
        for rows, label in zip(train.rows, train.labels, strict=True)
    ]
    layers = [name.rsplit(".", 1)[-1] for name in nys.lora.adapted_layers(prepared.model)]
    values = {
        "ids": ids,
        "labels": train.labels,
        "encoder": encoder,
        "targets": sorted(set(layers)),
    }
    (folder / "examples.json").write_text(json.dumps(values))


def peer(folder: Path, epochs: int) -> None:
    """The loop on torch; prints its seconds."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    values = json.loads((folder / "examples.json").read_text())
    encoder = values["encoder"]
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if encoder
        else transformers.AutoModelForCausalLM
    )
    quiet: dict[str, Any] = {}
    if encoder:
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config: Any = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=values["targets"],
        modules_to_save=["classifier"] if encoder else None,
    )
    base = auto.from_pretrained(folder, dtype=torch.float32, **quiet)
    model: Any = peft.get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    steps = epochs * -(-len(values["ids"]) // BATCH)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(0.03 * steps), steps)
    rng, start = np.random.default_rng(0), time.perf_counter()
    for _ in range(epochs):
        order = rng.permutation(len(values["ids"]))
        for begin in range(0, len(order), BATCH):
            rows = [torch.tensor(values["ids"][i]) for i in order[begin : begin + BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            places = torch.arange(ids.shape[1])
            mask = places < lengths[:, None]
            labels = torch.where(places == lengths[:, None] - 1, ids, -100)
            if encoder:
                labels = torch.tensor([values["labels"][i] for i in order[begin : begin + BATCH]])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()
    print(json.dumps({"seconds": time.perf_counter() - start}))


def timed(command: list[str], cache: Path) -> tuple[float, str]:
    """Seconds of a process, and what it printed; compiled programs are kept in a folder."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole run of LoRA here and in PEFT.")
    parser.add_argument("--model", type=Path, required=True, help="a folder, or a GGUF file")
    parser.add_argument("--data", type=Path, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="32 examples, one epoch")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    epochs, examples = (1, 32) if options.quick else (options.epochs, 1000)
    if options.peer:
        peer(options.peer, epochs)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, other = folder / "data", folder / "peer"
        data.mkdir()
        other.mkdir()
        write_data(options.data, data, examples)
        write_peer(options.model, data, other)
        print("| examples per second | nyscaled | transformers + PEFT | times faster |")
        print("|---|---|---|---|", flush=True)
        command = [sys.executable, __file__, "--model", str(options.model), "--peer", str(other)]
        command += ["--epochs", str(epochs), *(["--quick"] if options.quick else [])]
        whole, printed = timed(command, folder)
        rest = json.loads(printed.splitlines()[-1])["seconds"]
        for title in ("first run", "programs cached"):
            out = folder / title
            mine, _ = timed(here(options.model, data, out, epochs), folder)
            loop = json.loads((out / "result.json").read_text())["seconds"]
            for part, a, b in (("process", mine, whole), ("training", loop, rest)):
                rates = f"{epochs * examples / a:.1f} | {epochs * examples / b:.1f}"
                print(f"| {options.model.name}, {title}, {part} | {rates} | {b / a:.2f} |")


if __name__ == "__main__":
    main()
