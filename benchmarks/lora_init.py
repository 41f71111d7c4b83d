"""NoRA's start of a 4096 × 4096 layer, r = 32, beside the PiSSA starts of PEFT.

    python benchmarks/lora_init.py             # all; the exact SVD takes a minute or two
    python benchmarks/lora_init.py --no-exact

It needs torch and peft. Numbers are float32 and two threads of torch. The time of PEFT is that of
`LoraLayer.pissa_init` of one `torch.nn.Linear` in a model made by `get_peft_model`, which also
writes W_0 − s·b·a back. The time of NoRA is that of what `nys.lora.apply` runs for a layer,
compiled, which leaves W_0 as it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import nyscaled as nys

try:
    import peft
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(
        f"this benchmark compares with PEFT and needs {error.name}: pip install torch peft"
    ) from None

SIDE, RANK, THREADS = 4096, 32, 2
BOUNDS = {"pissa_niter_4": 10, "pissa": 500}


def nora() -> Callable[[], Any]:
    """The start of one layer, compiled: arrays in, factors out."""
    model = nnx.Sequential(nnx.Linear(SIDE, SIDE, use_bias=False, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    @jax.jit
    def start(state: Any, key: jax.Array) -> Any:
        copy = nnx.merge(graph, state)
        nys.lora.apply(copy, RANK, targets=".*", init="nora", key=key)
        return nnx.state(copy, nnx.LoRAParam)

    return lambda: jax.block_until_ready(start(state, jax.random.key(1)))


def pissa(init: str) -> Callable[[], Any]:
    """PEFT's start of a layer that it has adapted. Each call starts from the kernel left there."""
    linear = torch.nn.Linear(SIDE, SIDE, bias=False)
    torch.nn.init.normal_(linear.weight, std=SIDE**-0.5)
    base = torch.nn.Sequential(linear)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    adapted: Any = peft.get_peft_model(base, config)
    layer = adapted.base_model.model[0]

    def start() -> Any:
        with torch.no_grad():
            layer.pissa_init("default", init)

    return start


def seconds(fn: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description="NoRA's start against PEFT's PiSSA.")
    parser.add_argument("--no-exact", action="store_true", help="leave the exact SVD out")
    exact = not parser.parse_args().no_exact
    torch.set_num_threads(THREADS)
    ours, theirs = nora(), pissa("pissa_niter_4")
    for fn in (ours, theirs):
        fn()
    rounds = [(seconds(ours), seconds(theirs)) for _ in range(15)]
    mine, randomized = np.array(rounds).T
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, peft {peft.__version__}, "
        f"{THREADS} threads"
    )
    print(f"| start of {SIDE} × {SIDE}, r = {RANK} | seconds | ratio to NoRA | bound |")
    print("|---|---|---|---|")
    floor = float(np.median(mine))
    print(f"| NoRA, compiled | {floor:.4f} | 1 |  |")
    ratio = float(np.median(randomized / mine))
    bound = BOUNDS["pissa_niter_4"]
    print(
        f"| PEFT pissa_niter_4 | {np.median(randomized):.3f} | {ratio:.0f} × | ≥ {bound} × |",
        flush=True,
    )
    if exact:
        once = seconds(pissa("pissa"))
        after = float(np.median([seconds(ours) for _ in range(15)]))
        ratio, bound = once / max(floor, after), BOUNDS["pissa"]
        print(f"| PEFT pissa (once) | {once:.1f} | {ratio:.0f} × | ≥ {bound} × |")


if __name__ == "__main__":
    main()
