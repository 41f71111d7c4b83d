"""Language models as NNX modules, read from and written to Hugging Face folders."""

from nyscaled.models.bert import Bert as Bert
from nyscaled.models.bert import BertConfig as BertConfig
from nyscaled.models.blocks import Numerics as Numerics
from nyscaled.models.classify import BertClassifier as BertClassifier
from nyscaled.models.classify import sentence_vectors as sentence_vectors
from nyscaled.models.embeddings import resize_token_embeddings as resize_token_embeddings
from nyscaled.models.gated import GatedConfig as GatedConfig
from nyscaled.models.gemma import Gemma as Gemma
from nyscaled.models.gemma import GemmaConfig as GemmaConfig
from nyscaled.models.generate import generate as generate
from nyscaled.models.llama import Llama as Llama
from nyscaled.models.llama import LlamaConfig as LlamaConfig
from nyscaled.models.load import load as load
from nyscaled.models.load import save as save
from nyscaled.models.opt import Opt as Opt
from nyscaled.models.opt import OptConfig as OptConfig
from nyscaled.models.rope import DynamicScaling as DynamicScaling
from nyscaled.models.rope import LinearScaling as LinearScaling
from nyscaled.models.rope import RopeScaling as RopeScaling
from nyscaled.models.rope import YarnScaling as YarnScaling
from nyscaled.models.sharding import shardings as shardings
from nyscaled.models.tokenizer import Tokenizer as Tokenizer
