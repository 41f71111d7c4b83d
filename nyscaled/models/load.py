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
from jax.typing import DTypeLike

from nyscaled.checkpoints import files, hub, swap
from nyscaled.checkpoints.folder import SHARD_SIZE, Folder, open_folder, write
from nyscaled.checkpoints.gguf import SUFFIX, Gguf, open_gguf
from nyscaled.checkpoints.source import WeightSource
from nyscaled.models.blocks import Numerics
from nyscaled.models.family import MODELS, LanguageModel, gguf_maps
from nyscaled.models.generation_config import FILE as GENERATION
from nyscaled.models.generation_config import generation_config, with_generation
from nyscaled.models.matching import matched, tied_as_in_the_file
from nyscaled.models.names import places
from nyscaled.models.sharding import require_mesh, shardings
from nyscaled.models.tensors import read, tensors
from nyscaled.models.tokenizers.files import open_tokenizer
from nyscaled.models.tokenizers.gguf import gguf_tokenizer
from nyscaled.models.tokenizers.tokenizer import Tokenizer


def load(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Any, Tokenizer | None]:
    """Read a language model and its tokenizer.

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
            file, which is dequantized; or, as a string that is no path here,
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
    source, model, config, tokenizer = swap.consistent(path, functools.partial(_read_all, path))
    family = model.family
    if tokenizer is not None and not family.generates:
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
        abstract = nnx.eval_shape(
            lambda: model.build(config, source.names, numerics=numerics, rngs=nnx.Rngs(0))
        )
    except (TypeError, OverflowError) as error:  # JAX's, on products of sizes
        raise ValueError(f"{source.config_path} has sizes that no array has: {error}") from error
    graphdef, state = nnx.split(abstract)
    tied = config.tie_word_embeddings
    table = matched(source, places(state, family), family, tied=tied)
    layout = dict.fromkeys(table)
    if mesh is not None:
        layout = {p: v.get_value() for p, v in nnx.to_flat_state(shardings(abstract, mesh))}
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
    known = [known for models in MODELS.values() for known in models]
    if type(model) not in known:
        names = ", ".join(sorted(known.__name__ for known in known))
        raise ValueError(f"model is a {type(model).__name__}; expected one of {names}")
    if not isinstance(tokenizer, Tokenizer | None):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; expected a Tokenizer or None")
    state = nnx.state(model)
    table = places(state, model.family)
    named = (
        pair
        for path, variable in nnx.to_flat_state(state)
        for pair in tensors(variable[...], table[path])
    )
    dtype = next(variable.dtype.name for _, variable in nnx.to_flat_state(state))
    config = {"architectures": [model.family.architecture], **model.config.to_json()}
    config["torch_dtype"] = dtype
    texts: dict[str, str | None] = {} if tokenizer is None else tokenizer.files()
    texts[GENERATION] = generation_config(model.config) if model.family.generates else None
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


def _read_all(
    path: Path,
) -> tuple[WeightSource, type[LanguageModel], Any, Tokenizer | None]:
    """Open a file, and return it with its model's class, configuration and tokenizer."""
    is_file = path.is_file() or path.suffix == SUFFIX
    source = open_gguf(path, gguf_maps()) if is_file else open_folder(path)
    model_type = source.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise ValueError(
            f"{source.config_path} has model_type {model_type!r}; expected one of "
            f"{', '.join(sorted(MODELS))}"
        )
    if source.config.get("quantization_config"):
        raise ValueError(f"{source.path} is quantized; expected floating weights")
    architectures = source.config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    models = MODELS[model_type]
    model = next((m for m in models if m.family.architecture in named), models[0])
    try:
        config = model.family.config.from_json(source.config)
    except ValueError as error:
        raise ValueError(f"{source.config_path}: {files.brief(error)}") from None
    if config.num_hidden_layers > len(source.names):  # before anything is counted to
        raise ValueError(
            f"{source.config_path} has {config.num_hidden_layers} layers, and {source.path} "
            f"{len(source.names)} tensors; expected some for each layer"
        )
    if model.family.generates:
        config = tied_as_in_the_file(source, config)
    if model.family.generates and isinstance(source, Folder):
        config = with_generation(config, source.path, source.config)
    return source, model, config, _tokenizer(source)


def _tokenizer(source: WeightSource) -> Tokenizer | None:
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
