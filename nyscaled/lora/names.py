"""What PEFT calls the layers of an NNX model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flax import nnx

Namer = Callable[[str, tuple[int, ...]], str]
Names = Namer | Mapping[str, str] | None


def _own_path(path: str, index: tuple[int, ...]) -> str:
    if index:
        raise ValueError(
            f"{path} is a stack, and only `names` can say what its layers are called, such as "
            f"{{{path!r}: 'layers.{{}}.q_proj'}}"
        )
    return path


def _from_table(table: Mapping[str, str]) -> Namer:
    def to_name(path: str, index: tuple[int, ...]) -> str:
        name = table.get(path)
        if name is None or name.count("{}") != len(index):
            raise ValueError(
                f"names has {name!r} for {path}; expected a name with {len(index)} '{{}}', one for "
                "each axis of its stack"
            )
        return name.format(*index)

    return to_name


def resolve(names: Names, model: nnx.Module) -> Namer:
    """Return the function `(path, index in the stack) -> name` that `names` stands for.

    Args:
        names: as in `nys.lora.save_peft`.
        model: asked where `names` is None.
    """
    if names is None:
        return getattr(model, "layer_name", _own_path)
    if isinstance(names, Mapping):
        return _from_table(names)
    if not callable(names):
        raise ValueError(
            f"names is {names!r}; expected a mapping from paths to names, a function, or None to "
            "ask the model"
        )
    return names
