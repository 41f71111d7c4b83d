"""Models from folders of the Hugging Face kind, its hub or GGUF files, and back into folders."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from nyscaled.checkpoints import files, hub, swap
from nyscaled.checkpoints.folder import SHARD_SIZE, Folder, open_folder, write
from nyscaled.checkpoints.gguf import SUFFIX, Gguf, open_gguf
from nyscaled.models.bert import Bert, BertConfig
from nyscaled.models.blocks import Numerics
from nyscaled.models.classify import BertClassifier, of_file
from nyscaled.models.config import Config
from nyscaled.models.gemma import Gemma, GemmaConfig
from nyscaled.models.generation_config import FILE as GENERATION
from nyscaled.models.generation_config import generation_config, with_generation
from nyscaled.models.llama import Llama, LlamaConfig
from nyscaled.models.matching import matched, tied_as_in_the_file
from nyscaled.models.names import places
from nyscaled.models.opt import Opt, OptConfig
from nyscaled.models.sharding import require_mesh, shardings
from nyscaled.models.tensors import read, tensors
from nyscaled.models.tokenizer import Tokenizer
from nyscaled.models.tokenizer_files import open_tokenizer
from nyscaled.models.vocabulary import gguf_tokenizer

FAMILIES: dict[str, tuple[type[Config], Any]] = {
    "bert": (BertConfig, Bert),
    "gemma": (GemmaConfig, Gemma),
    "llama": (LlamaConfig, Llama),
    "opt": (OptConfig, Opt),
}


def load(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Any, Any]:
    """Reads a language model (LLaMA, Gemma 1, OPT, BERT) and its tokenizer.

    BERT is read as `BertClassifier` where `architectures` says `BertForSequenceClassification`,
    and as `Bert` otherwise. Left out are then the heads it was trained with (`cls.predictions.*`,
    of masked words, and `cls.seq_relationship.*`, of the next sentence); heads of other tasks are
    refused, as every tensor without a parameter is.

    The tokens that end a text are those of `generation_config.json`, else of `config.json`.

    Tensors go from the mapped file to their places on the devices one after the other, in blocks of
    rows: beside the model, memory holds little. With a mesh it holds a tensor and its shards, of a
    GGUF file a tensor. NaN and Inf among the weights are taken as they are. While it reads, the
    files may be replaced, as `save` does, but not cut short, at which the system ends the process.

    Args:
        folder: with `config.json` and `model.safetensors`, or shards with their index; a GGUF
            file of a LLaMA or a Gemma, which is dequantized; or, as a string that is no path here,
            the `owner/name` of a repository on the Hugging Face hub, of which the configuration,
            the safetensors and the tokenizer are fetched into its cache.
        revision: branch, tag or commit on the hub.
        dtype: of the parameters, whatever the file's.
        compute_dtype: of activations; `dtype` if None.
        remat: whether layers are computed anew in the backward pass, to save memory.
        mesh: to split parameters over, as `shardings` says; None for the default device.

    Returns:
        The model, which maps tokens (batch, length) and a mask to logits (`Bert` to hidden
        states), and the `Tokenizer` of `tokenizer.json`, of GPT-2's `vocab.json` and `merges.txt`, or
        of the GGUF file's metadata; None where there is none, with a warning where it has a form
        that is not read.

    Raises:
        ValueError: on an unknown architecture, an unsupported setting, a broken file (a folder's
            tokenizer too), a parameter without its tensor or with one of another shape, or a
            tensor that belongs to no parameter; on a mesh that `shardings` refuses.
        ImportError: if a package is missing that the tokenizer, the hub or the GGUF file needs.

    Examples:
        >>> import jax, tempfile
        >>> from nyscaled.models import Llama, LlamaConfig
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> config = LlamaConfig(**sizes, **heads)
        >>> graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
        >>> model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.ones(x.shape), state))
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save(model, path)
        ...     again, tokenizer = load(path)
        >>> bool(jnp.all(again.lm_head.kernel[...] == model.lm_head.kernel[...]))
        True
    """
    if mesh is not None:
        require_mesh(mesh)
    path = _located(folder, revision)
    source, make, config, tokenizer = swap.consistent(path, functools.partial(_read_all, path))
    if tokenizer is not None and not config.generates:
        tokenizer.settings["padding_side"] = tokenizer.settings.get("padding_side") or "right"
    tokens = 0 if tokenizer is None else 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokens > config.vocab_size:  # by the largest id, as ids may leave some out
        warnings.warn(
            f"{source.path} has a tokenizer of {tokens} tokens and a model of {config.vocab_size}: "
            "it gives NaN for the others",
            stacklevel=2,
        )
    numerics = Numerics(dtype, compute_dtype, remat)
    try:
        abstract = nnx.eval_shape(lambda: make(config, numerics=numerics, rngs=nnx.Rngs(0)))
    except (TypeError, OverflowError) as error:  # JAX's, on products of sizes
        raise ValueError(f"{source.config_path} has sizes that no array has: {error}") from error
    graphdef, state = nnx.split(abstract)
    table = matched(source, places(state, abstract.prefix), config)
    layout = dict.fromkeys(table)
    if mesh is not None:
        layout = {p: v.get_value() for p, v in nnx.to_flat_state(shardings(state, mesh))}
    flat = [
        (path, variable.replace(read(source, table[path], variable, layout[path])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), tokenizer


def save(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Writes a model as a folder that `load` and transformers read, in the dtype of its parameters.

    The tensors of one file are in the host's memory at a time, gathered from the mesh one by one
    if the model lies on one. All is written aside, and swapped at the end for the weights and the
    tokenizer that the folder had: until then it is what it was. A process that is killed leaves
    the old folder or the new one to whoever opens it next with this package, and `load` never
    takes files of two saves for one.

    Args:
        model: as `load` returned it, or with trained parameters; adapters merged and removed.
        folder: made if missing; other files in it are left alone, but a `generation_config.json`
            is replaced by one that agrees.
        tokenizer: written along, with its chat template, so that transformers reads it too; None
            leaves that of the folder alone.
        max_shard_size: bytes of a file of weights, beyond which there are several and an index; a
            larger tensor has a file to itself.

    Raises:
        ValueError: if the model is none of this package, or has variables beside its own
            parameters, such as adapters, on a size that is not positive, or on a directory in the
            place of a file.
        OSError: if a file cannot be written, and nothing has changed; or if the swap fails, and
            the message says how it is ended.
    """
    known = [*(model_class for _, model_class in FAMILIES.values()), BertClassifier]
    if type(model) not in known:
        names = ", ".join(k.__name__ for k in known)
        raise ValueError(f"model is a {type(model).__name__}; expected one of {names}")
    if not isinstance(tokenizer, Tokenizer | None):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; expected a Tokenizer or None")
    state = nnx.state(model)
    table = places(state, model.prefix)
    named = (
        pair
        for path, variable in nnx.to_flat_state(state)
        for pair in tensors(variable[...], table[path])
    )
    dtype = next(variable.dtype.name for _, variable in nnx.to_flat_state(state))
    config = {"architectures": [model.architecture], **model.config.to_json()}
    config["torch_dtype"] = dtype
    texts: dict[str, str | None] = {} if tokenizer is None else tokenizer.files()
    texts[GENERATION] = generation_config(model.config) if model.config.generates else None
    write(folder, config, named, max_shard_size=max_shard_size, texts=texts)


def _located(folder: str | os.PathLike[str], revision: str | None) -> Path:
    """The path of the folder, of the GGUF file, or of the local copy of what the hub has."""
    path = files.as_folder(folder)
    elsewhere = not path.exists() and path.suffix != SUFFIX
    if elsewhere and isinstance(folder, str) and hub.is_id(folder):
        return hub.fetch(folder, revision)
    if revision is not None:
        raise ValueError(f"{folder} is not from the hub; expected no revision, got {revision!r}")
    return path


def _read_all(path: Path) -> tuple[Folder, Any, Any, Tokenizer | None]:
    """All but the values of the tensors: the open folder, its class, configuration and tokenizer."""
    is_file = path.is_file() or path.suffix == SUFFIX
    source = open_gguf(path) if is_file else open_folder(path)
    kind = source.config.get("model_type")
    if kind not in list(FAMILIES):  # a list has == for what cannot be hashed
        raise ValueError(
            f"{source.config_path} has model_type {kind!r}; expected one of {', '.join(FAMILIES)}"
        )
    if source.config.get("quantization_config"):
        raise ValueError(f"{source.path} is quantized; expected floating weights")
    config_class, make = FAMILIES[kind]
    if make is Bert:
        architectures = source.config.get("architectures")
        make = of_file(architectures if isinstance(architectures, list) else [], source.names)
    try:
        config = config_class.from_json(source.config)
    except ValueError as error:
        raise ValueError(f"{source.config_path}: {files.brief(error)}") from None
    if config.num_hidden_layers > len(source.names):  # before anything is counted to
        raise ValueError(
            f"{source.config_path} has {config.num_hidden_layers} layers, and {source.path} "
            f"{len(source.names)} tensors; expected some for each layer"
        )
    if config.generates:
        config = tied_as_in_the_file(source, config)
    if config.generates and not isinstance(source, Gguf):
        config = with_generation(config, source.path, source.config)
    return source, make, config, _tokenizer(source)


def _tokenizer(source: Folder) -> Tokenizer | None:
    if not isinstance(source, Gguf):
        return open_tokenizer(source.path)
    try:
        return gguf_tokenizer(source.metadata)
    except ValueError as error:
        warnings.warn(
            f"{source.path} has a vocabulary of which no tokenizer is made here: it is None, and "
            f"the model is read ({error})",
            stacklevel=3,  # of the call of `load`
        )
        return None
