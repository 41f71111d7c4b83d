"""The small model that subjects are taught to: a U-Net of Stable Diffusion's modules, and a text.

It is trained from its random start, on images of known subjects with prompts that name them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nyscaled as nys
from experiments.lib.files import read_arrays, write_arrays, write_atomically
from experiments.lib.subject_images import CENTRE, CROPS, Latents, Subjects, chosen
from nyscaled.diffusion import Schedule, TextEncoder, TextEncoderConfig, UNet, UNetConfig

WORDS = ("", "<start>", "<end>", "a", "photo", "of", "person", "digit", "sks")
LENGTH, VOCABULARY = 8, 64
NEW = "sks"
"""Word for a subject that the base does not know."""
EMPTY = 0.1
"""Share of the prompts that are left out in the training of the base, for guidance."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the base is made.

    Attributes:
        widths: channels of the U-Net at its two levels.
        steps: steps of its training.
        batch_size: images in a step.
        learning_rate: largest learning rate.
        seed: seed of its start and training.
    """

    widths: tuple[int, int] = (32, 64)
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


class Base(NamedTuple):
    """A base, and what is known of it.

    Attributes:
        unet: the U-Net.
        text: the text encoder.
        record: how it was made, and its losses.
    """

    unet: UNet
    text: TextEncoder
    record: dict[str, Any]

    def context(self, prompt: str) -> jax.Array:
        """Return what the U-Net reads of a prompt, (1, length, features)."""
        return _encoded(self.text, jnp.asarray(tokens([prompt])))


def prompt_of(kind: str, name: str) -> str:
    """Return the prompt for a subject.

    Args:
        kind: what subjects are.
        name: number of a known subject, or the new word.
    """
    return f"a photo of {kind} {name}"


def tokens(prompts: list[str]) -> np.ndarray:
    """Return rows of tokens: a known word each, numbers after them."""
    rows = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [len(WORDS) + int(w) if w.isdecimal() else WORDS.index(w) for w in prompt.split()]
        row[: len(ids) + 2] = [WORDS.index("<start>"), *ids, WORDS.index("<end>")]
    return rows


def random_models(setting: Setting) -> tuple[UNet, TextEncoder]:
    """Return the models with their random starts.

    Args:
        setting: sizes and seed.
    """
    rngs = nnx.Rngs(setting.seed)
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    sizes = UNetConfig(
        sample_size=16,
        block_out_channels=setting.widths,
        down_block_types=(down, down),
        up_block_types=(up, up),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    text = TextEncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return UNet(sizes, rngs=rngs), TextEncoder(text, rngs=rngs)


def base_of(subjects: Subjects, setting: Setting, folder: Path) -> Base:
    """Return the base of a folder, which is trained and written if it is not there.

    Args:
        subjects: the images.
        setting: how it is made.
        folder: its folder.
    """
    unet, text = random_models(setting)
    path = folder / "base.json"
    made = json.loads(json.dumps(dataclasses.asdict(setting)))
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["setting"] != made:
            raise ValueError(f"{path} is of {record['setting']}; expected {made} (another --base)")
        graphdef, state = nnx.split((unet, text))
        unet, text = nnx.merge(graphdef, read_arrays(folder / "weights.npz", state))
        return Base(unet, text, record)
    record = {"setting": made, **_train(unet, text, subjects, setting)}
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / "weights.npz", jax.tree.leaves(nnx.state((unet, text))))
    nys.diffusion.save(unet, folder / "unet")
    write_atomically(path, json.dumps(record).encode())
    return Base(unet, text, record)


def _train(
    unet: UNet, text: TextEncoder, subjects: Subjects, setting: Setting
) -> dict[str, list[float]]:
    """Train both models in place; they keep the average with the lowest loss on other subjects."""
    latents = Latents.of(subjects)
    images, names = [], []
    for number in subjects.split.known:
        own = subjects.images[number]
        copies = [own, own[..., ::-1]] if subjects.mirrored else [own]
        images += [latents.crops(copy) for copy in copies]
        names += [prompt_of(subjects.kind, str(number))] * sum(map(len, copies))
    data, rows = jnp.asarray(np.concatenate(images)), jnp.asarray(tokens(names))
    others = [chosen(subjects, s, 0, 5)[0] for s in subjects.split.tuning]
    held = jnp.asarray(latents.crops(np.concatenate(others))[:, CENTRE])
    graphdef, params = nnx.split((unet, text))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, setting.learning_rate, min(200, setting.steps // 2), setting.steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))
    state, average = tx.init(params), jax.tree.map(jnp.copy, params)
    empty, key = jnp.asarray(tokens([""])[0]), jax.random.key(setting.seed)
    schedule = Schedule()

    def loss(params: Any, latents: Any, rows: Any, noise: Any, times: Any) -> Any:
        unet, text = nnx.merge(graphdef, params)
        return nys.diffusion.denoising_loss(unet, schedule, latents, text(rows), noise, times)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, average: Any, number: Any, data: Any, rows: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, number), 5)
        size = (setting.batch_size,)
        which = jax.random.randint(keys[0], size, 0, len(data))
        x = data[which, jax.random.randint(keys[1], size, 0, CROPS)]
        left_out = jax.random.uniform(keys[2], (*size, 1)) < EMPTY
        prompts = jnp.where(left_out, empty, rows[which])
        noise = jax.random.normal(keys[3], x.shape)
        times = jax.random.randint(keys[4], size, 0, schedule.num_train_timesteps)
        value, gradient = jax.value_and_grad(loss)(params, x, prompts, noise, times)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.999, (1 + number) / (10 + number))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return params, state, average, value

    @jax.jit
    def held_out(params: Any) -> Any:
        times = jnp.tile(jnp.arange(10, schedule.num_train_timesteps, 50), (len(held), 1))
        repeated = jnp.repeat(held, times.shape[1], 0)
        noise = jax.random.normal(jax.random.key(setting.seed + 1), repeated.shape)
        prompts = jnp.tile(empty, (len(repeated), 1))
        return loss(params, repeated, prompts, noise, times.ravel())

    losses, validation, best = [], [], (np.inf, params)
    every, began = max(1, setting.steps // 12), time.monotonic()
    for number in range(setting.steps):
        params, state, average, value = step(params, state, average, number, data, rows)
        losses.append(value)
        if (number + 1) % every == 0 or number + 1 == setting.steps:
            value = float(held_out(average))
            validation.append(value)
            if value < best[0]:
                best = value, jax.tree.map(jnp.copy, average)
            seen = np.mean(jax.device_get(losses[-every:]))
            print(
                f"base, step {number + 1}: loss {seen:.4f}, on other subjects {value:.4f}, "
                f"{time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    nnx.update((unet, text), best[1])
    blocks = np.array_split(np.asarray(jax.device_get(losses), float), len(validation))
    return {"loss": [float(b.mean()) for b in blocks], "on_other_subjects": validation}


@nnx.jit
def _encoded(text: TextEncoder, rows: jax.Array) -> jax.Array:
    return text(rows)
