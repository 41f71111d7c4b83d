"""The memory per device of fine-tuning real models with adapters, computed without running it.

    python experiments/fits.py                     # figures/fits.csv, .md, .json
    python experiments/fits.py --quick --out /tmp  # only OPT-125M

A training step (bfloat16 base, layers recomputed in the backward pass, float32 adapters with
AdamW) is traced at the published sizes, split over a mesh of virtual CPU devices and compiled;
no array of the model's size is made. The sizes of arguments are exact. Temporaries are those of
XLA's CPU compiler, which multiplies bfloat16 in float32 and therefore needs float32 copies of one
layer and of its activations: more than a compiler for accelerators needs. `start` has the
temporaries of NoRA's W_0Ω for one layer of the largest kernel. The U-Net of Stable Diffusion 1 is
compiled for one image on one device. The table is `figures/fits.md`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = 8
# Set before jax is imported: the number of devices is a setting of the process.
_COUNT = f"--xla_force_host_platform_device_count={DEVICES}"
# Otherwise float32 copies of all layers are made before the loop over layers: 3.2 GB more on each
# of eight devices for LLaMA-7B.
_MOTION = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), _COUNT, f"--xla_disable_hlo_passes={_MOTION}"]
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402
from tqdm import tqdm  # noqa: E402

import nyscaled as nys  # noqa: E402
from experiments.lib.config import command_line  # noqa: E402
from experiments.lib.files import write_atomically  # noqa: E402
from experiments.lib.record import save_record  # noqa: E402
from experiments.lib.unet_step import CONFIG, RANK, compile_unet_step  # noqa: E402

GB = 1e9
SIZES = (16, 24, 40, 80)  # of devices, GB
BATCH, LENGTH = 16, 256
# Sizes of each family's config.json on the hub. LLaMA2-7B is LLaMA-7B with longer positions, which
# take no parameters.
LLAMA = nys.models.LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
)
OPT = nys.models.OptConfig(
    vocab_size=50272,
    hidden_size=2048,
    ffn_dim=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    word_embed_proj_dim=2048,
)
GEMMA = nys.models.GemmaConfig(
    vocab_size=256000,
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
)
MODELS: dict[str, tuple[Any, Any]] = {
    "OPT-1.3B": (nys.models.Opt, OPT),
    "LLaMA-7B": (nys.models.Llama, LLAMA),
    "LLaMA2-7B": (
        nys.models.Llama,
        dataclasses.replace(LLAMA, max_position_embeddings=4096, rms_norm_eps=1e-5),
    ),
    "Gemma-7B": (nys.models.Gemma, GEMMA),
}
SMALL = {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
QUICK = {
    "OPT-125M": (nys.models.Opt, dataclasses.replace(OPT, **SMALL, word_embed_proj_dim=768)),
}
MESHES = ({"fsdp": 1}, {"fsdp": 4}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2})
LINEAR = "layers.*(_proj|fc[12])"
ADAPTERS = ((8, "q, v", r"layers.*[qv]_proj"), (32, "all linear", LINEAR))
UNET = "Stable Diffusion 1"
UNETS = tuple((dtype, remat) for dtype in (jnp.float32, jnp.bfloat16) for remat in (False, True))


@dataclasses.dataclass(frozen=True)
class Config:
    """Memory of a training step by model, adapter and mesh; no random numbers, so no seed."""

    out: Path = Path("figures")
    """Folder for the table and its record."""
    quick: bool = False
    """Compile only OPT-125M, with one kind of adapter on one mesh."""


class Row(NamedTuple):
    """One program, with bytes per device."""

    model: str
    parameters: int
    rank: int
    targets: str
    mesh: str
    dtype: str
    remat: bool
    base: int
    adapters: int
    optimizer: int
    temporaries: int
    start: int

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.base + self.adapters + self.optimizer + self.temporaries


def count(make: Any, config: Any) -> int:
    """Return the number of parameters."""
    model = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model)))


def abstract(make: Any, config: Any, rank: int, targets: str) -> tuple[Any, Any, Any]:
    """Return the structure, the adapters and the base of the adapted model, without values.

    Args:
        make: the class of the model.
        config: its sizes.
        rank: of the adapters.
        targets: the names of adapted layers, a regular expression.
    """

    def build() -> Any:
        numerics = nys.models.Numerics(jnp.bfloat16, remat=True)
        model = make(config, numerics=numerics, rngs=nnx.Rngs(0))
        nys.lora.apply(model, rank, targets=targets, key=jax.random.key(0))
        return model

    graphdef, adapters, base = nnx.split(nnx.eval_shape(build), nnx.LoRAParam, ...)
    return graphdef, adapters, base


def placed(tree: Any, layout: Any) -> Any:
    """Return abstract values with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout
    )


def beside_kernels(adapters: Any, base: Any) -> Any:
    """Return the layout that `nys.lora.apply` gives: a has the kernel's rows, b its columns."""
    kernels = dict(nnx.to_flat_state(base))
    flat = []
    for path, factor in nnx.to_flat_state(adapters):
        sharding = kernels[(*path[:-3], "kernel")].get_value()
        *stack, rows, columns = sharding.spec
        spec = (*stack, rows, None) if path[-1] == "lora_a" else (*stack, None, columns)
        place = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        flat.append((path, factor.replace(place)))
    return nnx.from_flat_state(flat)


def bytes_of(tree: Any) -> int:
    """Return the bytes per device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def compile_step(
    graphdef: Any, params: Any, others: Any, base: Any, mesh: Mesh
) -> tuple[Any, tuple[Any, ...]]:
    """Return the compiled training step and its arguments.

    Args:
        graphdef: the structure of the model.
        params: the adapters.
        others: the other values of the model.
        base: the shardings of the other values.
        mesh: the devices.
    """
    tx = optax.adamw(1e-4)
    whole = NamedSharding(mesh, PartitionSpec())
    factors = beside_kernels(params, base)
    moments = optax.tree_map_params(
        tx, lambda _, s: s, jax.eval_shape(tx.init, params), factors,
        transform_non_params=lambda _: whole,
    )  # fmt: skip
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct((BATCH, LENGTH), bool, sharding=rows)
    arguments = (
        placed(params, factors),
        placed(jax.eval_shape(tx.init, params), moments),
        placed(others, base),
    )

    def step(params: Any, state: Any, others: Any, tokens: Any, mask: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = nnx.merge(graphdef, params, others, copy=True)(tokens, mask)[:, :-1]
            wide = logits.astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(wide, tokens[:, 1:])
            return jnp.mean(losses, where=mask[:, 1:])

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(factors, moments, whole))
    return jitted.lower(*arguments, tokens, mask).compile(), arguments


def compile_start(base: Any, rank: int, index: Any) -> Any:
    """Compile NoRA's start of one layer of the largest kernel, as `nys.lora.apply` computes it.

    Args:
        base: the values of the model without adapters.
        rank: of the adapters.
        index: the place of a layer in a stack, or () where layers are not stacked.
    """
    axes = 2 if index == () else 3
    kernel = max((x for x in jax.tree.leaves(base) if x.ndim == axes), key=lambda x: x.size)

    def start(key: Any, kernel: Any, index: Any) -> Any:
        return nys.lora.KERNEL_INITS["nora"](key, kernel[index], rank, 1.0).a

    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(start).lower(key, kernel, index).compile()


def measure(name: str, make: Any, config: Any, adapter: Any, axes: dict[str, int]) -> Row:
    """Compile one program and return its memory.

    Args:
        name: of the model.
        make: the class of the model.
        config: its sizes.
        adapter: rank, description and names of adapted layers.
        axes: the axes of the mesh with their sizes.
    """
    rank, description, targets = adapter
    sizes, names = tuple(axes.values()), tuple(axes)
    devices = jax.devices()[: math.prod(sizes)]
    mesh = Mesh(np.array(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(axes))
    graphdef, params, others = abstract(make, config, rank, targets)
    layout = nys.models.shardings(others, mesh, family=make.family)
    with jax.set_mesh(mesh):
        compiled, (adapters, state, base) = compile_step(graphdef, params, others, layout, mesh)
    memory = compiled.memory_analysis()
    trees = {"base": base, "adapters": adapters, "optimizer": state}
    sizes_of = {key: bytes_of(tree) for key, tree in trees.items()}
    tokens = 5 * BATCH * LENGTH // mesh.shape["fsdp"]
    # A step does not read the keys of adapters, and XLA drops unused arguments.
    missing = sum(sizes_of.values()) + tokens - memory.argument_size_in_bytes
    assert 0 <= missing < 1e6, missing
    return Row(
        name,
        count(make, config),
        rank,
        description,
        " × ".join(f"{k} {v}" for k, v in axes.items()),
        "bfloat16",
        True,
        **sizes_of,
        temporaries=temporaries_of(compiled),
        start=temporaries_of(compile_start(base, rank, jax.ShapeDtypeStruct((), jnp.int32))),
    )


def measure_unet(dtype: Any, remat: bool) -> Row:
    """Return the memory of the U-Net's step with a base of this dtype, recomputed or not."""
    compiled, (base, params, state) = compile_unet_step(dtype, remat)
    base_bytes, adapters, optimizer = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in (base, params, state)
    )
    return Row(
        *(UNET, count(nys.diffusion.UNet, CONFIG), RANK, "attention", "one device"),
        jnp.dtype(dtype).name, remat, base_bytes, adapters, optimizer, temporaries_of(compiled),
        start=temporaries_of(compile_start(base, RANK, ())),
    )  # fmt: skip


def temporaries_of(compiled: Any) -> int:
    """Return the bytes per device that a program takes beside its arguments."""
    return compiled.memory_analysis().temp_size_in_bytes


def table(rows: list[Row]) -> str:
    """Return the table as Markdown, in GB."""
    bytes_columns = ["base", "adapters + AdamW", "temporaries", "total"]
    names = ["model", "adapters", "mesh", "base in", "recomputed"]
    lines = [[*names, *bytes_columns, "fits in"], ["---"] * 5 + ["---:"] * 5]
    for row in rows:
        tuned = row.adapters + row.optimizer
        numbers = (f"{x / GB:.2f}" for x in (row.base, tuned, row.temporaries, row.total))
        fits = next((f"{size} GB" for size in SIZES if row.total <= size * GB), "–")
        tuning = f"r = {row.rank}, {row.targets}"
        recomputed = "yes" if row.remat else "no"
        lines.append([row.model, tuning, row.mesh, row.dtype, recomputed, *numbers, fits])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(config: Config) -> None:
    """Compile each program and write the table."""
    models, adapters, meshes = MODELS, ADAPTERS, MESHES
    if config.quick:
        models, adapters, meshes = QUICK, ADAPTERS[:1], MESHES[3:]
    programs = [
        (name, make, sizes, adapter, mesh)
        for name, (make, sizes) in models.items()
        if name != "LLaMA2-7B"  # the same program as LLaMA-7B's
        for adapter in adapters
        for mesh in meshes
    ]
    rows = [measure(*p) for p in tqdm(programs, desc="fits", unit="program", file=sys.stderr)]
    rows += [measure_unet(*p) for p in (() if config.quick else UNETS)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Row._fields, "total"])
    writer.writerows([*row, row.total] for row in rows)
    write_atomically(config.out / "fits.csv", text.getvalue().encode())
    write_atomically(config.out / "fits.md", table(rows).encode())
    counts = {name: count(*model) for name, model in MODELS.items()}
    counts[UNET] = count(nys.diffusion.UNet, CONFIG)
    unets = [row for row in rows if row.model == UNET]
    totals = {f"{r.dtype}, {('kept', 'recomputed')[r.remat]}": r.total / GB for r in unets}
    notes = {"batch": BATCH, "length": LENGTH, "totals of the U-Net": totals}
    save_record(config.out, "fits", config, parameters=counts, devices=DEVICES, **notes)
    print(table(rows), end="")


if __name__ == "__main__":
    command_line(main, Config)
