"""Read models from Hugging Face folders, the hub and GGUF files, and write folders."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nyscaled.checkpoints import swap
from nyscaled.checkpoints.folder import SHARD_SIZE, write
from nyscaled.models.blocks import Numerics
from nyscaled.models.family import MODELS, LanguageModel
from nyscaled.models.generation_config import FILE as GENERATION
from nyscaled.models.generation_config import generation_config
from nyscaled.models.matching import matched
from nyscaled.models.names import places
from nyscaled.models.opening import located, open_all, outline_of
from nyscaled.models.sharding import require_mesh, shardings
from nyscaled.models.tensors import read, tensors
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

    BERT is read as `BertClassifier` where `architectures` has `BertForSequenceClassification`, and
    as `Bert` otherwise. `Bert` ignores the heads that it was trained with (`cls.predictions.*` for
    masked words, `cls.seq_relationship.*` for the next sentence). Heads of other tasks are
    refused, as every tensor without a parameter is.

    The tokens that end a text come from `generation_config.json`, else from `config.json`.

    Each tensor goes from the mapped file to its place on the devices before the next one is read,
    in blocks of rows. Beside the model, memory holds one block; with a mesh it holds one tensor
    and its shards, and for a GGUF file one tensor. NaN and Inf in the weights are kept. During the
    call the files may be replaced, as `save` does, but not cut short: then the system ends the
    process.

    Args:
        folder: folder with `config.json` and `model.safetensors`, or shards with their index; a
            GGUF file, which is dequantized; or, as a string that is not a path here, the
            `owner/name` of a repository on the Hugging Face hub. Its configuration, safetensors
            and tokenizer are fetched into the hub's cache.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the parameters, regardless of the file's.
        compute_dtype: dtype of activations; `dtype` if None.
        remat: whether the backward pass computes layers again, to save memory.
        mesh: mesh over which parameters are split, as in `shardings`; None for the default device.

    Returns:
        The model and its `Tokenizer`. The model maps tokens (batch, length) and a mask to logits
        (`Bert` to hidden states). The tokenizer is read from `tokenizer.json`, from GPT-2's
        `vocab.json` and `merges.txt`, or from the metadata of the GGUF file. It is None where
        there is none, and, with a warning, where it has a form that is not read.

    Raises:
        ValueError: on an unknown architecture, an unsupported setting, a broken file (a folder's
            tokenizer too), a parameter without its tensor or with one of another shape, a tensor
            that belongs to no parameter, and a mesh that `shardings` refuses.
        ImportError: if a package is missing that the tokenizer, the hub or the GGUF file requires.

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
    path = located(folder, revision)
    source, model, config, tokenizer = swap.consistent(path, functools.partial(open_all, path))
    family = model.family
    abstract = outline_of(source, model, config, tokenizer, Numerics(dtype, compute_dtype, remat))
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


def outline(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    remat: bool = False,
) -> tuple[Any, Tokenizer | None]:
    """Return a model without the values of its parameters, and its tokenizer; read no weight.

    The parameters are `jax.ShapeDtypeStruct`, of which programs can be compiled.

    Args:
        folder: as in `load`.
        revision: as in `load`.
        dtype: as in `load`.
        compute_dtype: as in `load`.
        remat: as in `load`.

    Raises:
        ValueError: as `load` does, but for errors in tensors.

    Examples:
        >>> import tempfile
        >>> from nyscaled.models import Llama, LlamaConfig, save
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save(Llama(LlamaConfig(**sizes, **heads), rngs=nnx.Rngs(0)), path)
        ...     model, _ = outline(path)
        >>> model.lm_head.kernel.shape
        (8, 16)
    """
    path = located(folder, revision)
    source, model, config, tokenizer = swap.consistent(path, functools.partial(open_all, path))
    numerics = Numerics(dtype, compute_dtype, remat)
    return outline_of(source, model, config, tokenizer, numerics), tokenizer


def save(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Write a model as a folder that `load` and transformers read, in the dtype of its parameters.

    The host's memory holds the tensors of one file at a time, gathered from a mesh one by one.
    Everything is written aside, and replaces the weights and the tokenizer of the folder at the
    end; until then the folder is unchanged. After a process was killed, the next program that
    opens the folder with this package finds the old files or the new ones. `load` never mixes the
    files of two saves.

    Args:
        model: model as `load` returned it, or with trained parameters; adapters merged and removed.
        folder: folder to write, made if missing. Other files in it are kept, but a
            `generation_config.json` is replaced by one that agrees.
        tokenizer: tokenizer to write, with its chat template, so that transformers reads it too;
            None keeps the folder's.
        max_shard_size: most bytes in a file of weights. Beyond it there are several files and an
            index; a larger tensor has a file to itself.

    Raises:
        ValueError: on a model of another package, on variables beside the model's own parameters,
            such as adapters, on a size that is not positive, and on a directory in the place of a
            file.
        OSError: if a file cannot be written, and nothing has changed; or if the final replacement
            fails, and the message says how to end it.

    Examples:
        >>> import tempfile
        >>> from flax import nnx
        >>> from nyscaled.models import Llama, LlamaConfig, load
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=3)
        >>> config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Llama(config, rngs=nnx.Rngs(0)), folder)
        ...     model, tokenizer = load(folder)
        >>> model.config.hidden_size, tokenizer is None
        (8, True)
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
    write_tensors(model, folder, named, dtype, tokenizer, max_shard_size=max_shard_size)


def write_tensors(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    named: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Write tensors as the folder of a model, as `save` does with those of its parameters.

    Args:
        model: the model, which may be without values.
        folder: as in `save`.
        named: names and values of all tensors of the model, asked for one by one.
        dtype: name of their dtype.
        tokenizer: as in `save`.
        max_shard_size: as in `save`.
    """
    config = {"architectures": [model.family.architecture], **model.config.to_json()}
    config["torch_dtype"] = dtype
    texts: dict[str, str | None] = {} if tokenizer is None else tokenizer.files()
    texts[GENERATION] = generation_config(model.config) if model.family.generates else None
    write(folder, config, named, max_shard_size=max_shard_size, texts=texts)
