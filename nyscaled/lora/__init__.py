"""LoRA for Flax: adapters of any NNX model, their starts (NoRA and its peers), PEFT's files."""

from nyscaled.lora.adapter import Adapted, Adapter
from nyscaled.lora.diffusers import load_diffusers, save_diffusers
from nyscaled.lora.fill import initialize, initialize_params
from nyscaled.lora.gradient_inits import GRADIENT_INITS
from nyscaled.lora.inits import KERNEL_INITS, Start
from nyscaled.lora.inject import adapted_layers, apply, remove
from nyscaled.lora.input_inits import INPUT_INITS
from nyscaled.lora.peft import load_peft, save_peft
from nyscaled.lora.recipe import path_key
from nyscaled.lora.serve import activate, merge, unmerge

__all__ = [
    "GRADIENT_INITS",
    "INPUT_INITS",
    "KERNEL_INITS",
    "Adapted",
    "Adapter",
    "Start",
    "activate",
    "adapted_layers",
    "apply",
    "initialize",
    "initialize_params",
    "load_diffusers",
    "load_peft",
    "merge",
    "path_key",
    "remove",
    "save_diffusers",
    "save_peft",
    "unmerge",
]
