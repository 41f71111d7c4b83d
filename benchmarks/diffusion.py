"""Stable Diffusion's U-Net here and in diffusers: predictions, a step of LoRA, images, compilation.

    python benchmarks/diffusion.py              # needs the extra `peers`; minutes
    python benchmarks/diffusion.py --rounds 15
    python benchmarks/diffusion.py --quick      # the tiny U-Net only, and three steps of DDIM
    python benchmarks/diffusion.py --one-core   # processor time, for a machine that is not idle

The tiny U-Net has two levels, of 32 and 64 channels; "quarter" is that of Stable Diffusion 1 with a
quarter of the channels, for images of half the side.

Both sides have the same random weights, float32, and as many threads as the process may use cores.
What they compute is compared before it is timed: predictions, the loss and the norm of its
gradients, latents. The images' 50 steps of DDIM have a text and no text as one batch of two; here
they are one program, and in torch a loop over diffusers' scheduler. The bounds are printed beside
the numbers, and nothing is asserted.

At the end the U-Net of Stable Diffusion 1 in its real size is compiled ahead of time. It is not
run, and nothing of its size is allocated.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--one-core" in sys.argv:  # before JAX makes its threads
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from timing import interleaved, ratio

import nyscaled as nys

try:
    import diffusers
    import peft
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(
        f"this benchmark compares with diffusers and PEFT and needs {error.name}: "
        "pip install torch diffusers peft transformers"
    ) from None

library: Any = diffusers
RANK, RATE, TEXT, GUIDANCE = 4, 1e-4, 77, 7.5
TARGETS = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
KEY = jax.random.key(0)
TINY: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "sample_size": 32,
}
# Stable Diffusion 1 with a quarter of the channels, at half of the side.
QUARTER: dict[str, Any] = {
    "block_out_channels": (80, 160, 320, 320),
    "cross_attention_dim": 768,
    "norm_num_groups": 16,
    "sample_size": 32,
}
FULL: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
Work = dict[str, Callable[[], Any]]
Timed = Callable[[Callable[[], Any], Callable[[], Any], int], Any]


class Inputs(NamedTuple):
    """What a U-Net reads, channels last, and the noise that it is to predict.

    Attributes:
        latents: noisy latents of one image.
        noise: noise in them, and where images begin.
        time: time of the latents.
        context: rows of no text and of a text.
    """

    latents: np.ndarray
    noise: np.ndarray
    time: np.ndarray
    context: np.ndarray

    @classmethod
    def of(cls, sizes: dict[str, Any]) -> Inputs:
        """Random inputs for a U-Net of these sizes."""
        draw, side = np.random.default_rng(0), sizes["sample_size"]
        latents, noise = draw.standard_normal((2, 1, side, side, 4), np.float32)
        context = draw.standard_normal((2, TEXT, sizes["cross_attention_dim"]), np.float32)
        return cls(latents, noise, np.array([500], np.int32), context)


def first(x: np.ndarray) -> Any:
    """Channels second, as torch has them."""
    return torch.tensor(x).permute(0, 3, 1, 2).contiguous()


def last(x: Any) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def of_unet(unet: Any, inputs: Inputs, steps: int) -> Work:
    """A prediction and images, here."""
    graph, base = nnx.split(unet)
    schedule = nys.diffusion.Schedule()

    @jax.jit
    def forward(base: Any, latents: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        return nnx.merge(graph, base)(latents, time, context)

    @jax.jit
    def images(base: Any, noise: jax.Array, context: jax.Array) -> jax.Array:
        model = nnx.merge(graph, base)

        def predict(x: jax.Array, time: jax.Array) -> jax.Array:
            without, prompted = jnp.split(model(jnp.concatenate([x, x]), time, context), 2)
            return without + GUIDANCE * (prompted - without)

        return nys.diffusion.sample(predict, schedule, noise, steps=steps, sampler="ddim")

    latents, noise, time, context = map(jnp.asarray, inputs)
    return {
        "prediction": lambda: forward(base, latents, time, context[1:]),
        "images": lambda: images(base, noise, context),
    }


def of_peer(peer: Any, inputs: Inputs, steps: int) -> Work:
    """The same on torch."""
    latents, noise = first(inputs.latents), first(inputs.noise)
    time, context = torch.tensor(inputs.time), torch.tensor(inputs.context)
    scheduler = library.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

    @torch.inference_mode()
    def forward() -> Any:
        return peer(latents, time, context[1:]).sample

    @torch.inference_mode()
    def images() -> Any:
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            without, prompted = peer(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(without + GUIDANCE * (prompted - without), t, x).prev_sample
        return x

    return {"prediction": forward, "images": images}


def step_of_unet(unet: Any, inputs: Inputs) -> tuple[Callable[[], Any], tuple[float, float]]:
    """A step of LoRA here, and the loss and the norm of its gradients."""
    graph, adapters, base = nnx.split(unet, nnx.LoRAParam, ...)
    tx = optax.adamw(RATE)
    latents, noise, time, context = map(jnp.asarray, inputs)

    def loss(adapters: Any, base: Any) -> jax.Array:
        model = nnx.merge(graph, adapters, base, copy=True)
        return jnp.mean((model(latents, time, context[1:]) - noise) ** 2)

    @jax.jit
    def step(adapters: Any, state: Any, base: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(adapters, base)
        updates, state = tx.update(grads, state, adapters)
        size = optax.tree.norm(grads)
        return optax.apply_updates(adapters, updates), state, (value, size)

    state = tx.init(adapters)
    value, size = step(adapters, state, base)[2]
    return lambda: step(adapters, state, base), (float(value), float(size))


def step_of_peer(
    peer: Any, folder: Path, inputs: Inputs
) -> tuple[Callable[[], Any], tuple[float, float]]:
    """The same on torch, with the adapters of a folder."""
    peer.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trained = [p for p in peer.parameters() if p.requires_grad]
    latents, noise = first(inputs.latents), first(inputs.noise)
    time, context = torch.tensor(inputs.time), torch.tensor(inputs.context[1:])
    optimizer: Any = torch.optim.AdamW(trained, RATE, weight_decay=1e-4)

    def gradients() -> Any:
        optimizer.zero_grad()
        loss = torch.mean((peer(latents, time, context).sample - noise) ** 2)
        loss.backward()
        return loss

    def step() -> None:
        gradients()
        optimizer.step()

    loss = float(gradients().detach())
    size = sum(float(p.grad.square().sum()) for p in trained) ** 0.5
    return step, (loss, size)


def with_adapters(unet: Any, folder: Path) -> None:
    """Put adapters into a U-Net, of which no factor is zero, and write them."""
    layers = nys.lora.apply(unet, RANK, targets=TARGETS, init="lora", key=KEY)
    for i, layer in enumerate(layers.values()):
        factor = layer.adapters["default"].lora_b
        factor[...] = 0.01 * jax.random.normal(jax.random.key(i), factor.shape)
    nys.lora.save_diffusers(unet, folder)


def agree(what: str, here: Any, there: Any) -> None:
    """End unless two arrays are equal up to a thousandth of the largest entry."""
    here, there = np.asarray(here), np.asarray(there)
    if not np.abs(here - there).max() <= 1e-3 * np.abs(there).max():
        raise SystemExit(f"{what}: {here.ravel()[:3]} … here, {there.ravel()[:3]} … in torch")


def compare(name: str, sizes: dict[str, Any], steps: int, rounds: int, timed: Timed) -> None:
    """Print the rows of a U-Net."""
    torch.manual_seed(0)
    peer = library.UNet2DConditionModel(**sizes).eval()
    inputs = Inputs.of(sizes)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        peer.save_pretrained(folder / "unet")
        unet = nys.diffusion.load_unet(folder)
        here, there = of_unet(unet, inputs, steps), of_peer(peer, inputs, steps)
        for work in here:
            agree(f"{name}, {work}", here[work](), last(there[work]()))
        # A round of images takes as long as many rounds of the others.
        counts = {"prediction": rounds, "images": max(1, rounds // 3)}
        times = {work: timed(here[work], there[work], counts[work]) for work in counts}
        with_adapters(unet, folder)
        here["step"], measured = step_of_unet(unet, inputs)
        there["step"], expected = step_of_peer(peer, folder, inputs)
        agree(f"{name}, loss and gradients", measured, expected)
        times["step"] = timed(here["step"], there["step"], rounds)
    for work, title, bound in (
        ("prediction", "prediction", 1.3),
        ("step", f"step of LoRA, r = {RANK}", 1.3),
        ("images", f"{steps} steps of DDIM, guided", 1.5),
    ):
        ours, theirs = (1e3 * np.median(times[work][side]) for side in ("here", "torch"))
        factor = ratio(times[work], "torch", "here")
        print(
            f"| {name}: {title} | {ours:.1f} | {theirs:.1f} | {factor:.2f} | ≥ {bound} |",
            flush=True,
        )


def wall_time(here: Callable[[], Any], there: Callable[[], Any], rounds: int) -> Any:
    # torch's threads spin on.
    return interleaved({"here": here, "torch": there}, rounds, warm=True)


def processor_time(here: Callable[[], Any], there: Callable[[], Any], rounds: int) -> Any:
    return interleaved({"here": here, "torch": there}, rounds, clock=time.process_time)


def compilation(name: str, sizes: dict[str, Any]) -> None:
    """Print how long a prediction takes to trace and to compile.

    Args:
        name: name of the U-Net.
        sizes: its sizes.
    """
    config = nys.diffusion.UNetConfig(**sizes)
    start = time.perf_counter()
    unet = nnx.eval_shape(lambda: nys.diffusion.UNet(config, rngs=nnx.Rngs(0)))
    graph, base = nnx.split(unet)
    side, width = sizes["sample_size"], sizes["cross_attention_dim"]

    @jax.jit
    def forward(base: Any, latents: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        return nnx.merge(graph, base)(latents, time, context)

    shapes = (jax.ShapeDtypeStruct((2, *s), jnp.float32) for s in ((side, side, 4), (TEXT, width)))
    latents, context = shapes
    made = time.perf_counter()
    lowered = forward.lower(base, latents, jax.ShapeDtypeStruct((2,), jnp.int32), context)
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
    parameters = sum(x.size for x in jax.tree.leaves(base))
    seconds = (made - start, traced - made, compiled - traced)
    print(
        f"| {name} | {parameters:,} | {' | '.join(f'{s:.1f}' for s in seconds)} | "
        f"{sum(seconds):.1f} | ≤ 60 |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Stable Diffusion's U-Net here and in diffusers.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the tiny U-Net, one round")
    parts = ("tiny", "quarter", "compilation")
    parser.add_argument("--only", choices=parts, help="one U-Net, or the compilation")
    parser.add_argument("--one-core", action="store_true", help="processor time on one core")
    options = parser.parse_args()
    rounds, steps = (1, 3) if options.quick else (options.rounds, 50)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    jax.config.update("jax_enable_compilation_cache", False)
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"peft {peft.__version__}, {threads} threads, {rounds} rounds, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    sizes = {"tiny": TINY} if options.quick else {"tiny": TINY, "quarter": QUARTER}
    if options.only != "compilation":
        print("\n| U-Net, float32, one image | here, ms | torch, ms | times faster | bound |")
        print("|---|---|---|---|---|")
        for name, own in sizes.items():
            if options.only in (None, name):
                compare(name, own, steps, rounds, processor_time if options.one_core else wall_time)
    if options.only in (None, "compilation"):
        print("\n| U-Net | parameters | made, s | traced, s | compiled, s | together, s | bound |")
        print("|---|---|---|---|---|---|---|")
        compilation(*(("tiny", TINY) if options.quick else ("SD 1", FULL)))


if __name__ == "__main__":
    main()
