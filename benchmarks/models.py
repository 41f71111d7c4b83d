"""SmolLM2-135M against transformers on torch: forward, LoRA's gradients, greedy decoding.

    make weights && python benchmarks/models.py
    python benchmarks/models.py --rounds 5

Both read the same GGUF file, in float32, on as many threads as the process may use cores. The
layers' and the head's matrix products alone are timed for both, and in NumPy: they are the floor of
the forward pass, and say how far apart the two could be on this processor. The bounds are printed
beside the numbers, and nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import optax
from flax import nnx
from timing import interleaved, ratio

import nyscaled as nys

try:
    import peft
    import torch
    import transformers
except ModuleNotFoundError as error:
    raise SystemExit(
        f"this benchmark compares with transformers and PEFT and needs {error.name}: "
        "pip install torch transformers peft"
    ) from None

WEIGHTS = Path("build/weights/SmolLM2-135M-Instruct.Q4_1.gguf")
BATCH, LENGTH, RANK, PROMPT, NEW = 4, 64, 8, 16, 64
# Work, and how many times faster than torch it is meant to be.
BOUNDS = {
    f"forward, {BATCH} × {LENGTH}": 1.5,
    f"forward + backward, LoRA r = {RANK} on q, v": 2.0,
    f"greedy decoding of {NEW} tokens, batch 1": 1.0,
    f"greedy decoding of {NEW} tokens, batch {BATCH}": 1.0,
}
FLOOR = "products of the forward pass alone"


def products(config: Any) -> list[tuple[int, int]]:
    """(in, out) of each linear layer that the forward pass goes through, the head's too."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = [(width, queries), (width, keys), (width, keys), (queries, width)]
    layer += [(width, inner), (width, inner), (inner, width)]
    return layer * config.num_hidden_layers + [(width, config.vocab_size)]


def ours(model: Any, tokens: np.ndarray) -> tuple[dict[str, Callable[[], Any]], float]:
    """The work by name, compiled; and the seconds that LoRA's step took to compile."""
    shapes = products(model.config)
    key = jax.random.key(0)
    matrices = {s: jax.random.normal(key, s) for s in set(shapes)}
    rows = {k: jax.random.normal(key, (BATCH * LENGTH, k)) for k in {s[0] for s in shapes}}
    multiply = jax.jit(lambda x, w: x @ w)
    prompts = {batch: tokens[:batch, :PROMPT] for batch in (1, BATCH)}
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))

    adapted = nnx.clone(model)
    nys.lora.apply(adapted, RANK, targets=".*[qv]_proj", key=key)
    adapted_graph, adapters, base = nnx.split(adapted, nnx.LoRAParam, ...)

    @jax.jit
    def gradients(adapters: Any, base: Any, tokens: jax.Array) -> Any:
        def loss(adapters: Any) -> jax.Array:
            logits = nnx.merge(adapted_graph, adapters, base, copy=True)(tokens)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return losses.mean()

        return jax.value_and_grad(loss)(adapters)

    start = time.perf_counter()
    compiled = gradients.lower(adapters, base, tokens).compile()
    seconds = time.perf_counter() - start

    def generate(batch: int) -> Callable[[], Any]:
        return lambda: nys.models.generate(
            model, prompts[batch], max_new_tokens=NEW, stop_tokens=()
        )

    work = (
        lambda: forward(state, tokens),
        lambda: compiled(adapters, base, tokens),
        generate(1),
        generate(BATCH),
    )
    floor = {FLOOR: lambda: [multiply(rows[s[0]], matrices[s]) for s in shapes]}
    return floor | dict(zip(BOUNDS, work, strict=True)), seconds


def theirs(model: Any, config: Any, tokens: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same on torch."""
    shapes = products(config)
    matrices = {s: torch.randn(s[::-1]) for s in set(shapes)}
    rows = {k: torch.randn(BATCH * LENGTH, k) for k in {s[0] for s in shapes}}
    ids = torch.tensor(tokens).long()
    adapted = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_config(model.config),
        peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]),
    )

    def gradients() -> Any:
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()

    def generate(batch: int) -> Callable[[], Any]:
        prompt = ids[:batch, :PROMPT]
        options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        options["attention_mask"] = torch.ones_like(prompt)
        return torch.no_grad()(lambda: model.generate(prompt, **options))

    forward = torch.no_grad()(lambda: model(ids).logits)
    multiply = torch.nn.functional.linear
    floor = torch.no_grad()(lambda: [multiply(rows[s[0]], matrices[s]) for s in shapes])
    work = (forward, gradients, generate(1), generate(BATCH))
    return {FLOOR: floor} | dict(zip(BOUNDS, work, strict=True))


def multiply(config: Any) -> Callable[[], Any]:
    """The products in NumPy."""
    draw, shapes = np.random.default_rng(0), products(config)
    matrices = {s: draw.standard_normal(s, np.float32) for s in set(shapes)}
    rows = {
        k: draw.standard_normal((BATCH * LENGTH, k), np.float32) for k in {s[0] for s in shapes}
    }
    return lambda: [rows[s[0]] @ matrices[s] for s in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M here and in transformers.")
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    if not WEIGHTS.is_file():
        raise SystemExit(f"{WEIGHTS} is missing: make weights")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model, _ = nys.models.load(WEIGHTS)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        WEIGHTS.parent, gguf_file=WEIGHTS.name, dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (BATCH, LENGTH))
    mine, seconds = ours(model, tokens.astype(np.int32))
    other = theirs(peer, model.config, tokens)
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, {threads} threads, {rounds} rounds"
    )
    print("| SmolLM2-135M, float32 | here, ms | torch, ms | times faster | bound |")
    print("|---|---|---|---|---|")
    medians: dict[tuple[str, str], float] = {}
    for name in mine:
        functions = {"here": mine[name], "torch": other[name]}
        if name == FLOOR:
            functions["NumPy"] = multiply(model.config)
        times = interleaved(functions, rounds)
        medians |= {(side, name): float(np.median(times[side])) for side in times}
        here, there = (1e3 * medians[side, name] for side in ("here", "torch"))
        bound = f"≥ {BOUNDS[name]}" if name in BOUNDS else ""
        factor = ratio(times, "torch", "here")
        print(f"| {name} | {here:.0f} | {there:.0f} | {factor:.2f} | {bound} |", flush=True)
    forward = next(iter(BOUNDS))
    work = 2e-9 * BATCH * LENGTH * sum(k * n for k, n in products(model.config))  # GFLOP
    rates = [f"{side} {work / medians[side, FLOOR]:.0f}" for side in ("here", "torch", "NumPy")]
    aim = BOUNDS[forward] * work / medians["torch", forward]
    print(
        f"\nProducts, GFLOP/s: {', '.join(rates)}; the bound of the forward pass takes {aim:.0f}."
    )
    print(f"\nCompilation of the LoRA step: {seconds:.1f} s (bound 30 s).")


if __name__ == "__main__":
    main()
