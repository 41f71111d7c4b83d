"""What a step of fine-tuning takes beside its program, and what NoRA+ takes over LoRA.

    python benchmarks/finetune_overhead.py --model build/weights/all-MiniLM-L6-v2
    python benchmarks/finetune_overhead.py --model build/weights/all-MiniLM-L6-v2 --quick

r = 8 on all linear layers of the stack, AdamW, batch 16, float32, on drawn sentences. The host's
work for a step is the time that the thread of the loop is busy: it makes a batch, calls the
program, and writes metrics. While it does, the program of the step before may still run, so that
this is the most that a step can lose. Other programs on the machine do not change it, but make
steps longer: the shortest step counts. NoRA+ and LoRA make steps in turns on one batch, with their
programs alone; their ratio is the median over the turns. The bounds are printed beside the numbers,
and nothing is asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from finetune_run import write_data
from timing import interleaved, ratio

from nyscaled.finetune import Config, loop, preparation, training
from nyscaled.finetune.loop import Plan

HOST, OVER = 0.03, 1.05
LOGGED = 10


def plan_of(model: Path, data: Path, folder: Path, method: str, steps: int) -> Plan:
    """The plan of a run without a validation before its end."""
    config = Config(
        model=str(model),
        data=data,
        task="sst2",
        method=method,
        steps=steps,
        eval_every=steps,
        log_every=LOGGED,
        validation_examples=16,
        out=folder,
    )
    return preparation.prepare(config).plan


def loop_seconds(plan: Plan) -> float:
    """Seconds that the thread of the loop works, without those in which it waits."""
    with tempfile.TemporaryDirectory() as name:
        began = time.thread_time()
        loop.train(plan, Path(name))
        return time.thread_time() - began


def of_host(plan: Plan) -> float:
    """Seconds per step that the loop works: a batch, a call, a line of metrics.

    What a run does once is in a shorter run too, and is subtracted.
    """
    short = dataclasses.replace(plan, steps=LOGGED)
    return (loop_seconds(plan) - loop_seconds(short)) / (plan.steps - LOGGED)


def stepping(plan: Plan, batch: Any) -> Callable[[], Any]:
    """A function that makes a step on a batch."""
    state, rate = plan.initial(), jax.device_put(np.float32(1e-5))

    def step() -> Any:
        nonlocal state
        values = plan.parts.counts, plan.parts.frozen, batch, rate
        state, _ = training.train_step(state, *values, program=plan.program)
        return state

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step takes beside its program.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="steps of a round")
    parser.add_argument("--quick", action="store_true", help="one round of a few steps")
    options = parser.parse_args()
    rounds, steps = (1, LOGGED + 2) if options.quick else (options.rounds, options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(None, folder, 16 * steps)
        plans = {
            method: plan_of(options.model, folder, folder / method, method, steps)
            for method in ("lora", "nora+")
        }
        host = min(of_host(plans["lora"]) for _ in range(rounds))
        batch = jax.device_put(plans["lora"].batch(0))
        functions = {method: stepping(own, batch) for method, own in plans.items()}
        seconds = interleaved(functions, 1 if options.quick else 20 * rounds)
    least = {method: float(np.min(values)) for method, values in seconds.items()}
    over = ratio(seconds, "nora+", "lora")
    print(f"jax {jax.__version__}, {options.model.name}, {rounds} rounds")
    print("| | ms | ms | ratio | bound |\n|---|---|---|---|---|")
    print(
        f"| LoRA: the host's work for a step, and the step's program | {1e3 * host:.2f} | "
        f"{1e3 * least['lora']:.1f} | {host / least['lora']:.1%} | ≤ {HOST:.0%} |"
    )
    print(
        f"| a step of NoRA+, and of LoRA on the same batch | {1e3 * least['nora+']:.1f} | "
        f"{1e3 * least['lora']:.1f} | {over:.3f} | ≤ {OVER} |"
    )


if __name__ == "__main__":
    main()
