"""What holds on the accelerator that JAX finds: float32 floors, parity with the CPU, speeds.

    python benchmarks/accelerator.py            # prints three tables in Markdown
    python benchmarks/accelerator.py --quick    # small sizes, to see that it runs

Floors: the error at which float32 ends, for each κ. Parity: the same program on the accelerator and
on the CPU, in units of the rounding of float32. Speeds: a step beside its products with A.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from step import loop, products
from timing import interleaved, ratio

import nyscaled as nys

RANK = 20
EPS = float(jnp.finfo(jnp.float32).eps)


def floors(m: int) -> None:
    """‖XXᵀ − A‖_F/‖A‖_F after 60 steps; the bound is the one of the claim float32-dual."""
    print("| κ | ScaledGD | scaled Newton | QDWH | bound |\n|---|---|---|---|---|")
    makers = {
        "scaled": functools.partial(nys.solvers.scaled_step, learning_rate=0.5),
        "newton": nys.solvers.scaled_newton_step,
        "qdwh": nys.solvers.qdwh_step,
    }
    for kappa in (1e2, 1e3, 1e4, 1e5):
        spectrum = np.append(np.linspace(1, 0.7, RANK - 1), 1 / kappa)
        a, _ = nys.spectra.psd(jax.random.key(0), m, spectrum, jnp.float32)
        problem = nys.problems.Symmetric(a)
        start = nys.initializers.nystrom(jax.random.key(1), a, RANK)
        size = jnp.linalg.norm(a)
        errors = (
            problem.residual(nys.solvers.run(make(problem), start, 60).params) / size
            for make in makers.values()
        )
        print(f"| {kappa:.0e} |", " | ".join(f"{float(e):.1e}" for e in errors), "| 5e-06 |")


def adapted_output(x: np.ndarray) -> Any:
    """The output of an adapted layer after one step of NoRA+."""
    model = nnx.Linear(x.shape[1], 64, rngs=nnx.Rngs(0))
    tree = nnx.Sequential(model)
    nys.lora.apply(tree, 8, targets=".*", init="nora", key=jax.random.key(0))
    graphdef, adapters, base = nnx.split(tree, nnx.LoRAParam, ...)
    tx = nys.nora_plus(optax.sgd(1e-2))

    @jax.jit
    def step(adapters: Any, state: Any, base: Any, x: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            return jnp.mean(nnx.merge(graphdef, adapters, base, copy=True)(x) ** 2)

        updates, _ = tx.update(jax.grad(loss)(adapters), state, adapters)
        trained = optax.apply_updates(adapters, updates)
        return nnx.merge(graphdef, trained, base, copy=True)(x)

    with jax.default_matmul_precision("highest"):
        return step(adapters, tx.init(adapters), base, jnp.asarray(x))


def logits(layers: int) -> Any:
    """Logits of a small Llama with random weights."""
    config = nys.models.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
    )
    model = nys.models.Llama(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.arange(64).reshape(2, 32) % 512)
    return nnx.jit(lambda model, tokens: model(tokens))(model, tokens)


def parity(layers: int) -> None:
    """The largest difference between accelerator and CPU, over the largest entry, in eps."""
    x = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    programs: dict[str, Callable[[], Any]] = {
        "adapted layer after a step of NoRA+": functools.partial(adapted_output, x),
        f"logits of a Llama of {layers} layers": functools.partial(logits, layers),
    }
    print("| program | difference in eps | bound |\n|---|---|---|")
    for name, program in programs.items():
        here = np.asarray(program())
        with jax.default_device(jax.devices("cpu")[0]):
            there = np.asarray(program())
        gap = np.max(np.abs(here - there)) / np.max(np.abs(there)) / EPS
        print(f"| {name} | {gap:.1f} | 1000 |")


def speeds(sizes: tuple[int, ...]) -> None:
    """The time of a fused step over that of its product with A."""
    print("| m | A @ X | fused step |\n|---|---|---|")
    for m in sizes:
        spectrum = nys.spectra.paper_spectrum("fig1ab")
        a, _ = nys.spectra.psd(jax.random.key(0), m, spectrum, jnp.float32)
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
        start = nys.initializers.nystrom(jax.random.key(1), a, RANK, 0.1)
        seconds = interleaved(
            {
                "product": functools.partial(products, a, start, 50),
                "fused": functools.partial(loop, step, step.init(start), 50),
            }
        )
        each = float(np.median(seconds["product"])) / 50 * 1e3
        print(f"| {m} | {each:.3f} ms | {ratio(seconds, 'fused', 'product'):.2f} × |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Floors, parity and speeds on an accelerator.")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    quick = parser.parse_args().quick
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {device.device_kind}, float32, r = {RANK}\n")
    floors(200 if quick else 1000)
    print()
    parity(2 if quick else 8)
    print()
    speeds((200,) if quick else (1000, 4000, 16000))


if __name__ == "__main__":
    main()
