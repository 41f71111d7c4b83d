"""What a run was made with, its base and its examples, and how others are noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from nyscaled._files import replacing
from nyscaled.checkpoints import diffusers_lora, files
from nyscaled.finetune.examples import Encoded, Example
from nyscaled.finetune.folders import ADAPTER
from nyscaled.models.opening import open_weights

FILE = "base.json"
SAMPLED = 32
"""Tensors of which the first rows are hashed."""
SAMPLE = 2**16
"""Most bytes of these rows, unless one row has more."""
SHOWN = 4
_WITHOUT_EFFECT = ("_token_id", "id2label", "label2id")


class Base(TypedDict):
    """What distinguishes a base from others.

    Attributes:
        model: how the user called it, for messages.
        config: what `config.json` holds, without ids of special tokens and names of classes.
        shapes: shapes of its tensors, by name.
        samples: hashes of the first rows of some of them, as float32.
    """

    model: str
    config: dict[str, object]
    shapes: dict[str, list[int]]
    samples: dict[str, str]


class Digest(TypedDict):
    """What distinguishes encoded examples from others: their number, and a hash of all ids."""

    examples: int
    sha256: str


def of_base(model: str | os.PathLike[str]) -> Base:
    """Return what identifies a model; a small part of its weights is read.

    Args:
        model: a folder, a GGUF file or a hub id.

    Raises:
        ValueError: as `nys.models.outline` does.
    """
    source, outline, _, names = open_weights(model)
    ordered = sorted(names)
    picked = np.linspace(0, len(ordered) - 1, min(SAMPLED, len(ordered))).astype(int)

    def sample(name: str) -> str:
        _, rows = next(iter(source.blocks(names[name], SAMPLE)))
        return hashlib.sha256(np.asarray(rows, np.float32).tobytes()).hexdigest()[:16]

    settings: Mapping[str, object] = outline.config.to_json()
    config = {k: v for k, v in settings.items() if not k.endswith(_WITHOUT_EFFECT)}
    return {
        "model": str(model),
        "config": json.loads(json.dumps(config)),  # as it is read again
        "shapes": {name: list(source.shape(names[name])) for name in ordered},
        "samples": {ordered[i]: sample(ordered[i]) for i in picked},
    }


def write_base(folder: Path, base: Base) -> None:
    """Write what identifies a base into a folder.

    Args:
        folder: the folder.
        base: what identifies the base.
    """
    with replacing(folder / FILE) as file:
        file.write((json.dumps(base) + "\n").encode())


def require_adapter(folder: Path) -> None:
    """Refuse folders that are taken for that of an adapter of a language model.

    Args:
        folder: folder of an adapter.

    Raises:
        ValueError: on the folder of a run, of a whole model, and of an adapter of Stable Diffusion.
    """
    if (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} has a whole model, as full and linear-probe write it; expected it as the "
            "model, without an adapter"
        )
    if (folder / ADAPTER / FILE).exists():
        raise ValueError(f"{folder} has a run; expected its adapter, '{folder / ADAPTER}'")
    if (folder / diffusers_lora.FILE).exists():
        raise ValueError(
            f"{folder} has an adapter of Stable Diffusion, {diffusers_lora.FILE}; expected one of "
            "a language model (nys.lora.load_diffusers reads the other)"
        )


def require_base(folder: Path, model: str | os.PathLike[str]) -> None:
    """Refuse a model that is not the base of a folder; folders of other programs do not say it.

    Args:
        folder: folder of an adapter or of a run.
        model: a folder, a GGUF file or a hub id.

    Raises:
        ValueError: if the model is another one; the message says in what.
    """
    if (folder / FILE).exists():
        require_same_base(folder, of_base(model))


def require_same_base(folder: Path, own: Base) -> None:
    """Refuse a base that is not that of a folder, which has a file that identifies it.

    Args:
        folder: folder of an adapter or of a run.
        own: what identifies the base.

    Raises:
        ValueError: if the base is another one; the message says in what.
    """
    saved = files.read_object(folder / FILE, "what identifies the base")
    for part, what in (
        ("config", "in {}"),
        ("shapes", "in the shapes of {}"),
        ("samples", "in the values of {}"),
    ):
        before: Mapping[str, object] = saved.get(part, {})
        now: Mapping[str, object] = own[part]
        if part == "config":  # another version of this package may write other settings
            now = {name: now[name] for name in now if name in before}
            before = {name: before[name] for name in now}
        if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            shown = ", ".join(
                name if part == "samples" else f"{name} ({now.get(name)}, not {before.get(name)})"
                for name in changed[:SHOWN]
            )
            more = f" and {len(changed) - SHOWN} others" if len(changed) > SHOWN else ""
            raise ValueError(
                f"{own['model']} is not the base of {folder}: they differ {what.format(shown)}"
                f"{more}; expected {saved.get('model')!r}, or a file with the same values (without "
                f"{FILE} in the folder, nothing is compared)"
            )


def of_examples(encoded: Sequence[Encoded]) -> Digest:
    """Return what distinguishes encoded examples, in their order, from others.

    Args:
        encoded: the examples.

    Examples:
        >>> of_examples([Encoded((1, 2), ((3,),), 0)]) == of_examples([Encoded((1,), ((3,),), 0)])
        False
    """
    digest = hashlib.sha256()
    for example in encoded:
        e = example
        values = (e.prompt, e.answers, e.label, e.types, e.counted)
        digest.update(f"{values}\n".encode())
    return {"examples": len(encoded), "sha256": digest.hexdigest()}


def of_texts(examples: Sequence[Example]) -> Digest:
    """Return what distinguishes examples from others by their texts, in any order.

    Args:
        examples: the examples.

    Examples:
        >>> one, other = (Example(text, "yes", source=f"test.tsv:{text}") for text in "ab")
        >>> of_texts([one, other]) == of_texts([other, one]), of_texts([one]) == of_texts([other])
        (True, False)
    """
    values = ((e.prompt, e.second, e.candidates, e.label, e.golds) for e in examples)
    hashes = sorted(hashlib.sha256(repr(value).encode()).hexdigest() for value in values)
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {"examples": len(examples), "sha256": digest}


def recorded(path: Path, record: Mapping[str, Any]) -> dict[str, Digest]:
    """Return what a run's record says of its examples; nothing for a record without examples.

    Args:
        path: file of the record, for errors.
        record: what it says.

    Raises:
        ValueError: if it is not of the form that runs write.
    """
    digests = record.get("examples", {})
    names = set(Digest.__annotations__)
    if not isinstance(digests, dict) or not all(
        isinstance(digest, dict) and set(digest) == names for digest in digests.values()
    ):
        raise ValueError(
            f"{path}: examples are {digests!r}; expected {' and '.join(sorted(names))} by name, as "
            "a run writes them"
        )
    return digests


def require_examples(folder: Path, saved: Mapping[str, Digest], own: Mapping[str, Digest]) -> None:
    """Refuse examples that are not those that a run began with.

    Args:
        folder: folder of the run.
        saved: digests of the examples that it began with, by name.
        own: digests of those that are read now.

    Raises:
        ValueError: if they differ; the message says which.
    """
    for name, before in saved.items():
        now = own.get(name, {"examples": 0, "sha256": ""})
        if before == now:
            continue
        counts = f"{now['examples']} examples, not {before['examples']}"
        if before["examples"] == now["examples"]:
            counts = f"other texts or labels in some of its {now['examples']} examples"
        raise ValueError(
            f"the examples have changed since the run in {folder} began: {name} has "
            f"{counts}; expected the files and the tokenizer that it began with, or another --out"
        )
