"""Model folders from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Pickled weights can run code and are not fetched; other forms of the same weights are not needed.
WEIGHTS = "model*.safetensors"
FILES = (
    *("config.json", "generation_config.json", WEIGHTS, "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)


def is_id(name: str) -> bool:
    """Return whether a name has the form `owner/name` of repositories on the hub."""
    return _ID.fullmatch(name) is not None


def fetch(name: str, revision: str | None = None) -> Path:
    """Return a local copy of a repository's model, downloaded unless it is in the cache.

    Args:
        name: `owner/name` of the repository.
        revision: branch, tag or commit; `main` if None.

    Raises:
        ValueError: if neither the hub nor the cache gives the repository, or it has no safetensors.
        ImportError: without the package huggingface_hub.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs huggingface_hub: pip install 'nyscaled[models]'"
        ) from error
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(FILES),
        "ignore_patterns": ["model*/*"],
    }
    try:
        path = Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # of many classes: of the hub, of the network, of the disk
        raise ValueError(
            f"{name} is not a folder here, and the Hugging Face hub has none: {error}"
        ) from error
    if not any(path.glob(WEIGHTS)):
        raise ValueError(
            f"{name} came without {WEIGHTS}: only safetensors are read, pickles are not fetched; "
            "expected a revision that has them (often refs/pr/N on the hub), or the folder that "
            "transformers' save_pretrained writes of it"
        )
    return path
