"""Causal language models as NNX modules, read from and written to Hugging Face folders."""

from nyscaled.models.gemma import Gemma as Gemma
from nyscaled.models.gemma import GemmaConfig as GemmaConfig
from nyscaled.models.llama import Llama as Llama
from nyscaled.models.llama import LlamaConfig as LlamaConfig
from nyscaled.models.load import load as load
from nyscaled.models.load import save as save
from nyscaled.models.opt import Opt as Opt
from nyscaled.models.opt import OptConfig as OptConfig
