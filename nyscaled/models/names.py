"""Where a model's parameters are in a file: transformers' names, and torch's layout."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

Path = tuple[Any, ...]

# What is not under the root that the other names have.
HEADS = "lm_head", "classifier"

STACKS = "layers", "layer"

_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}


class Place(NamedTuple):
    """The tensors of one parameter.

    Attributes:
        names: of one tensor, or of one a layer where the parameter is a stack.
        stacked: whether its first axis is that of the layers.
        transposed: whether the file has (out, in) where the parameter has (in, out).
        shape: of each tensor in the file.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    shape: tuple[int, ...]


def places(state: Any, prefix: str) -> dict[Path, Place]:
    """The place of each parameter of a model.

    The models' paths are transformers' names already, so that only the ends differ:
    `layers.mlp.up_proj.kernel` holds `<prefix>layers.<i>.mlp.up_proj.weight` of each layer.

    Args:
        state: the model's, which may be abstract.
        prefix: of everything but heads.

    Raises:
        ValueError: on a variable that is not the model's own, such as an adapter's.
    """
    found = {}
    for path, variable in nnx.to_flat_state(state):
        *modules, leaf = map(str, path)
        if type(variable) is not nnx.Param or leaf not in _LEAVES:
            raise ValueError(
                f"the model has {'.'.join(map(str, path))} ({type(variable).__name__}), which its "
                "files have no place for; expected its own parameters alone (`nys.lora.merge` and "
                "`nys.lora.remove` take care of adapters)"
            )
        shape = tuple(variable.shape)
        parts = [*modules, _LEAVES[leaf]]
        if modules[0] not in HEADS:
            parts[0] = prefix + parts[0]
        names = (".".join(parts),)
        stack = next((i for i, module in enumerate(modules, 1) if module in STACKS), 0)
        if stack:
            before, after = ".".join(parts[:stack]), ".".join(parts[stack:])
            names = tuple(f"{before}.{i}.{after}" for i in range(shape[0]))
            shape = shape[1:]
        transposed = leaf == "kernel"
        found[path] = Place(names, stack > 0, transposed, shape[::-1] if transposed else shape)
    return found
