"""Adapters against their floors: step and compilation of NoRA+, memory of `nys.lora.apply`.

    python benchmarks/lora.py                                 # all three
    python benchmarks/lora.py --only step|compile|memory

The bounds are printed beside the numbers, and nothing is asserted. `lora_init.py` times the start.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from timing import interleaved, ratio

import nyscaled as nys

LAYERS, WIDTH, HEADS, BATCH, LENGTH, RANK = 12, 768, 12, 8, 128, 8
TARGETS = {"q, v": r".*(q_proj|v_proj)", "all six": r".*(_proj|up|down)"}
LLAMA = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (4096, 11008)),
    "down_proj": (11008, 4096),
}


class Block(nnx.Module):
    """A transformer block with attention over the whole sequence."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.first, self.second = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.q_proj, self.k_proj = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.first(x)
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (f(h).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.second(x))))


class Model(nnx.Module):
    """Twelve blocks and nothing else; no embeddings, so that the optimizer weighs more."""

    def __init__(self, scanned: bool) -> None:
        keys = jax.random.split(jax.random.key(0), LAYERS)
        make = lambda key: Block(nnx.Rngs(key))  # noqa: E731
        self.blocks = nnx.vmap(make)(keys) if scanned else nnx.List([make(key) for key in keys])

    def __call__(self, x: jax.Array) -> jax.Array:
        if isinstance(self.blocks, nnx.List):
            return functools.reduce(lambda x, block: block(x), self.blocks, x)
        graph, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), x, state)[0]


def training_step(
    model: Model, tx: optax.GradientTransformation, x: jax.Array, y: jax.Array
) -> Callable[[], Any]:
    """One compiled step of the adapters from their start."""
    graph, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    # b = 0 is a start and not what training sees
    params = jax.tree.map(lambda p: p + 1e-2, params)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, rest: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((nnx.merge(graph, params, rest)(x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return lambda: step(params, state, rest)


def step_time(rounds: int) -> None:
    x, y = jax.random.normal(jax.random.key(1), (2, BATCH, LENGTH, WIDTH))
    print(
        f"step, {LAYERS} layers, d = {WIDTH}, {BATCH} × {LENGTH} tokens, r = {RANK}, "
        f"{rounds} rounds"
    )
    print("| layers | adapters on | LoRA, adamw | NoRA+, adamw | bound |")
    print("|---|---|---|---|---|")
    for scanned in (True, False):
        for name, targets in TARGETS.items():
            model = Model(scanned)
            nys.lora.apply(model, RANK, targets=targets, key=jax.random.key(2))
            inner = optax.adamw(1e-4)
            steps = {
                "lora": training_step(model, inner, x, y),
                "nora+": training_step(model, nys.nora_plus(inner), x, y),
            }
            seconds = interleaved(steps, rounds)
            kind = "scanned" if scanned else "separate"
            print(
                f"| {kind} | {name} | {np.median(seconds['lora']):.2f} s "
                f"| {ratio(seconds, 'nora+', 'lora'):.3f} × | ≤ 1.05 × |",
                flush=True,
            )


def compile_time() -> None:
    params = {
        f"layers_{i}": {
            name: {
                "lora_a": jax.ShapeDtypeStruct((m, RANK), jnp.float32),
                "lora_b": jax.ShapeDtypeStruct((RANK, n), jnp.float32),
            }
            for name, (m, n) in LLAMA.items()
        }
        for i in range(32)
    }
    print("compilation of the update, 224 pairs of a 7B LLaMA, r = 8")
    print("| optimizer | trace | compile | both | CPU seconds of both | bound |")
    print("|---|---|---|---|---|---|")
    inner = optax.adamw(1e-4)
    for name, tx, bound in (("adamw", inner, ""), ("NoRA+, adamw", nys.nora_plus(inner), "≤ 10 s")):
        state = jax.eval_shape(tx.init, params)
        begin, cpu = time.perf_counter(), time.process_time()
        lowered = jax.jit(tx.update).lower(params, state, params)
        middle = time.perf_counter()
        lowered.compile()
        end, cpu = time.perf_counter(), time.process_time() - cpu
        print(
            f"| {name} | {middle - begin:.1f} s | {end - middle:.1f} s | {end - begin:.1f} s "
            f"| {cpu:.1f} | {bound} |",
            flush=True,
        )


class Stack(nnx.Module):
    """A stack of square layers whose kernel is one array."""

    def __init__(self, depth: int, side: int, dtype: Any) -> None:
        # Only the shapes are made here: an initializer would set the peak of the process.
        self.linear = nnx.eval_shape(
            lambda: nnx.Linear(side, side, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))
        )
        self.linear.kernel = nnx.Param(jnp.full((depth, side, side), 0.01, dtype))


def peak_of_apply(depth: int, side: int, dtype: str) -> None:
    """Print what `apply` adds to the peak of the base's memory; for a process of its own."""
    model = Stack(depth, side, jnp.dtype(dtype))
    jax.block_until_ready(model.linear.kernel[...])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nys.lora.apply(model, RANK, targets="linear", key=jax.random.key(0))
    jax.block_until_ready(nnx.state(model, nnx.LoRAParam))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps((after - before) / 1024))


def memory() -> None:
    def child(depth: int, side: int, dtype: str) -> float:
        command = [sys.executable, __file__, "--peak", str(depth), str(side), dtype]
        # Pages that are freed go back at once: the heap of glibc would grow with fragmentation.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        runs = (
            subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            for _ in range(3)
        )
        return min(float(done.stdout) for done in runs)

    print("memory of apply, NoRA, r = 8: peak of the process over the base, less that of 4 × 64²")
    print("| base | base MB | apply adds | bound: adapters + one layer |")
    print("|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        floor = child(4, 64, dtype)
        for depth in (8, 16):
            side, size = 2048, jnp.dtype(dtype).itemsize
            layer, factors = side * side * size / 2**20, depth * 2 * side * RANK * 4 / 2**20
            print(
                f"| {depth} × {side}² {dtype} | {depth * layer:.0f} "
                f"| {child(depth, side, dtype) - floor:.1f} MB | ≤ {factors + layer:.1f} MB |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapters against their floors.")
    parser.add_argument("--only", choices=("step", "compile", "memory"))
    parser.add_argument("--rounds", type=int, default=7, help="of the step")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        depth, side, dtype = options.peak
        peak_of_apply(int(depth), int(side), dtype)
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    parts = {"compile": compile_time, "memory": memory, "step": lambda: step_time(options.rounds)}
    for name, part in parts.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
