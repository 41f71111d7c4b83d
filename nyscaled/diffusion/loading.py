"""Read and write the models of a pipeline, each in a folder of its own."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from nyscaled.checkpoints import files, hub, swap
from nyscaled.checkpoints.folder import Folder, open_folder, write
from nyscaled.diffusion.component import Component, matched, places
from nyscaled.diffusion.settings import Settings
from nyscaled.diffusion.unet import UNet
from nyscaled.models.blocks import Numerics
from nyscaled.models.sharding import layout, require_mesh
from nyscaled.models.tensors import read, tensors

UNET = "unet"

M = TypeVar("M", bound=Component[Settings])


def load_unet(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike | None = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> UNet:
    """Read the U-Net of Stable Diffusion 1 or 2, or of a smaller model of the same kind.

    Args:
        folder: folder of a U-Net in the form of diffusers, with `config.json` and
            `diffusion_pytorch_model.safetensors` or shards; or the folder of a pipeline, of which
            `unet/` is read.
        variant: part of the names of the files: "fp16" for
            `diffusion_pytorch_model.fp16.safetensors`.
        dtype: dtype of the parameters, regardless of the file's.
        compute_dtype: dtype of activations; `dtype` if None.
        remat: whether the backward pass computes layers again, to save memory.
        mesh: mesh over which parameters are split, as in `nys.models.shardings`; None for the
            default device.

    Returns:
        The model. It maps latents (batch, height, width, channels), times and rows of texts to
        predictions.

    Raises:
        ValueError: on another class of models, an unsupported setting, a broken file, a parameter
            without its tensor or with one of another shape, and a tensor that belongs to no
            parameter.

    Examples:
        >>> import tempfile, numpy as np
        >>> ones = lambda x: np.ones(x.shape, "f")
        >>> from nyscaled.diffusion import UNetConfig, save
        >>> sizes = dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
        >>> kinds = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
        >>> kinds |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
        >>> config = UNetConfig(**sizes, **kinds, attention_head_dim=2, cross_attention_dim=6)
        >>> graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0))))
        >>> unet = nnx.merge(graphdef, jax.device_put(jax.tree.map(ones, state)))
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save(unet, path)
        ...     again = load_unet(path)
        >>> again.config == config
        True
    """
    path = files.as_folder(folder)
    require_no_file(path)
    if not path.exists() and isinstance(folder, str) and hub.is_id(folder):
        raise ValueError(
            f"{folder} is not a folder; expected one, as load_unet reads nothing from the hub "
            "(`load` does)"
        )
    path = path / UNET if (path / UNET).is_dir() else path
    return load_component(UNet, path, variant, Numerics(dtype, compute_dtype, remat), mesh)


def require_no_file(path: Path) -> None:
    """Raise ValueError if a path is that of a file.

    Args:
        path: where a folder is expected.
    """
    if path.is_file():
        raise ValueError(
            f"{path} is a file; expected a folder in the form of diffusers (single files are not "
            "supported: diffusers' `from_single_file` and `save_pretrained` convert them)"
        )


def require_variant(variant: str | None) -> None:
    """Raise ValueError unless `variant` can be a part of the names of files.

    Args:
        variant: what the user passed.
    """
    if variant is not None and (not isinstance(variant, str) or not variant):
        raise ValueError(f"variant is {variant!r}; expected a text such as 'fp16', or None")


def load_component(
    model_class: type[M],
    path: Path,
    variant: str | None,
    numerics: Numerics,
    mesh: Mesh | None,
    *,
    outline: bool = False,
) -> M:
    """Return the model in a folder.

    Args:
        model_class: class of the model.
        path: path of the folder.
        variant: part of the names of the files; None for those without.
        numerics: dtypes of the model.
        mesh: mesh over which parameters are split; None for the default device.
        outline: whether the model has shapes in place of values, and no weight is read.

    Raises:
        ValueError: as `load_unet` does.
    """
    require_variant(variant)
    if mesh is not None:
        require_mesh(mesh)
    stem = model_class.stem if variant is None else f"{model_class.stem}.{variant}"
    source, model = swap.consistent(
        path, functools.partial(_open, model_class, path, stem, numerics)
    )
    table = matched(source, model)
    if outline:
        return model
    graphdef, state = nnx.split(model)
    placed = dict.fromkeys(table)
    if mesh is not None:
        split = layout(state, mesh, model.split_inputs)
        placed = {p: v.get_value() for p, v in nnx.to_flat_state(split)}
    flat = [
        (path, variable.replace(read(source, table[path], variable, placed[path])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _open(model_class: type[M], path: Path, stem: str, numerics: Numerics) -> tuple[Folder, M]:
    """Open a folder, and return it with its model without values."""
    source = open_folder(path, stem)
    if source.config.get("quantization_config"):
        raise ValueError(f"{path} is quantized; expected floating weights")
    try:
        config = model_class.config_class.from_json(source.config)
    except ValueError as error:
        raise ValueError(f"{source.config_path}: {files.brief(error)}") from None
    if config.layers > len(source.names):  # a model of so many would take forever to make
        raise ValueError(
            f"{source.config_path} has {config.layers} layers, and {source.path} has "
            f"{len(source.names)} tensors; expected several for each"
        )
    return source, model_class.outline(config, numerics)


def save_component(
    model: Component[Settings], folder: str | os.PathLike[str], max_shard_size: int
) -> None:
    """Write a model as `nys.diffusion.save` does.

    Args:
        model: the model.
        folder: folder to write.
        max_shard_size: most bytes in a file of weights.

    Raises:
        ValueError: on variables beside the model's own parameters.
        OSError: if a file cannot be written.
    """
    table = places(model)
    named = (
        pair
        for path, variable in nnx.to_flat_state(nnx.state(model))
        for pair in tensors(variable[...], table[path])
    )
    config = model.config.to_json()
    write(folder, config, named, max_shard_size=max_shard_size, stem=model.stem)
