"""Merge an adapter into its base, from file to file, for programs that read whole models.

OUT gets weights in safetensors, config.json and the tokenizer, as transformers reads them. Tensors
are merged one by one, so that memory holds no more than a few of the largest.

examples:
  nyscaled export --model MODEL --adapter runs/rte/adapter --out merged
  nyscaled evaluate --model merged --data glue/rte --task rte
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nyscaled.finetune import export


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `nyscaled export`."""

    model: str
    """Base of the adapter: a folder, a GGUF file or a hub id."""
    adapter: Path
    """Folder of the adapter, in PEFT's format."""
    out: Path
    """Folder for the merged model; new or empty."""
    config: Path | None = None
    """YAML or TOML file of these options; flags override it."""


def run(config: Config) -> int:
    """Merge an adapter into its base, print what was written, and return 0.

    Args:
        config: the options.

    Raises:
        ValueError: on an adapter of another base, or one that cannot be merged tensor by tensor.
        OSError: if a file cannot be read or written.
    """
    done = export(config.model, config.adapter, config.out)
    print(
        f"{done.folder}: {done.tensors} tensors, of which {done.merged} have an update of the "
        f"adapter and {done.replaced} are its own"
    )
    return 0
