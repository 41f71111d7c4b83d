"""Causal language models as NNX modules, read from and written to Hugging Face folders."""

from nyscaled.models.llama import Llama as Llama
from nyscaled.models.llama import LlamaConfig as LlamaConfig
from nyscaled.models.load import load as load
from nyscaled.models.load import save as save
