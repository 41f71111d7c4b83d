"""Which tensor of a folder is which parameter's, in the forms that transformers reads."""

from __future__ import annotations

import dataclasses
import itertools
import re
import warnings
from typing import Any, TypeVar

import numpy as np

from nyscaled.checkpoints import files
from nyscaled.checkpoints.folder import CONFIG, Folder
from nyscaled.models.config import Config
from nyscaled.models.names import HEADS, Place

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
BLOCK = 2**26  # bytes that are compared at a time

C = TypeVar("C", bound=Config)


def tied_as_in_the_file(source: Folder, config: C) -> C:
    """Return the configuration, whose head is one of its own where the file has another.

    Where `tie_word_embeddings` is true and the file has a head that is not the embedding, the
    model has both, as in transformers, and there is a warning.

    Raises:
        ValueError: in that case, for a family whose head is always the embedding.
    """
    embedding = _embedding(source)
    if not config.tie_word_embeddings or embedding is None or HEAD not in source.names:
        return config
    if _equal(source, HEAD, embedding):
        return config
    if "tie_word_embeddings" in config.fixed:
        raise ValueError(
            f"{source.path} has {HEAD} that is not {embedding}; a {config.model_type} has no other"
        )
    warnings.warn(
        f"{source.path} has {HEAD} that is not {embedding}, against tie_word_embeddings: the "
        "model has both",
        stacklevel=3,  # of the call of `nyscaled.models.load`
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def matched(
    source: Folder, table: dict[tuple[Any, ...], Place], config: Config
) -> dict[tuple[Any, ...], Place]:
    """Return the table with the names of this folder, in which each tensor has its parameter.

    Raises:
        ValueError: on a parameter without its tensor or with one of another shape, and on a
            tensor that belongs to no parameter.
    """
    names = set(source.names)
    root = config.root if any(name.startswith(config.root) for name in names) else ""

    def there(name: str) -> str:
        if name.partition(".")[0] not in HEADS:
            name = root + name.removeprefix(config.root)
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        older = older.replace("LayerNorm.bias", "LayerNorm.beta")
        if older in names:
            return older
        tied = config.tie_word_embeddings and name.endswith(EMBEDDING) and name not in names
        return HEAD if tied and HEAD in names else name

    found = {p: place._replace(names=tuple(map(there, place.names))) for p, place in table.items()}
    wanted = {name: place.shape for place in found.values() for name in place.names}
    _require_none("has no tensor for", source, wanted.keys() - names)
    left = {n for n in names - wanted.keys() if not re.fullmatch(config.left_out, n)}
    if config.tie_word_embeddings:
        left.discard(HEAD)  # which is the embedding, see `tied_as_in_the_file`
    _require_none(f"has tensors that a {config.model_type} has no parameter for:", source, left)
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise ValueError(
                f"{source.path} has {name} of shape {source.shape(name)}; expected {shape}, by {CONFIG}"
            )
    return found


def _embedding(source: Folder) -> str | None:
    return next((name for name in source.names if name.endswith(EMBEDDING)), None)


def _equal(source: Folder, first: str, second: str) -> bool:
    if source.shape(first) != source.shape(second):
        return False
    blocks = (source.blocks(name, BLOCK) for name in (first, second))
    return all(i == j and np.array_equal(a, b) for (i, a), (j, b) in itertools.zip_longest(*blocks))


def _require_none(what: str, source: Folder, names: set[str]) -> None:
    if names:
        first = files.brief(", ".join(sorted(names)[:8]))
        raise ValueError(f"{source.path} {what} {first}{' …' if len(names) > 8 else ''}")
