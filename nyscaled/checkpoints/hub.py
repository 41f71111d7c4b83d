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
    return _fetch(name, revision, FILES, WEIGHTS, ["model*/*"], "transformers")


def fetch_pipeline(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Return a local copy of a repository's pipeline of diffusion models, as `fetch` does.

    Args:
        name: `owner/name` of the repository.
        revision: branch, tag or commit; `main` if None.
        variant: part of the names of the files of weights; None for those without.

    Raises:
        ValueError: as `fetch` does.
        ImportError: as `fetch` does.
    """
    ending = "" if variant is None else f".{variant}"
    stems = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"
    weights = [f"{stem}{ending}{part}.safetensors" for stem in stems for part in ("", "-0*")]
    indices = [f"{stem}.safetensors.index{ending}.json" for stem in stems]
    files = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*"]
    return _fetch(name, revision, (*files, *weights, *indices), weights[0], [], "diffusers")


def _fetch(
    name: str,
    revision: str | None,
    patterns: tuple[str, ...],
    weights: str,
    ignored: list[str],
    library: str,
) -> Path:
    """Return a local copy of the files with these names, of which some are `weights`."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs huggingface_hub: pip install 'nyscaled[models]'"
        ) from error
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(patterns),
        "ignore_patterns": ignored,
    }
    try:
        path = Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # of many classes: of the hub, of the network, of the disk
        raise ValueError(
            f"{name} is not a folder here, and the Hugging Face hub has none: {error}"
        ) from error
    if not any(path.glob(weights)) and not any(path.glob(weights.replace(".safe", "-*.safe"))):
        raise ValueError(
            f"{name} came without {weights}: only safetensors are read, pickles are not fetched; "
            "expected a revision that has them (often refs/pr/N on the hub), or the folder that "
            f"{library}' save_pretrained writes of it"
        )
    return path
