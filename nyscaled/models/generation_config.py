"""`generation_config.json`: the tokens that end a text, and settings that are kept for others."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nyscaled.checkpoints import files
from nyscaled.checkpoints.source import CONFIG
from nyscaled.models.config import Config, sound

FILE = "generation_config.json"
TOKENS = "bos_token_id", "eos_token_id", "pad_token_id"

# What changes the tokens that transformers generates and `generate` has no argument for, and the
# values that change none. `do_sample`, `temperature`, `top_k` and `top_p` are arguments.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "typical_p"), (1,)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (0,)),
    **dict.fromkeys(
        (
            *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
            *("force_words_ids", "constraints", "stop_strings"),
        ),
        ([], {}),
    ),
    **dict.fromkeys(
        (
            *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
            *("watermarking_config", "dola_layers", "top_h"),
        ),
        (),
    ),
}

C = TypeVar("C", bound=Config)


def with_generation(config: C, folder: Path, settings_of_model: Mapping[str, Any]) -> C:
    """Return the configuration with what `generation_config.json` says, where there is one.

    Its token ids come before those of `config.json`, as in transformers: chat models often have
    the token that ends an answer only there. One that it lacks stays as it is. The other settings
    (temperature, top_p, …) are kept as text for `save`; `generate` has arguments for them. There is
    a warning on those that it has none for and that change what transformers generates.

    Args:
        config: of a causal language model.
        folder: of the model.
        settings_of_model: what its `config.json` holds.

    Raises:
        ValueError: on a file that is not a JSON object, or ids that are not integers.
    """
    path = folder / FILE
    if not files.exists(path):
        _warn_of(settings_of_model, folder / CONFIG)  # where older models have them
        return config
    settings = files.read_object(path, "settings of the generation")
    fields = {field.name: field for field in dataclasses.fields(config)}
    try:
        tokens = {k: sound(fields[k], settings.pop(k)) for k in TOKENS if k in settings}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _warn_of(settings, path)
    return dataclasses.replace(config, **tokens, generation=json.dumps(settings))


def _warn_of(settings: Mapping[str, Any], path: Path) -> None:
    names = [
        name
        for name, value in settings.items()
        if value is not None and value not in _WITHOUT_EFFECT.get(name, (value,))
    ]
    if names:
        warnings.warn(
            f"{path} has {', '.join(names)}, which transformers applies as it generates and "
            "`nyscaled.models.generate` does not",
            stacklevel=6,  # of the call of `nyscaled.models.load`
        )


def generation_config(config: Config) -> str:
    """Return the text of a `generation_config.json` that agrees with a configuration."""
    tokens = {name: getattr(config, name) for name in TOKENS}
    known = {name: value for name, value in tokens.items() if value is not None}
    return files.as_json(json.loads(config.generation) | known)
