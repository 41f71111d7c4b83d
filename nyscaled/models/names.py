"""Where a model's parameters are in a file: transformers' names, and torch's layout."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from nyscaled.models.family import Family

Path = tuple[Any, ...]

LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}


class Place(NamedTuple):
    """The tensors of one parameter.

    Attributes:
        names: names of the tensors: one per layer where the parameter is a stack, else one.
        stacked: whether the parameter's first axis is that of the layers.
        transposed: whether the file has (out, in, *window) where the parameter has
            (*window, in, out). Of a linear layer the file may have a window of one pixel.
        shape: shape of each tensor in the file.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    shape: tuple[int, ...]


def places(state: Any, family: Family) -> dict[Path, Place]:
    """Return the place of each parameter of a model.

    `layers.mlp.up_proj.kernel` holds `<root>layers.<i>.mlp.up_proj.weight` of each layer.

    Args:
        state: the model's state, which may be abstract.
        family: the model's family.

    Raises:
        ValueError: on a variable that is not the model's own, such as an adapter's.
    """
    table = {}
    for path, variable in nnx.to_flat_state(state):
        *modules, leaf = map(str, path)
        layer, shape = ".".join(modules), tuple(variable.shape)
        stacked = family.stack_module in modules
        indices = [(i,) for i in range(shape[0])] if stacked and shape else [()]
        try:
            if type(variable) is not nnx.Param:
                raise ValueError("it is not a parameter")
            ending = LEAVES[leaf]
            names = tuple(f"{family.layer_name(layer, index)}.{ending}" for index in indices)
        except (ValueError, KeyError):
            raise ValueError(
                f"the model has {'.'.join(map(str, path))} ({type(variable).__name__}), for which "
                "its files have no place; expected only its own parameters (`nys.lora.merge` and "
                "`nys.lora.remove` take care of adapters)"
            ) from None
        shape = shape[1:] if stacked else shape
        table[path] = Place(names, stacked, leaf == "kernel", file_shape(leaf, shape))
    return table


def file_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a parameter's tensor: (out, in, *window) for a kernel.

    Args:
        leaf: name of the parameter in its layer.
        shape: shape of the parameter: (*window, in, out) for a kernel.
    """
    return (*shape[:-3:-1], *shape[:-2]) if leaf == "kernel" else shape
