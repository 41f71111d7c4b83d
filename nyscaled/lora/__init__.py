"""LoRA for Flax: adapters of any NNX model, their starts (NoRA and its peers), PEFT's files."""

from nyscaled.lora.gradients import GRADIENT_INITS as GRADIENT_INITS
from nyscaled.lora.initialize import initialize as initialize
from nyscaled.lora.inits import KERNEL_INITS as KERNEL_INITS
from nyscaled.lora.inits import Start as Start
from nyscaled.lora.inject import adapted_layers as adapted_layers
from nyscaled.lora.inject import apply as apply
from nyscaled.lora.inject import remove as remove
from nyscaled.lora.kernels import path_key as path_key
from nyscaled.lora.layer import Adapted as Adapted
from nyscaled.lora.layer import Adapter as Adapter
from nyscaled.lora.manage import activate as activate
from nyscaled.lora.manage import merge as merge
from nyscaled.lora.manage import unmerge as unmerge
from nyscaled.lora.peft import load_peft as load_peft
from nyscaled.lora.peft import save_peft as save_peft
from nyscaled.lora.trees import initialize_params as initialize_params
