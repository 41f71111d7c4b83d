"""Which tensor of a file is which parameter's, in the forms that transformers reads."""

from __future__ import annotations

import dataclasses
import itertools
import re
import warnings
from typing import TypeVar

import numpy as np

from nyscaled.checkpoints import files
from nyscaled.checkpoints.source import CONFIG, WeightSource
from nyscaled.models.config import Config
from nyscaled.models.family import Family
from nyscaled.models.names import Path, Place

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
BLOCK = 2**26  # bytes that are compared at a time

C = TypeVar("C", bound=Config)


def tied_as_in_the_file(source: WeightSource, config: C) -> C:
    """Return the configuration, in which head and embedding are tied only if the file agrees.

    Where `tie_word_embeddings` is true and the file has a head that differs from the embedding,
    the model has both, as in transformers, and there is a warning.

    Args:
        source: the open file.
        config: what its configuration says.

    Raises:
        ValueError: in that case, for a family whose head is always the embedding.
    """
    embedding = next((name for name in source.names if name.endswith(EMBEDDING)), None)
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
    source: WeightSource, table: dict[Path, Place], family: Family, *, tied: bool
) -> dict[Path, Place]:
    """Return the table with the names of this file, in which each tensor has its parameter.

    Args:
        source: the open file.
        table: place of each parameter, with the names that this package writes.
        family: the model's family.
        tied: whether the head is the embedding.

    Raises:
        ValueError: on a parameter without its tensor or with one of another shape, and on a
            tensor that belongs to no parameter.
    """
    names = set(source.names)
    root = family.root if any(name.startswith(family.root) for name in names) else ""

    def name_in_file(name: str) -> str:
        if name.partition(".")[0] != family.head:
            name = root + name.removeprefix(family.root)
        older = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        older = older.replace("LayerNorm.bias", "LayerNorm.beta")
        if older in names:
            return older
        is_head = tied and name.endswith(EMBEDDING) and name not in names and HEAD in names
        return HEAD if is_head else name

    places = {
        path: place._replace(names=tuple(map(name_in_file, place.names)))
        for path, place in table.items()
    }
    shapes = {name: place.shape for place in places.values() for name in place.names}
    _require_none("has no tensor for", source, shapes.keys() - names)
    unknown = {n for n in names - shapes.keys() if not re.fullmatch(family.ignored, n)}
    if tied:
        unknown.discard(HEAD)  # which is the embedding, see `tied_as_in_the_file`
    _require_none(f"has tensors that a {family.model_type} has no parameter for:", source, unknown)
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            raise ValueError(
                f"{source.path} has {name} of shape {source.shape(name)}; expected {shape}, by "
                f"{CONFIG}"
            )
    return places


def _equal(source: WeightSource, first: str, second: str) -> bool:
    if source.shape(first) != source.shape(second):
        return False
    blocks = (source.blocks(name, BLOCK) for name in (first, second))
    return all(i == j and np.array_equal(a, b) for (i, a), (j, b) in itertools.zip_longest(*blocks))


def _require_none(what: str, source: WeightSource, names: set[str]) -> None:
    if names:
        first = files.brief(", ".join(sorted(names)[:8]))
        raise ValueError(f"{source.path} {what} {first}{' …' if len(names) > 8 else ''}")
