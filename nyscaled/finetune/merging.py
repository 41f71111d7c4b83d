"""A base and an adapter as one model's folder, merged from file to file, tensor by tensor."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nyscaled.checkpoints import peft
from nyscaled.checkpoints.peft import Saved, Update
from nyscaled.checkpoints.source import WeightSource
from nyscaled.finetune import described, identity, inputs
from nyscaled.finetune.saving import PREFIX
from nyscaled.lora.recipe import scaling_of
from nyscaled.models import loading
from nyscaled.models.family import LanguageModel
from nyscaled.models.names import places
from nyscaled.models.opening import open_weights

BLOCK = 2**24
"""Most entries of an update that are in memory at one time."""
TIED = "embed_tokens", "lm_head"
INSTEAD = "nys.lora.merge, nys.lora.remove and nys.models.save"


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        folder: the folder.
        tensors: number of tensors.
        merged: number of those that an update was added to.
        replaced: number of those that the adapter's folder holds whole, such as a head.
    """

    folder: Path
    tensors: int
    merged: int
    replaced: int


def export(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
) -> Exported:
    """Write a base with a merged adapter as a folder that transformers and `nys.models.load` read.

    Tensors are read, changed and written one by one, each in the dtype that it has in the base, and
    new ones in the dtype that holds those of all others. Files of weights are as large as the
    largest tensor, or smaller, so that memory holds no more than a few of that. The folder gets the
    base's configuration and tokenizer, and the task of the adapter.

    Args:
        model: the base: a folder, a GGUF file or a hub id.
        adapter: folder of the adapter, in PEFT's format.
        out: the folder to write; new or empty.

    Raises:
        ValueError: on an adapter of another base, a prefix, an adapter that changes single tokens
            or a head that is the embedding, values that are too large for their dtype, and a folder
            with files in it.
        OSError: if a file cannot be written.

    Examples:
        >>> import tempfile, nyscaled as nys
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> model = Llama(LlamaConfig(**sizes, **heads), rngs=nnx.Rngs(0))
        >>> folder = Path(tempfile.mkdtemp())
        >>> nys.models.save(model, folder / "base")
        >>> layers = nys.lora.apply(model, 2, targets=".*q_proj", key=jax.random.key(0))
        >>> nys.lora.save_peft(model, folder / "adapter", base_model="base")
        >>> export(folder / "base", folder / "adapter", folder / "merged")[1:]
        (21, 2, 0)
    """
    adapter, out = Path(adapter), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; expected a new folder, or an empty one")
    identity.require_adapter(adapter)
    if (adapter / PREFIX).exists():
        raise ValueError(
            f"{adapter} has a prefix, which is added to no tensor of a base; expected an adapter "
            "in PEFT's format"
        )
    identity.require_base(adapter, model)
    saved = peft.read(adapter)
    source, outline, tokenizer, names = open_weights(model)
    _require_plain(adapter, outline, saved)
    final = _with_head(adapter, outline, saved)
    family = final.family
    # Of an encoder that gets a head, only the root of the names is new.
    own = {name if outline.family.head else family.root + name: names[name] for name in names}
    table = places(nnx.state(final), family)
    wanted = {name: place.shape for place in table.values() for name in place.names}
    _require_match(adapter, saved, wanted)
    missing = sorted(wanted.keys() - own.keys() - saved.whole.keys())
    if missing:
        raise ValueError(
            f"{adapter} has no {', '.join(missing[:4])}; expected a head with all of it"
        )
    dtypes = {name: next(source.blocks(own[name], 1))[1].dtype for name in own if name in wanted}
    dtype = np.dtype(functools.reduce(jnp.promote_types, dtypes.values()))
    dtypes = {name: dtypes.get(name, dtype) for name in wanted}
    largest = max(int(np.prod(shape)) for shape in wanted.values()) * dtype.itemsize
    loading.write_tensors(
        final, out, _merged(source, own, dtypes, saved), dtype.name, tokenizer,
        max_shard_size=largest,
    )  # fmt: skip
    if (adapter / described.FILE).exists():
        shutil.copyfile(adapter / described.FILE, out / described.FILE)
    return Exported(out, len(wanted), len(saved.updates), len(wanted.keys() & saved.whole.keys()))


def _require_plain(adapter: Path, outline: LanguageModel, saved: Saved) -> None:
    """Refuse what a change of single tensors does not say."""
    if saved.tokens:
        raise ValueError(
            f"{adapter} has rows of single tokens; expected nys.lora.load_peft, {INSTEAD}"
        )
    modules = {*saved.updates, *(name.rpartition(".")[0] for name in saved.whole)}
    changed = sorted(m for m in modules if m.rpartition(".")[2] in TIED)
    if changed and getattr(outline.config, "tie_word_embeddings", False):
        raise ValueError(
            f"{adapter} changes {', '.join(changed)}, and the head of the model is its embedding; "
            f"expected nys.lora.load_peft, model.untie(), {INSTEAD}"
        )


def _with_head(adapter: Path, outline: LanguageModel, saved: Saved) -> LanguageModel:
    """The model, with the head of an adapter if that brings one for an encoder."""
    if not inputs.is_encoder(outline) or "classifier.weight" not in saved.whole:
        return outline
    task, count = described.read(adapter), len(saved.whole["classifier.weight"])
    classes = tuple(task["classes"]) if task else tuple(f"LABEL_{i}" for i in range(count))
    return nnx.eval_shape(lambda model: inputs.with_head(model, classes, 0)[0], outline)


def _require_match(adapter: Path, saved: Saved, shapes: dict[str, tuple[int, ...]]) -> None:
    """Require that the adapter's tensors have their places, and the targeted layers theirs."""
    modules = {f"{module}.weight" for module in saved.updates}
    if strangers := sorted((modules | saved.whole.keys()) - shapes.keys()):
        raise ValueError(
            f"{adapter} has tensors of {', '.join(strangers[:4])}, which the model does not have; "
            "expected an adapter of this base"
        )
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        whole = saved.whole.get(name)
        if whole is not None and whole.shape != shape:
            raise ValueError(f"{adapter} has {name} of shape {whole.shape}; expected {shape}")
        if len(shape) == 2 and saved.rules.is_targeted(module) and name not in modules:
            raise ValueError(f"{adapter} has no tensors of {module}, a target of it")


def _merged(
    source: WeightSource,
    names: dict[str, str],
    dtypes: dict[str, np.dtype],
    saved: Saved,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of the model with the adapter."""
    for name, dtype in dtypes.items():
        if name in saved.whole:
            with np.errstate(over="ignore"):
                value = saved.whole[name].astype(dtype)
            _finite(f"{name} of the adapter", value)
        else:
            value = source.read(names[name])
        # PEFT saves the weight of a targeted head or embedding beside its factors.
        update = saved.updates.get(name.removesuffix(".weight"))
        yield name, value if update is None else _with_update(name, value, update, saved)


def _with_update(name: str, value: np.ndarray, update: Update, saved: Saved) -> np.ndarray:
    """A tensor with an update, which is never whole in memory."""
    down, up = (x.astype(np.float32) for x in update[:2])
    left, right = (down.T, up.T) if update.embedding else (up, down)
    if (len(left), right.shape[1]) != value.shape:
        raise ValueError(
            f"the update of {name} is for a shape {(len(left), right.shape[1])}, and it has "
            f"{value.shape}; expected an adapter of this base"
        )
    scaling = np.float32(scaling_of(update.alpha, len(down), saved.rank_stabilized))
    merged = np.empty_like(value)
    step = max(1, BLOCK // value.shape[1])
    for first in range(0, len(value), step):
        rows = slice(first, first + step)
        with np.errstate(over="ignore"):
            merged[rows] = value[rows].astype(np.float32) + scaling * (left[rows] @ right)
        _finite(f"{name} with its update", merged[rows])
    return merged


def _finite(what: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(
            f"{what} is not finite in {values.dtype}; expected finite values (a base in float32 or "
            "bfloat16 holds larger ones)"
        )
    return values
