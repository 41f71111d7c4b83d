"""`generation_config.json`: the tokens that end a text, and settings that are kept for others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from nyscaled.checkpoints import files
from nyscaled.models.config import Config, sound

FILE = "generation_config.json"
TOKENS = "bos_token_id", "eos_token_id", "pad_token_id"

C = TypeVar("C", bound=Config)


def with_generation(config: C, folder: Path) -> C:
    """Return the configuration with what `generation_config.json` says, where there is one.

    Its token ids come before those of `config.json`, as in transformers: chat models often have
    the token that ends an answer only there. One that it lacks stays as it is. The other settings
    (temperature, top_p, …) are kept as text for `save`; `generate` has arguments for them.

    Args:
        config: of a causal language model.
        folder: of the model.

    Raises:
        ValueError: on a file that is not a JSON object, or ids that are not integers.
    """
    path = folder / FILE
    if not files.exists(path):
        return config
    settings = files.read_object(path, "settings of the generation")
    fields = {field.name: field for field in dataclasses.fields(config)}
    try:
        tokens = {k: sound(fields[k], settings.pop(k)) for k in TOKENS if k in settings}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dataclasses.replace(config, **tokens, generation=json.dumps(settings))


def generation_config(config: Config) -> str:
    """Return the text of a `generation_config.json` that agrees with a configuration."""
    tokens = {name: getattr(config, name) for name in TOKENS}
    known = {name: value for name, value in tokens.items() if value is not None}
    return files.as_json(json.loads(config.generation) | known)
