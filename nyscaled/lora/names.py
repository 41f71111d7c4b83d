"""What PEFT calls the layers of an NNX model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Namer = Callable[[str, tuple[int, ...]], str]
Names = str | Namer | Mapping[str, str] | None

# Where the layers are in transformers' model with its head, what is in each, and the rest, by the
# ends of our paths.
_GATED = (
    "model.layers",
    r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|(?:input|post_attention)_layernorm",
    {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
)
_OPT = "project_in", "project_out", "embed_tokens", "embed_positions", "final_layer_norm"
_EMBEDDINGS = "word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"
_FAMILIES = {
    "opt": (
        "model.decoder.layers",
        r"self_attn\.(?:[qkv]|out)_proj|fc[12]|(?:self_attn|final)_layer_norm",
        {**{name: f"model.decoder.{name}" for name in _OPT}, "lm_head": "lm_head"},
    ),
    "llama": _GATED,
    "gemma": _GATED,
    "bert": (
        "bert.encoder.layer",
        r"attention\.self\.(?:query|key|value)|intermediate\.dense"
        r"|(?:attention\.)?output\.(?:dense|LayerNorm)",
        {
            **{f"embeddings.{name}": f"bert.embeddings.{name}" for name in _EMBEDDINGS},
            **{"pooler.dense": "bert.pooler.dense", "classifier": "classifier"},
        },
    ),
}


def family(name: str) -> Namer:
    """The names of a family's layers in transformers, from paths that end as they do.

    Layers may be a list (`….layers.3.self_attn.q_proj`) or a stack (`….layers.self_attn.q_proj`).
    "bert" is the model of a task (`bert.encoder.layer.3.…`); names of a bare `BertModel` are these
    without `bert.`.

    Raises:
        ValueError: on an unknown family; later, on a path that it does not have.

    Examples:
        >>> family("llama")("decoder.layers.mlp.up_proj", (3,))
        'model.layers.3.mlp.up_proj'
        >>> bare = lambda path, index: family("bert")(path, index).removeprefix("bert.")
        >>> bare("layers.3.attention.self.query", ())
        'encoder.layer.3.attention.self.query'
    """
    if name not in _FAMILIES:
        raise ValueError(f"names is {name!r}; expected one of {', '.join(map(repr, _FAMILIES))}")
    prefix, inside, others = _FAMILIES[name]
    pattern = re.compile(rf"(?:.*\.)?layers?\.(?:(\d+)\.)?({inside})")

    def to_name(path: str, index: tuple[int, ...]) -> str:
        in_layer = {"layer", "layers"} & set(path.split("."))
        for end, other in () if index or in_layer else others.items():
            if f".{path}".endswith(f".{end}"):
                return other
        match = pattern.fullmatch(path)
        places = (*index, *(match[1],) * bool(match[1])) if match else ()
        if match is None or len(places) != 1:
            raise ValueError(
                f"{path} with stack index {index} is no layer of the family {name!r}; expected "
                f"layers.<i>.<module>, or layers.<module> in a stack, <module> like {inside}"
            )
        return f"{prefix}.{places[0]}.{match[2]}"

    return to_name


def _same(path: str, index: tuple[int, ...]) -> str:
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


def resolve(names: Names) -> Namer:
    """The function `(path, index in the stack) -> name` that `names` stands for.

    Raises:
        ValueError: on an unknown family.
    """
    if names is None:
        return _same
    if isinstance(names, str):
        return family(names)
    return _from_table(names) if isinstance(names, Mapping) else names
