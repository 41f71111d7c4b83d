"""The base of the models of a pipeline, and where their parameters are in files."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import ClassVar, Generic, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Key

from nyscaled.checkpoints import files
from nyscaled.checkpoints.source import WeightSource
from nyscaled.diffusion.settings import Settings
from nyscaled.models.blocks import Numerics
from nyscaled.models.names import LEAVES, Path, Place, file_shape

C = TypeVar("C", bound="Component[Settings]")
S = TypeVar("S", bound=Settings, covariant=True)


class _OneKey(nnx.Rngs):
    """The key of parameters without values. Counting keys takes longer than the rest."""

    def params(self) -> Key[Array, ""]:
        return jax.random.key(0)


class Component(nnx.Module, Generic[S]):
    """The base of the models of this package, whose module paths are the names in files.

    Attributes:
        config_class: class of the configurations.
        config: sizes and constants of the model.
        numerics: dtypes, and whether the backward pass computes layers again.
        stem: name of the file of weights without its ending.
        prefix: what names of tensors begin with, though older or newer files may lack it.
        older: ends of layers' names in older files, by those of today.
        ignored: regular expression for names of tensors that files may have and models do not.
        split_inputs: ends of the paths of linear layers whose inputs an earlier layer leaves split
            over the devices of a mesh.
    """

    config_class: ClassVar[type[Settings]]
    stem: ClassVar[str] = "diffusion_pytorch_model"
    prefix: ClassVar[str] = ""
    older: ClassVar[Mapping[str, str]] = {}
    ignored: ClassVar[str] = r"(?!)"
    split_inputs: ClassVar[tuple[str, ...]] = ("to_out.0", "net.2")
    config: S
    numerics: Numerics

    @classmethod
    def outline(cls: type[C], config: Settings, numerics: Numerics) -> C:
        """Return the model of a configuration without the values of its parameters.

        Args:
            config: sizes and constants.
            numerics: dtypes.
        """
        options: dict[str, object] = {"numerics": numerics, "rngs": _OneKey()}
        make = functools.partial(cls, config, **options)  # pyright: ignore[reportCallIssue]
        return nnx.eval_shape(make)

    def is_pointwise(self, layer: str) -> bool:
        """Return whether files hold a linear layer as a convolution with a kernel of one pixel.

        Args:
            layer: path of the layer.
        """
        return False


def places(model: Component[Settings]) -> dict[Path, Place]:
    """Return the place of each parameter of a model in the file that `save` writes.

    Args:
        model: the model, which may be without values.

    Raises:
        ValueError: on a variable that is not the model's own, such as an adapter's.
    """
    table: dict[Path, Place] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *modules, leaf = map(str, path)
        layer = ".".join(modules)
        if type(variable) is not nnx.Param or leaf not in LEAVES:
            raise ValueError(
                f"the model has {layer}.{leaf} ({type(variable).__name__}), for which its files "
                "have no place; expected only its own parameters (`nys.lora.merge` and "
                "`nys.lora.remove` take care of adapters)"
            )
        shape = file_shape(leaf, tuple(variable.shape))
        if leaf == "kernel" and model.is_pointwise(layer):
            shape = (*shape, 1, 1)
        name = f"{model.prefix}{layer}.{LEAVES[leaf]}"
        table[path] = Place((name,), False, leaf == "kernel", shape)
    return table


def matched(source: WeightSource, model: Component[Settings]) -> dict[Path, Place]:
    """Return the place of each parameter in a file, in which each tensor has its parameter.

    Args:
        source: the open file.
        model: the model, which may be without values.

    Raises:
        ValueError: on a parameter without its tensor or with one of another shape, and on a
            tensor that belongs to no parameter.
    """
    names = set(source.names)

    def name_in_file(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        short = layer.removeprefix(model.prefix)
        ends = [(new, old) for new, old in model.older.items() if short.endswith("." + new)]
        older = [short.removesuffix(new) + old for new, old in ends]
        for each in (layer, short, *older):
            if f"{each}.{leaf}" in names:
                return f"{each}.{leaf}"
        return name

    table = {
        path: place._replace(names=(name_in_file(place.names[0]),))
        for path, place in places(model).items()
    }
    shapes = {place.names[0]: place.shape for place in table.values()}
    what = type(model).__name__
    _require_none(source, f"has no tensor for {what}'s", shapes.keys() - names)
    unknown = {name for name in names - shapes.keys() if not re.fullmatch(model.ignored, name)}
    _require_none(source, f"has tensors that a {what} has no parameter for:", unknown)
    for name, shape in shapes.items():
        if source.shape(name) != shape:
            raise ValueError(
                f"{source.path} has {name} of shape {source.shape(name)}; expected {shape}, by "
                f"{source.config_path.name}"
            )
    return table


def _require_none(source: WeightSource, what: str, names: set[str]) -> None:
    if names:
        first = files.brief(", ".join(sorted(names)[:8]))
        raise ValueError(f"{source.path} {what} {first}{' …' if len(names) > 8 else ''}")
