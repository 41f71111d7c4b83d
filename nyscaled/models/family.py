"""What is known of a family of models beside its computation, and where the families are listed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from flax import nnx

from nyscaled.checkpoints.gguf import GgufMap
from nyscaled.models.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The facts that reading, writing, sharding and adapters need of a family.

    The paths of a model's modules are transformers' names, with the layers stacked, so that names
    follow from these facts.

    Attributes:
        config: class of the configurations, which says the `model_type`.
        architecture: name of the class in transformers, as in `architectures` of `config.json`.
        root: what transformers' names of all modules but the head begin with. The names of a
            model that has no head lack it.
        stack: transformers' name of the list of layers, without the root.
        outside: transformers' names, without the root, of the modules beside the layers and the
            head.
        head: name of the head, None for a model without one.
        split_inputs: ends of the paths of linear layers whose inputs an earlier layer leaves split
            over the devices of a mesh.
        ignored: regular expression for the whole names of tensors that files may have and models
            do not.
        generates: whether the model continues texts.
        gguf: how llama.cpp writes models of this family, None if its files are not read.
    """

    config: type[Config]
    architecture: str
    root: str = "model."
    stack: str = "layers"
    outside: tuple[str, ...] = ("embed_tokens", "norm")
    head: str | None = "lm_head"
    split_inputs: tuple[str, ...] = ("o_proj", "down_proj")
    # Constants of early LLaMA files, which follow from the configuration.
    ignored: str = r"(.*\.)?rotary_emb\.\w+"
    generates: bool = True
    gguf: GgufMap | None = None

    @property
    def model_type(self) -> str:
        """The family's name in `config.json`."""
        return self.config.model_type

    @property
    def stack_module(self) -> str:
        """The name of the module that holds the layers."""
        return self.stack.rpartition(".")[2]

    def layer_name(self, path: str, index: tuple[int, ...] = ()) -> str:
        """Return transformers' name of a layer.

        Args:
            path: dotted path of the layer in a model of this family, or in another model whose
                paths end in the same way. There the layers may also be a list.
            index: position in the stack, `()` for a layer outside of it or in a list.

        Raises:
            ValueError: if the family has no such layer.

        Examples:
            >>> from nyscaled.models import Llama
            >>> Llama.family.layer_name("layers.mlp.up_proj", (3,))
            'model.layers.3.mlp.up_proj'
            >>> Llama.family.layer_name("decoder.layers.3.mlp.up_proj")
            'model.layers.3.mlp.up_proj'
            >>> Llama.family.layer_name("embed_tokens"), Llama.family.layer_name("lm_head")
            ('model.embed_tokens', 'lm_head')
        """
        root = self.root if self.head else ""
        modules = path.split(".")
        in_stack = re.fullmatch(rf"(?:.*\.)?{self.stack_module}\.(?:(\d+)\.)?(.+)", path)
        if in_stack:
            number = () if in_stack[1] is None else (int(in_stack[1]),)
            if len(position := (*index, *number)) == 1:
                return f"{root}{self.stack}.{position[0]}.{in_stack[2]}"
        elif not index and self.head is not None and modules[-1] == self.head:
            return self.head
        elif not index:
            for name in self.outside:
                first = name.rpartition(".")[2]
                if first in modules:
                    return root + ".".join([name, *modules[modules.index(first) + 1 :]])
        raise ValueError(
            f"{path} with stack index {index} is not a layer of the family {self.model_type!r}; "
            f"expected one of {', '.join(filter(None, (*self.outside, self.head)))}, "
            f"{self.stack}.<i>.<module>, or {self.stack}.<module> in a stack"
        )


class LanguageModel(nnx.Module):
    """The base of the models of this package.

    Attributes:
        family: what is known of the class.
        config: sizes and constants of the model.
    """

    family: ClassVar[Family]
    config: Any

    @classmethod
    def build(cls, config: Any, tensors: Sequence[str], **options: Any) -> LanguageModel:
        """Return the model of a file.

        Args:
            config: the configuration in the file.
            tensors: names of the tensors in the file.
            **options: `numerics` and `rngs`.
        """
        return cls(config, **options)  # pyright: ignore[reportCallIssue]

    def layer_name(self, path: str, index: tuple[int, ...] = ()) -> str:
        """Return transformers' name of a layer, see `Family.layer_name`.

        Args:
            path: dotted path of the layer.
            index: position in the stack, `()` for a layer outside of it.
        """
        return self.family.layer_name(path, index)


M = TypeVar("M", bound=type[LanguageModel])

# The classes of each `model_type`, of which the first is read unless a file names another.
MODELS: dict[str, list[type[LanguageModel]]] = {}


def register(model: M) -> M:
    """Decorate a model class so that `load`, `save` and other readers of `Family` know it.

    Args:
        model: class with a `family`.

    Examples:
        >>> from nyscaled.models import Llama
        >>> Llama in MODELS["llama"]  # `@register` stands above the class
        True
    """
    MODELS.setdefault(model.family.model_type, []).append(model)
    return model


def gguf_maps() -> Mapping[str, GgufMap]:
    """Return how GGUF files are read, by the architecture that they name."""
    families = (models[0].family for models in MODELS.values())
    return {family.model_type: family.gguf for family in families if family.gguf is not None}
