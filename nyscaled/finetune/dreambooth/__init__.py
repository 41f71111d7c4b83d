"""DreamBooth (Ruiz et al., 2023): Stable Diffusion learns a subject from a few images of it."""

from nyscaled.finetune.dreambooth.config import Config
from nyscaled.finetune.dreambooth.launch import Result, run
from nyscaled.finetune.dreambooth.previewing import preview

__all__ = ["Config", "Result", "preview", "run"]
