"""The gradients of LoRA: MiniLM and SmolLM2 here and in transformers and PEFT; memory of bfloat16.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --rounds 15
    python benchmarks/finetune.py --quick           # models of two layers

Both sides have the same random weights in the sizes of all-MiniLM-L6-v2 and SmolLM2-135M, float32,
and as many threads as the process may use cores. Their losses are compared before they are timed.
The floor of the forward pass is the matrix products of its layers and its head alone; one of the
forward and the backward pass is twice that, as the base is frozen. The bounds are printed beside
the numbers, and nothing is asserted.

The second table is what a step of a LLaMA of 1.1 billion parameters takes beside its arguments, as
the compiler plans it; nothing of that size is allocated. On Linux each step also pays for pages
that the system clears: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment makes these large.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
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

RANK, BOUND = 8, 1.3
Work = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """A model, its adapted layers and the tokens of a step.

    Attributes:
        config: transformers' configuration.
        model: transformers' class of the model with a head.
        targets: names of the adapted layers.
        shape: rows and tokens of a batch.
    """

    config: Any
    model: Any
    targets: tuple[str, str]
    shape: tuple[int, int]


def cases(quick: bool) -> dict[str, Case]:
    """The models by name.

    Args:
        quick: whether they have two layers and few tokens.
    """
    small: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 64} if quick else {}
    bert: dict[str, Any] = {"vocab_size": 30522, "num_hidden_layers": 6, "hidden_size": 384} | small
    llama: dict[str, Any] = {
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "hidden_size": 576,
    } | small
    encoder = transformers.BertConfig(
        **bert,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    decoder = transformers.LlamaConfig(
        **llama,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )
    rows = (2, 16) if quick else (16, 64)
    return {
        "MiniLM": Case(
            encoder, transformers.BertForSequenceClassification, ("query", "value"), rows
        ),
        "SmolLM2": Case(
            decoder,
            transformers.LlamaForCausalLM,
            ("q_proj", "v_proj"),
            (2, 16) if quick else (4, 64),
        ),
    }


def ours(model: Any, case: Case, tokens: np.ndarray) -> tuple[Work, Any, float]:
    """The work by name, the loss, and the seconds that the gradients took to compile."""
    classifies = case.model is transformers.BertForSequenceClassification
    nys.lora.apply(model, RANK, targets=f".*({'|'.join(case.targets)})", key=jax.random.key(0))
    graph, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    labels = jnp.asarray(tokens[:, 0] % 2 if classifies else tokens[:, 1:])

    def loss(adapters: Any, base: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, adapters, base, copy=True)(tokens)
        logits = logits if classifies else logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    ids = jnp.asarray(tokens)
    forward = jax.jit(loss)
    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss)).lower(adapters, base, ids).compile()
    seconds = time.perf_counter() - start
    return (
        {
            "forward": lambda: forward(adapters, base, ids),
            "both": lambda: step(adapters, base, ids),
        },
        step(adapters, base, ids)[0],
        seconds,
    )


def theirs(model: Any, case: Case, tokens: np.ndarray) -> tuple[Work, Any]:
    """The same on torch."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=list(case.targets)))
    ids = torch.tensor(tokens).long()
    labels = ids[:, 0] % 2 if case.model is transformers.BertForSequenceClassification else ids

    def loss() -> Any:
        return adapted(input_ids=ids, labels=labels).loss

    def gradients() -> Any:
        adapted.zero_grad()
        loss().backward()

    return {"forward": torch.no_grad()(loss), "both": gradients}, loss().detach()


def products(model: Any, shape: tuple[int, int]) -> tuple[Callable[[], Any], float]:
    """The products of the forward pass alone, and the GFLOP of these."""
    tokens, draw = shape[0] * shape[1], jax.random.key(0)
    kernels = [
        v[...]
        for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[-1] == "kernel" and v.ndim == 3
    ]
    sides = [kernel.shape[1:] for kernel in kernels for _ in range(kernel.shape[0])]
    if hasattr(model, "embed_tokens"):
        sides.append(model.embed_tokens.embedding.shape[::-1])
    matrices = {s: jax.random.normal(draw, s) for s in set(sides)}
    rows = {s[0]: jax.random.normal(draw, (tokens, s[0])) for s in sides}
    multiply = jax.jit(lambda x, w: x @ w)
    work = 2e-9 * tokens * sum(m * n for m, n in sides)
    return lambda: [multiply(rows[s[0]], matrices[s]) for s in sides], work


def memory(quick: bool, dtype: Any) -> tuple[float, float]:
    """MB of the arguments of a step of LoRA, and of what it takes beside them.

    Args:
        quick: whether the model is small.
        dtype: dtype of the base.
    """
    width, inner, vocabulary = (64, 192, 64) if quick else (2048, 5632, 32000)
    config = nys.models.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=22,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 512),
        head_dim=64,
    )

    def make() -> nys.models.Llama:
        numerics = nys.models.Numerics(dtype)
        model = nys.models.Llama(config, numerics=numerics, rngs=nnx.Rngs(0))
        nys.lora.apply(model, RANK, targets=".*[qv]_proj", key=jax.random.key(0))
        return model

    graph, adapters, base = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(adapters: Any, base: Any, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, adapters, base, copy=True)(tokens)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    program = jax.jit(jax.value_and_grad(loss)).lower(adapters, base, tokens).compile()
    sizes: Any = program.memory_analysis()
    return sizes.argument_size_in_bytes / 1e6, sizes.temp_size_in_bytes / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA's gradients here and in PEFT.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="models of two layers, one round")
    parser.add_argument(
        "--only", choices=["MiniLM", "SmolLM2"], help="the only model that is timed"
    )
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, {threads} threads, {rounds} rounds"
    )
    print("\n| LoRA, r = 8 on q and v, float32 | here, ms | torch, ms | times faster | bound |")
    print("|---|---|---|---|---|")
    notes: list[str] = []
    for name, case in cases(options.quick).items():
        if options.only not in (None, name):
            continue
        torch.manual_seed(0)
        peer = case.model(case.config)
        with tempfile.TemporaryDirectory() as folder:
            peer.save_pretrained(folder)
            model, _ = nys.models.load(folder)
        tokens = np.random.default_rng(0).integers(3, case.config.vocab_size, case.shape)
        floor, work = products(model, case.shape)
        mine, loss, seconds = ours(model, case, tokens.astype(np.int32))
        other, expected = theirs(peer, case, tokens)
        if abs(float(loss) - float(expected)) > 1e-4:
            raise SystemExit(f"{name}: the loss is {loss} here and {expected} in torch")
        functions = {"floor": floor}
        functions |= {f"{part}, here": mine[part] for part in mine}
        functions |= {f"{part}, torch": other[part] for part in other}
        times = interleaved(functions, rounds, warm=True)  # torch's threads spin on
        size = f"{name}, {case.shape[0]} × {case.shape[1]}"
        for part, title, bound in (
            ("forward", "forward", ""),
            ("both", "forward + backward", f"≥ {BOUND}"),
        ):
            here, there = (1e3 * np.median(times[f"{part}, {side}"]) for side in ("here", "torch"))
            factor = ratio(times, f"{part}, torch", f"{part}, here")
            print(f"| {size}: {title} | {here:.0f} | {there:.0f} | {factor:.2f} | {bound} |")
        part = ratio(times, "both, here", "floor")
        floor_ms = 1e3 * np.median(times["floor"])
        notes.append(
            f"{name}: the products of the forward pass alone take {floor_ms:.0f} ms "
            f"({work / floor_ms * 1e3:.0f} GFLOP/s); both passes take {part:.2f} times as long "
            f"(2 if nothing else took time). The step compiled in {seconds:.1f} s."
        )
    print("", *notes, sep="\n")
    print("\n| LLaMA, 22 layers, 1 × 64 tokens | base and adapters, MB | beside them, MB |")
    print("|---|---|---|")
    for dtype in (jnp.bfloat16, jnp.float32):
        held, taken = memory(options.quick, dtype)
        print(f"| {jnp.dtype(dtype)} | {held:.1f} | {taken:.1f} |", flush=True)


if __name__ == "__main__":
    main()
