"""Select the active adapters, and fold adapters into the kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from nyscaled.lora import foreign
from nyscaled.lora.adapter import Adapter
from nyscaled.lora.inject import adapted_layers, is_tied, require_name
from nyscaled.lora.view import Layer, kernel_of, roles_of, view_of


def activate(
    model: nnx.Module, names: str | Sequence[str] = (), *, rows: Sequence[str | None] | None = None
) -> None:
    """Select the active adapters. Only arrays change, so nothing is compiled again.

    What `merge` put into the kernels stays there, whichever sets are active.

    Args:
        model: a model with adapters of `apply` or `load_peft`.
        names: the sets that are active for every input. By default none are: the base is left.
        rows: in place of `names`, the set for each row of the batch (None for the base): one call
            then serves several adapters from one W_0 (A.3). The batch is the input's first axis.
            A change from sets to rows, or of the number of rows, changes shapes and compiles once.
            A call with another number of rows is a ValueError.

    Raises:
        ValueError: on an unknown name, names beside rows, no rows, and rows for a layer with batch
            axes (experts), whose input has another first axis. Nothing has been changed then.

    Examples:
        >>> import jax, nyscaled as nys
        >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        >>> for name in ("english", "french"):
        ...     _ = nys.lora.apply(model, 2, targets=".*", key=jax.random.key(0), name=name)
        >>> activate(model, "french")
        >>> activate(model, rows=["english", None, "french"])
    """
    layers = adapted_layers(model)
    active = [names] if isinstance(names, str) else _listed("names", names)
    if rows is not None:
        rows = _listed("rows", rows)
        if active or not rows:
            raise ValueError(
                f"names is {names!r:.80} and rows is {rows!r:.80}; expected one of the two, and a "
                "row at least"
            )
    for name in (*active, *(n for n in rows or () if n is not None)):
        if not isinstance(name, str):
            raise ValueError(f"a name is {name!r:.80}; expected a string")
        require_name(layers, name)
    for path, layer in layers.items():
        if rows is not None and roles_of(layer).batch:
            raise ValueError(
                f"{path} has batch axes; expected layers whose input begins with the rows"
            )
    for layer in layers.values():
        for name, adapter in layer.adapters.items():
            value = float(name in active) if rows is None else [float(name == r) for r in rows]
            gate = jnp.asarray(value, adapter.gate.dtype)
            # In place, for functions that hold the model, as those of nnx.cached_partial do.
            adapter.gate.set_value(jnp.broadcast_to(gate, (*adapter.stack, *gate.shape)))


def _listed(what: str, names: Any) -> list[Any]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"{what} is {names!r:.80}; expected a sequence of names")
    return list(names)


def merge(model: nnx.Module, name: str = "default", *, alpha: float | None = None) -> None:
    """Add an adapter's update to the kernels: W_0 + s·a·b. The adapter is then skipped in calls.

    An adapter that is not active is merged too. The sum is computed in float32 and rounded to the
    kernel's dtype, which in bfloat16 may lose much of a small update. `remove` afterwards leaves
    plain layers with the merged kernels. Adapters that flax or qwix have put in are merged as well:
    their b becomes zero, and `unmerge` does not restore it.

    Args:
        model: a model with adapters.
        name: name of the set, among those of `apply`.
        alpha: α of adapters of flax and qwix, for s = α/r. None is the α that was passed to
            `initialize`, or s = 1, which is right for flax.

    Raises:
        ValueError: on an unknown name or one that is merged already, an adapter of an embedding
            that is also the head, kernels that layers share or qwix quantized, and adapters of qwix
            without `alpha`. Nothing has been changed then.

    Examples:
        >>> model = nnx.Sequential(nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0)))
        >>> merge(model)
    """
    others = [(other, other.merged()) for other in foreign.find(model, alpha)]
    _require_own(model, {other.path: other.kernel for other, _ in others})
    if not others or adapted_layers(model):
        _fold(model, name, merged=True)
    for other, kernel in others:
        other.kernel[...] = kernel
        other.b[...] = jnp.zeros_like(other.b[...])


def unmerge(model: nnx.Module, name: str = "default") -> None:
    """Take a merged update out of the kernels again, to rounding (no copy of W_0 is kept).

    Args:
        model: a model with merged adapters.
        name: the name of the set of adapters.

    Raises:
        ValueError: on an unknown name or one that is not merged.

    Examples:
        >>> import jax, nyscaled as nys
        >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        >>> _ = nys.lora.apply(model, 2, targets=".*", key=jax.random.key(0))
        >>> merge(model)
        >>> unmerge(model)
    """
    _fold(model, name, merged=False)


def _fold(model: nnx.Module, name: str, *, merged: bool) -> None:
    adapted = adapted_layers(model)
    require_name(adapted, name)
    layers = {p: m for p, m in adapted.items() if name in m.adapters}
    for path, layer in layers.items():
        if layer.adapters[name].merged == merged:
            raise ValueError(f"{path}: the adapter {name!r} is {'' if merged else 'not '}merged")
        if isinstance(layer, nnx.Embed) and is_tied(model):
            raise ValueError(
                f"{path} is the model's head too, which the adapter does not change; expected a "
                "head of its own before merging: model.untie()"
            )
    _require_own(model, {path: kernel_of(layer) for path, layer in layers.items()})
    for layer in layers.values():
        adapter = layer.adapters[name]
        _add(layer, adapter, 1 if merged else -1)
        adapter.merged = merged


def _require_own(model: nnx.Module, kernels: Mapping[str, object]) -> None:
    """Raise ValueError if a kernel is another layer's too, which its adapter does not change."""
    variables = (v for _, module in nnx.iter_modules(model) for v in vars(module).values())
    owners = Counter(id(v) for v in variables if isinstance(v, nnx.Variable))
    if shared := [path for path, kernel in kernels.items() if owners[id(kernel)] > 1]:
        raise ValueError(
            f"the kernel of {', '.join(shared[:4])} is another layer's too, which the adapter does "
            "not change; expected a kernel of its own before merging"
        )


def _add(layer: Layer, adapter: Adapter, sign: int) -> None:
    variable = kernel_of(layer)
    kernel = variable[...]
    change = view_of(layer).from_matrices(adapter.product())
    variable[...] = (kernel.astype(change.dtype) + sign * change).astype(kernel.dtype)
