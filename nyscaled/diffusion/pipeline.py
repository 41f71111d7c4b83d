"""All models of a pipeline, with its tokenizer and noise, in one folder."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nyscaled.checkpoints import files, hub, swap
from nyscaled.checkpoints.folder import SHARD_SIZE
from nyscaled.diffusion.autoencoder import Autoencoder
from nyscaled.diffusion.component import Component, places
from nyscaled.diffusion.loading import (
    load_component,
    require_no_file,
    require_variant,
    save_component,
)
from nyscaled.diffusion.schedule import Schedule
from nyscaled.diffusion.settings import require_class
from nyscaled.diffusion.text_encoder import TextEncoder
from nyscaled.diffusion.tokenizer import open_clip_tokenizer, text_tokens, tokenizer_files
from nyscaled.diffusion.unet import UNet
from nyscaled.models.blocks import Numerics
from nyscaled.models.tokenizers.tokenizer import FILE, Tokenizer

INDEX, CLASS = "model_index.json", "StableDiffusionPipeline"
SCHEDULE = "scheduler_config.json"
ABSENT = [None, None]

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What makes images of texts.

    Attributes:
        unet: the model that predicts noise in latents.
        autoencoder: the model that maps images to latents, and back.
        text_encoder: the model of texts.
        tokenizer: the tokenizer of texts.
        schedule: the noise that the U-Net was trained with.

    Raises:
        ValueError: on models that do not fit together.
    """

    unet: UNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    schedule: Schedule

    def __post_init__(self) -> None:
        unet, autoencoder = self.unet.config, self.autoencoder.config
        for what, value, expected in (
            ("in_channels", unet.in_channels, autoencoder.latent_channels),
            ("cross_attention_dim", unet.cross_attention_dim, self.text_encoder.config.hidden_size),
        ):
            if value != expected:
                raise ValueError(f"{what} of the U-Net is {value}; expected {expected}")
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= (rows := self.text_encoder.config.vocab_size):
            raise ValueError(
                f"the tokenizer has a token {largest}, and the text encoder has {rows} rows; "
                f"expected tokens below {rows}"
            )

    def encode_texts(self, texts: Sequence[str]) -> Float[Array, "batch length width"]:
        """Return what the U-Net reads of texts; "" stands for no text.

        Args:
            texts: a text per row. There is a warning where the end of one is cut off.

        Raises:
            ValueError: on anything but texts.
        """
        length = self.text_encoder.config.max_position_embeddings
        tokens = text_tokens(self.tokenizer, texts, length)
        return _encoded(*quiet_parts(self.text_encoder), jnp.asarray(tokens))


def quiet_parts(model: M) -> tuple[nnx.GraphDef[M], object]:
    """Return a model without dropout of adapters, split: `nnx.jit` would change it in a trace.

    Args:
        model: the model.
    """
    return parts(nnx.view(model, deterministic=True, raise_if_not_found=False))


def parts(model: M) -> tuple[nnx.GraphDef[M], object]:
    """Return a model split into its structure and its arrays.

    Args:
        model: the model.
    """
    graphdef, state = nnx.split(model)
    return graphdef, nnx.as_pure(state)


@functools.partial(jax.jit, static_argnums=0)
def _encoded(graphdef: nnx.GraphDef[TextEncoder], state: object, tokens: Array) -> Array:
    return nnx.merge(graphdef, state)(tokens)


def load(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Pipeline:
    """Read Stable Diffusion 1 or 2, or a smaller pipeline of the same kind.

    Args:
        folder: folder of a pipeline in the form of diffusers, with `model_index.json`; or, as a
            string that is not a path here, the `owner/name` of a repository on the Hugging Face
            hub. The safety checker is not read.
        revision: branch, tag or commit on the hub.
        variant: part of the names of the files of weights, such as "fp16".
        dtype: dtype of the parameters, regardless of the files'.
        compute_dtype: dtype of activations; `dtype` if None.
        remat: whether the backward pass of the U-Net computes layers again, to save memory.
        mesh: mesh over which parameters are split, as in `nys.models.shardings`; None for the
            default device.

    Raises:
        ValueError: on another kind of pipeline, models that do not fit together, and as
            `load_unet` does.

    Examples:
        >>> load("nowhere")
        Traceback (most recent call last):
        ValueError: nowhere is not a folder; expected one with model_index.json
    """
    return _loaded(folder, revision, variant, Numerics(dtype, compute_dtype, remat), mesh)


def outline(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    remat: bool = False,
) -> Pipeline:
    """Return a pipeline without the values of its parameters; read no weight.

    The parameters are `jax.ShapeDtypeStruct`, of which programs can be compiled.

    Args:
        folder: as in `load`.
        revision: as in `load`.
        variant: as in `load`.
        dtype: as in `load`.
        compute_dtype: as in `load`.
        remat: as in `load`.

    Raises:
        ValueError: as `load` does, but for errors in tensors.

    Examples:
        >>> outline("nowhere")
        Traceback (most recent call last):
        ValueError: nowhere is not a folder; expected one with model_index.json
    """
    numerics = Numerics(dtype, compute_dtype, remat)
    return _loaded(folder, revision, variant, numerics, None, outline=True)


def _loaded(
    folder: str | os.PathLike[str],
    revision: str | None,
    variant: str | None,
    numerics: Numerics,
    mesh: Mesh | None,
    *,
    outline: bool = False,
) -> Pipeline:
    path = _located(folder, revision, variant)
    require_class(files.read_object(path / INDEX, "the index of a pipeline"), CLASS)
    schedule = _schedule(path / "scheduler" / SCHEDULE)
    tokenizer = swap.consistent(
        path / "tokenizer", functools.partial(open_clip_tokenizer, path / "tokenizer")
    )
    how = variant, numerics, mesh
    text_encoder = load_component(TextEncoder, path / "text_encoder", *how, outline=outline)
    autoencoder = load_component(Autoencoder, path / "vae", *how, outline=outline)
    unet = load_component(UNet, path / "unet", *how, outline=outline)
    return Pipeline(unet, autoencoder, text_encoder, tokenizer, schedule)


def _located(folder: str | os.PathLike[str], revision: str | None, variant: str | None) -> Path:
    path = files.as_folder(folder)
    require_variant(variant)  # before it is a name on the hub
    if not path.exists() and isinstance(folder, str) and hub.is_id(folder):
        return hub.fetch_pipeline(folder, revision, variant)
    if revision is not None:
        raise ValueError(f"{folder} is not from the hub; expected no revision, got {revision!r}")
    require_no_file(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected one with {INDEX}")
    return path


def _schedule(path: Path) -> Schedule:
    config = files.read_object(path, "the noise of the pipeline")
    try:
        return Schedule.from_json(config)
    except ValueError as error:
        raise ValueError(f"{path}: {files.brief(error)}") from None


def _require_values(what: str, model: nnx.Module) -> None:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(model))):
        raise ValueError(f"{what} has shapes in place of values; expected that of `load`")


def save(
    model: Pipeline | nnx.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int = SHARD_SIZE,
) -> None:
    """Write a pipeline, or one of its models, as a folder that diffusers loads.

    Weights are in the dtype of the parameters. The files of each model replace those of an earlier
    save together, at the end. A pipeline is written model by model, the index last: after a process
    was killed, the folder may have models of two saves.

    Args:
        model: a pipeline, or a model of this package; adapters merged and removed.
        folder: folder to write, made if missing. Other files in it are kept.
        max_shard_size: most bytes in a file of weights. Beyond it there are several files and an
            index.

    Raises:
        ValueError: on variables beside the models' own parameters, such as adapters, and on a
            pipeline of `outline`.
        OSError: if a file cannot be written.

    Examples:
        >>> import tempfile, numpy as np
        >>> from nyscaled.diffusion import UNet, UNetConfig, load_unet
        >>> ones = lambda x: np.ones(x.shape, "f")
        >>> sizes = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
        >>> kinds = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
        >>> kinds |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        >>> config = UNetConfig(**sizes, **kinds, attention_head_dim=2, cross_attention_dim=6)
        >>> graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0))))
        >>> unet = nnx.merge(graphdef, jax.device_put(jax.tree.map(ones, state)))
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save(unet, path)
        ...     sorted(os.listdir(path)), load_unet(path).config == config
        (['config.json', 'diffusion_pytorch_model.safetensors'], True)
    """
    if isinstance(model, Component):
        _require_values("the model", model)
        save_component(model, folder, max_shard_size)
        return
    if not isinstance(model, Pipeline):
        raise ValueError(f"model is a {type(model).__name__}; expected a model of nys.diffusion")
    path = files.as_folder(folder)
    models = {"unet": model.unet, "vae": model.autoencoder, "text_encoder": model.text_encoder}
    for part in models.values():  # before a file is written
        places(part)
        _require_values("the pipeline", part)
    for name, part in models.items():
        save_component(part, path / name, max_shard_size)
    with swap.replacing(path / "tokenizer", tokenizer_files(model.tokenizer), last=FILE):
        pass
    noise = files.as_json(model.schedule.to_json())
    with swap.replacing(path / "scheduler", {SCHEDULE: noise}, last=SCHEDULE):
        pass
    index = {
        "_class_name": CLASS,
        "_diffusers_version": "0.30.0",
        "feature_extractor": ABSENT,
        "image_encoder": ABSENT,
        "requires_safety_checker": False,
        "safety_checker": ABSENT,
        "scheduler": ["diffusers", model.schedule.scheduler],
        "text_encoder": ["transformers", TextEncoder.config_class.class_name],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", UNet.config_class.class_name],
        "vae": ["diffusers", Autoencoder.config_class.class_name],
    }
    with swap.replacing(path, {INDEX: files.as_json(index)}, last=INDEX):
        pass
