"""Parameters that PEFT saves whole, beside the adapters: heads, embeddings, norms, biases."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from nyscaled.checkpoints.peft import Saved
from nyscaled.checkpoints.peft_config import is_whole
from nyscaled.lora import inject
from nyscaled.lora.adapter import Adapted
from nyscaled.lora.names import Namer
from nyscaled.lora.view import LINEAR, declared_shape, roles_of, unstacked_view

# Names of parameters here and in torch, and how many axes they have without a stack. None depends
# on the layer.
_ENDS = {
    "kernel": ("weight", None),
    "embedding": ("weight", 2),
    "scale": ("weight", 1),
    "bias": ("bias", None),
}


class Place(NamedTuple):
    """Where a tensor of PEFT is in a model.

    Attributes:
        path: path of the layer.
        layer: the layer that has the parameter.
        end: the parameter's name.
        position: index of the layer in its stack.
    """

    path: str
    layer: Any
    end: str
    position: tuple[int, ...]

    @property
    def variable(self) -> Any:
        """The parameter of all layers of the stack."""
        return getattr(self.layer, self.end)

    def read(self) -> np.ndarray:
        """Return the tensor in torch's layout."""
        value = np.asarray(self.variable[...][self.position])
        if self.end == "kernel":
            return np.asarray(unstacked_view(self.layer).to_matrices(jnp.asarray(value))).T
        return value.reshape(-1) if self.end == "bias" else value

    def write(self, parameter: np.ndarray, value: np.ndarray) -> None:
        """Put a tensor into an array like the parameter.

        Args:
            parameter: the array, of all layers of the stack.
            value: the tensor in torch's layout, of the right shape.
        """
        if self.end == "kernel":
            value = np.asarray(unstacked_view(self.layer).from_matrices(jnp.asarray(value.T)))
        parameter[self.position] = value.reshape(parameter.shape[len(self.position) :])

    @property
    def is_table(self) -> bool:
        """Whether it has a row for each token, as embeddings and heads have."""
        return isinstance(self.layer, nnx.Embed) or self.path.rpartition(".")[2] == "lm_head"


def _of_layer(path: str, layer: Any, to_name: Namer) -> Iterator[tuple[str, Place]]:
    linear = isinstance(layer, LINEAR)
    if linear and roles_of(layer).batch:
        return
    for end, (their, ndim) in _ENDS.items():
        variable = getattr(layer, end, None)
        if not isinstance(variable, nnx.Param) or (end == "kernel" and not linear):
            continue
        if ndim is None:
            ndim = len(declared_shape(layer)) if end == "kernel" else _bias_ndim(layer)
        stack = variable.shape[: len(variable.shape) - ndim]
        for index in np.ndindex(stack):
            try:
                name = to_name(path, index)
            except ValueError:
                break
            yield f"{name}.{their}", Place(path, layer, end, index)


def _bias_ndim(layer: Any) -> int:
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.out_features)
    return len(layer.bias_shape or ()) if isinstance(layer, nnx.Einsum) else 1


def places(model: nnx.Module, to_name: Namer, head: Mapping[str, Any]) -> dict[str, Place]:
    """Return the places of all tensors that have a name.

    Args:
        model: the model that has the parameters.
        to_name: what PEFT calls the layers.
        head: layers that the model is to have besides, by path.
    """
    layers = [(inject.dotted(path), layer) for path, layer in nnx.iter_modules(model)]
    return {
        name: place
        for path, layer in [*layers, *head.items()]
        for name, place in _of_layer(path, layer, to_name)
    }


def tensors(model: nnx.Module, paths: Sequence[str], to_name: Namer) -> dict[str, np.ndarray]:
    """Return the tensors of the layers at these paths, or in the modules there, by name.

    A head that is the embedding is written beside it, as PEFT would separate the two. So are layers
    whose names end with those of the others, which PEFT takes for these.

    Args:
        model: the model.
        paths: paths of layers, or of modules with layers.
        to_name: what PEFT calls the layers.

    Raises:
        ValueError: on a path without parameters to save, and on layers with adapters.
    """
    known = places(model, to_name, {}) if paths else {}
    chosen: dict[str, Place] = {}
    for path in paths:
        inside = {n: p for n, p in known.items() if f"{p.path}.".startswith(f"{path}.")}
        if not inside:
            raise ValueError(
                f"modules_to_save has {path!r}; expected the path of a layer with weights and a "
                f"name, or of a module with such layers{_hint(model, path)}"
            )
        chosen |= inside
    modules = {name.rpartition(".")[0] for name in chosen}
    chosen |= {n: p for n, p in known.items() if is_whole(n.rpartition(".")[0], modules)}
    for place in chosen.values():
        _require_plain(place)
    saved = {name: place.read() for name, place in chosen.items()}
    if tied := _tied_names(model, to_name):
        embedding, head = tied
        if embedding in saved:
            saved[head] = saved[embedding]
    return saved


def _hint(model: Any, path: str) -> str:
    tied = path == "lm_head" and inject.is_tied(model)
    return " (the head is the embedding; model.untie() gives it weights of its own)" if tied else ""


def _require_plain(place: Place) -> None:
    if isinstance(place.layer, Adapted):
        raise ValueError(
            f"{place.path} of modules_to_save is a {type(place.layer).__name__}; expected a layer "
            "without adapters"
        )


def _tied_names(model: Any, to_name: Namer) -> tuple[str, str] | None:
    """What PEFT calls the weights of an embedding and of a head that is the embedding, or None."""
    try:
        names = to_name("embed_tokens", ()), to_name("lm_head", ())
    except ValueError:
        return None
    return (f"{names[0]}.weight", f"{names[1]}.weight") if inject.is_tied(model) else None


def own_head(model: Any, saved: Saved, to_name: Namer) -> dict[str, Any]:
    """Return a head by its path, if the folder has one where the model has its embedding.

    Args:
        model: the model.
        saved: what the folder holds.
        to_name: what PEFT calls the layers.

    Raises:
        ValueError: on adapters of an embedding or head that the folder ties.
    """
    tied = _tied_names(model, to_name)
    if tied is None:
        return {}
    embedding, head = (name.removesuffix(".weight") for name in tied)
    own = head in saved.tokens
    if not saved.rules.config.get("ensure_weight_tying"):
        first, second = (saved.whole.get(name) for name in tied)
        same = first is not None and second is not None and np.array_equal(first, second)
        apart = saved.rules.is_whole(head) or saved.rules.is_whole(embedding)
        own = own or head in saved.updates or (apart and not same)
    elif {embedding, head} & saved.updates.keys():
        raise ValueError(
            "ensure_weight_tying is set with an adapter of the embedding or the head, which is "
            "not supported (PEFT 0.21 does not load what it saves then)"
        )
    return {"lm_head": model.new_head()} if own else {}


def replaced(
    folder: str | os.PathLike[str],
    model: nnx.Module,
    saved: Saved,
    to_name: Namer,
    head: Mapping[str, Any],
) -> list[tuple[nnx.Variable[Any], Array]]:
    """Return the parameters that the folder's tensors replace, and their new values.

    Args:
        folder: path of the folder, for messages.
        model: the model that has the parameters.
        saved: what the folder holds.
        to_name: what PEFT calls the layers.
        head: what `own_head` returned.

    Raises:
        ValueError: on tensors that belong to no parameter, are of another shape or not finite in
            its dtype, and on parameters that should have one.
    """
    asked = ("modules_to_save", "trainable_token_indices")
    if not saved.whole and not saved.tokens and not any(map(saved.rules.config.get, asked)):
        return []
    known = places(model, to_name, head)
    tied = _tied_names(model, to_name) or ()
    if len(tied) == 2 and not head and tied[0] in known:
        known[tied[1]] = known[tied[0]]  # one parameter by two names
    changes = _Changes(folder)
    _add_whole(changes, known, tied, saved)
    _add_rows(changes, known, tied, saved)
    return changes.arrays()


def _add_whole(
    changes: _Changes, known: Mapping[str, Place], tied: Sequence[str], saved: Saved
) -> None:
    """Add the tensors that are saved whole; `tied` are the names of an embedding and its head."""
    is_whole = {
        name: saved.rules.is_whole(name.rpartition(".")[0]) for name in {*known, *saved.whole}
    }
    names = {
        name for name, place in known.items() if is_whole[name] or _is_base(name, place, saved)
    }
    missing = {n for n in known if is_whole[n] and n not in saved.whole and n not in tied[1:]}
    if different := sorted(missing | (saved.whole.keys() - names)):
        raise ValueError(
            f"{changes.folder} and the model differ in modules_to_save: only one of them has "
            f"{', '.join(different[:4])}"
        )
    # What PEFT loads into shared weights of the base comes first, then what it keeps apart.
    for name in sorted(saved.whole, key=lambda name: is_whole[name]):
        if is_whole[name]:
            _require_plain(known[name])
        shared = name in tied and not is_whole[name]
        for target in tied if shared else [name]:
            changes.add(name, known[target], saved.whole[name])


def _add_rows(
    changes: _Changes, known: Mapping[str, Place], tied: Sequence[str], saved: Saved
) -> None:
    """Add the rows of tokens; `tied` are the names of an embedding and its head."""
    folder, rules = changes.folder, saved.rules
    asked = rules.config.get("trainable_token_indices")
    if bool(saved.tokens) != bool(asked):
        raise ValueError(
            f"{folder} has trainable_token_indices or tokens' rows, one without the other"
        )
    # Of two equal lists PEFT saves one: the weights are tied.
    used = [rules.tokens(module) for module in saved.tokens]
    # It ties the rows too, unless the head has its own.
    of_head = {f"{module}.weight" for module in saved.tokens} & {*tied[1:]}
    for module, indices in asked.items() if isinstance(asked, dict) else ():
        if indices not in used:
            raise ValueError(f"{folder} has no rows of the trainable_token_indices of {module}")
    for module, rows in saved.tokens.items():
        name = f"{module}.weight"
        if name not in known or not known[name].is_table:
            raise ValueError(
                f"{folder} has rows of tokens for {module}, which is not an embedding here"
            )
        for target in tied if name in tied and not of_head else [name]:
            changes.add_rows(name, known[target], rows, rules.tokens(module) or [])


def _is_base(name: str, place: Place, saved: Saved) -> bool:
    """Whether PEFT may save the tensor along without being asked by modules_to_save."""
    bias = place.end == "bias" and saved.rules.config.get("bias", "none") != "none"
    return bias or place.is_table or name.rpartition(".")[0] in saved.updates


class _Changes:
    """New values of parameters, each of which may be a stack of layers."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        self.changed: dict[int, tuple[Place, np.ndarray]] = {}

    def _array(self, place: Place) -> np.ndarray:
        variable = place.variable
        return self.changed.setdefault(id(variable), (place, np.array(variable[...])))[1]

    def add(self, name: str, place: Place, value: np.ndarray) -> None:
        """Put a whole tensor into its place."""
        shape = place.read().shape
        if value.shape != shape:
            hint = ", or nys.models.resize_token_embeddings first" if place.is_table else ""
            raise ValueError(
                f"{self.folder} has {name} of shape {value.shape} (torch's layout), and the model "
                f"{shape}; expected an adapter of this base{hint}"
            )
        with np.errstate(over="ignore"):
            place.write(self._array(place), value)

    def add_rows(self, name: str, place: Place, rows: np.ndarray, tokens: list[int]) -> None:
        """Put rows of tokens into their places in a table."""
        table = place.read().copy()
        inside = all(0 <= token < len(table) for token in tokens)
        if rows.shape != (len(tokens), *table.shape[1:]) or not inside:
            raise ValueError(
                f"{self.folder} has rows {rows.shape} of {name} for the tokens {tokens[:8]}, and "
                f"the model's table is {table.shape}; expected a row for each of them"
            )
        array = self._array(place)
        with np.errstate(over="ignore"):
            if place.end == "kernel":
                array[:, tokens] = rows.T
            else:
                array[tokens] = rows

    def arrays(self) -> list[tuple[Any, Array]]:
        """The parameters and their new values, placed as they were."""
        pairs = []
        for place, array in self.changed.values():
            narrow = jnp.dtype(getattr(place.layer, "dtype", None) or array.dtype)
            with np.errstate(over="ignore"):
                finite = np.isfinite(array).all() and np.isfinite(array.astype(narrow)).all()
            if not finite:
                raise ValueError(
                    f"{place.path} of modules_to_save is finite in {self.folder} and not in "
                    f"{array.dtype}, the parameter's dtype, or {narrow}, in which the layer "
                    "computes"
                )
            old = place.variable[...]
            pairs.append((place.variable, jax.device_put(array, old.sharding)))
        return pairs
