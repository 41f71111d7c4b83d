"""Language models as NNX modules, read from and written to Hugging Face folders."""

from nyscaled.models.bert import Bert, BertConfig
from nyscaled.models.blocks import Numerics
from nyscaled.models.classify import BertClassifier, sentence_vectors
from nyscaled.models.embeddings import resize_token_embeddings
from nyscaled.models.family import Family, register
from nyscaled.models.gated import GatedConfig
from nyscaled.models.gemma import Gemma, GemmaConfig
from nyscaled.models.generation import generate
from nyscaled.models.llama import Llama, LlamaConfig
from nyscaled.models.loading import load, outline, save
from nyscaled.models.mistral import Mistral, MistralConfig
from nyscaled.models.opt import Opt, OptConfig
from nyscaled.models.prefix import PrefixParam
from nyscaled.models.prefix_tuning import add_prefix
from nyscaled.models.qwen2 import Qwen2, Qwen2Config
from nyscaled.models.qwen3 import Qwen3, Qwen3Config
from nyscaled.models.rope import DynamicScaling, LinearScaling, RopeScaling, YarnScaling
from nyscaled.models.sharding import shardings
from nyscaled.models.tokenizers.tokenizer import Tokenizer

__all__ = [
    "Bert",
    "BertClassifier",
    "BertConfig",
    "DynamicScaling",
    "Family",
    "GatedConfig",
    "Gemma",
    "GemmaConfig",
    "LinearScaling",
    "Llama",
    "LlamaConfig",
    "Mistral",
    "MistralConfig",
    "Numerics",
    "Opt",
    "OptConfig",
    "PrefixParam",
    "Qwen2",
    "Qwen2Config",
    "Qwen3",
    "Qwen3Config",
    "RopeScaling",
    "Tokenizer",
    "YarnScaling",
    "add_prefix",
    "generate",
    "load",
    "outline",
    "register",
    "resize_token_embeddings",
    "save",
    "sentence_vectors",
    "shardings",
]
