"""Open models' files: which model, configuration and tokenizer they hold, and their tensors."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from nyscaled.checkpoints import files, hub, swap
from nyscaled.checkpoints.folder import Folder, open_folder
from nyscaled.checkpoints.gguf import SUFFIX, Gguf, open_gguf
from nyscaled.checkpoints.source import WeightSource
from nyscaled.models.blocks import Numerics
from nyscaled.models.config import Config
from nyscaled.models.family import MODELS, LanguageModel, gguf_maps
from nyscaled.models.generation_config import with_generation
from nyscaled.models.matching import matched, tied_as_in_the_file
from nyscaled.models.names import places
from nyscaled.models.tokenizers.files import open_tokenizer
from nyscaled.models.tokenizers.gguf import gguf_tokenizer
from nyscaled.models.tokenizers.tokenizer import Tokenizer


class Weights(NamedTuple):
    """A model's open file, of which no tensor was read.

    Attributes:
        source: the file.
        model: the model without values, as `outline` returns it.
        tokenizer: its tokenizer, or None.
        names: names of tensors in the file, by those that `save` writes.
    """

    source: WeightSource
    model: LanguageModel
    tokenizer: Tokenizer | None
    names: dict[str, str]


def open_weights(folder: str | os.PathLike[str], *, revision: str | None = None) -> Weights:
    """Open a model's file.

    Args:
        folder: as in `load`.
        revision: as in `load`.

    Raises:
        ValueError: as `outline` does, and on tensors that do not fit the parameters.

    Examples:
        >>> import tempfile
        >>> from nyscaled.models import Llama, LlamaConfig, save
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
        >>> heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=2)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save(Llama(LlamaConfig(**sizes, **heads), rngs=nnx.Rngs(0)), path)
        ...     weights = open_weights(path)
        >>> weights.source.shape(weights.names["lm_head.weight"])
        (16, 8)
    """
    path = located(folder, revision)
    source, model, config, tokenizer = swap.consistent(path, functools.partial(open_all, path))
    abstract = outline_of(source, model, config, tokenizer, Numerics())
    table = places(nnx.state(abstract), model.family)
    in_file = matched(source, table, model.family, tied=config.tie_word_embeddings)
    pairs = (zip(table[path].names, in_file[path].names, strict=True) for path in table)
    names = dict(pair for of_parameter in pairs for pair in of_parameter)
    return Weights(source, abstract, tokenizer, names)


def outline_of(
    source: WeightSource,
    model: type[LanguageModel],
    config: Any,
    tokenizer: Tokenizer | None,
    numerics: Numerics,
) -> LanguageModel:
    """Return the model of a file without values.

    Args:
        source: the open file.
        model: class of the model.
        config: its configuration.
        tokenizer: its tokenizer; which side is padded is added to its settings.
        numerics: dtypes of the model.

    Raises:
        ValueError: on sizes that no array has.
    """
    if tokenizer is not None and not model.family.generates:
        tokenizer.settings["padding_side"] = tokenizer.settings.get("padding_side") or "right"
    tokens = 0 if tokenizer is None else 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokens > config.vocab_size:  # by the largest id, as ids may leave some out
        warnings.warn(
            f"{source.path} has a tokenizer of {tokens} tokens and a model of {config.vocab_size}: "
            "it gives NaN for the others",
            stacklevel=3,
        )
    try:
        return nnx.eval_shape(
            lambda: model.build(config, source.names, numerics=numerics, rngs=nnx.Rngs(0))
        )
    except (TypeError, OverflowError) as error:  # JAX's, on products of sizes
        raise ValueError(f"{source.config_path} has sizes that no array has: {error}") from error


def located(folder: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the path of the folder, of the GGUF file, or of the local copy from the hub.

    Args:
        folder: what the user passed.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: on a revision of a folder that is not from the hub.
    """
    path = files.as_folder(folder)
    on_hub = not path.exists() and path.suffix != SUFFIX
    if on_hub and isinstance(folder, str) and hub.is_id(folder):
        return hub.fetch(folder, revision)
    if revision is not None:
        raise ValueError(f"{folder} is not from the hub; expected no revision, got {revision!r}")
    return path


def open_all(
    path: Path,
) -> tuple[WeightSource, type[LanguageModel], Config, Tokenizer | None]:
    """Open a file, and return it with its model's class, configuration and tokenizer.

    Args:
        path: path of the folder or file.

    Raises:
        ValueError: on a file that no model is read from.
    """
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
