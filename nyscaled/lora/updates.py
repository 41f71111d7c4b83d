"""Factors between PEFT's tensors, one pair a module, and those of a layer, which may be a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from nyscaled.checkpoints import peft
from nyscaled.lora.adapter import Adapter
from nyscaled.lora.recipe import Weights, place, scaling_of
from nyscaled.lora.view import Layer, kernel_of, unstacked_view, view_of


def sides(path: str, layer: Layer) -> tuple[int, int]:
    """Return (in, out) of the layer's matrix.

    Args:
        path: path of the layer, for messages.
        layer: the layer.

    Raises:
        ValueError: if the layer holds several matrices (batch axes), which PEFT has no form for.
    """
    view = unstacked_view(layer)
    if view.batch:
        raise ValueError(
            f"{path} has batch axes of lengths {list(view.batch)} (experts, say), for which PEFT's "
            "format has no form; expected a layer of one matrix"
        )
    return view.sides


def to_updates(
    layer: Layer, adapter: Adapter, modules: Mapping[str, tuple[int, ...]], stabilized: bool
) -> dict[str, peft.Update]:
    """Return the updates of an adapter, one per layer of its stack.

    Layers of a stack, and columns, of which both factors are zero are left out, unless all are:
    `from_updates` has put them in.

    Args:
        layer: the layer that has the adapter.
        adapter: the adapter.
        modules: the indices of the layers in the stack, by PEFT's names.
        stabilized: whether the file says that the scaling is α/√r.
    """
    a, b, scaling = _as_lora(adapter)
    updates, rank = {}, a.shape[-1]
    used = np.any(a != 0, axis=-2) | np.any(b != 0, axis=-1)
    whole = not adapter.stack or not used.any()
    for module, index in modules.items():
        last = rank if whole else max(np.flatnonzero(used[index]) + 1, default=0)
        if last:
            alpha = scaling * (last**0.5 if stabilized else last)
            if last == adapter.rank and adapter.rank_stabilized == stabilized:
                alpha = adapter.alpha  # without the rounding
            pair = a[index][:, :last].T, b[index][:last].T
            updates[module] = peft.Update(*pair, alpha, isinstance(layer, nnx.Embed))
    return updates


def _as_lora(adapter: Adapter) -> tuple[np.ndarray, np.ndarray, float]:
    """Factors of plain LoRA with the adapter's update, and the scaling of their product."""
    a, b = np.asarray(adapter.lora_a[...]), np.asarray(adapter.lora_b[...])
    if adapter.start is not None:
        a0, b0 = (np.asarray(adapter.start[side][...]).astype(a.dtype) for side in "ab")
        a, b = np.concatenate([a, a0], -1), np.concatenate([b, -b0], -2)
    return a, b, adapter.scaling


def from_updates(
    path: str,
    layer: Layer,
    updates: Sequence[peft.Update | None],
    rank_stabilized: bool,
    dtype: DTypeLike,
) -> tuple[Weights, float]:
    """Return the layer's factors, placed as its kernel is, and their α.

    Args:
        path: path of the layer, for messages.
        layer: the layer that is to have the adapter.
        updates: updates of its matrices in order. None stands for zero.
        rank_stabilized: whether the scaling is α/√r.
        dtype: dtype of the factors.

    Raises:
        ValueError: on tensors of another shape than the layer's, or that are not finite in `dtype`
            or in the layer's own dtype.
    """
    known = [update for update in updates if update is not None]
    embedding = isinstance(layer, nnx.Embed)
    if any(update.embedding != embedding for update in known):
        raise ValueError(
            f"the tensors of {path} are {'not ' if embedding else ''}an embedding's, and it is a "
            f"{type(layer).__name__}; expected an adapter of this base"
        )
    for down, up, *_ in known:
        if (down.shape[1], up.shape[0]) != sides(path, layer):
            raise ValueError(
                f"the tensors of {path} are for a layer {(down.shape[1], up.shape[0])} (in, out), "
                f"and it is {sides(path, layer)}; expected an adapter of this base"
            )
    ranks = {u.down.shape[0] for u in known}
    rank, alphas = max(ranks), {u.alpha for u in known}
    uniform = len(ranks) == len(alphas) == 1
    if uniform:
        alpha = known[0].alpha
    else:
        largest = max((_scaling(u, rank_stabilized) for u in known), key=abs)
        alpha = largest * (rank**0.5 if rank_stabilized else rank)
    scaling = scaling_of(alpha, rank, rank_stabilized)
    rows, columns = sides(path, layer)
    a = np.zeros((len(updates), rows, rank), dtype)
    b = np.zeros((len(updates), rank, columns), dtype)
    for i, update in enumerate(updates):
        if update is None:
            continue
        r = update.down.shape[0]
        share = 1.0 if uniform or not scaling else _scaling(update, rank_stabilized) / scaling
        up = update.up if share == 1 else update.up.astype(np.float64) * share
        with np.errstate(over="ignore"):
            a[i, :, :r], b[i, :r] = update.down.T.astype(dtype), up.T.astype(dtype)
        _require_usable(path, layer, a[i], b[i], scaling)
    view = view_of(layer)
    first, second = (jnp.asarray(x.reshape(*view.stack, *x.shape[1:])) for x in (a, b))
    return place(Weights(first, second), kernel_of(layer), view), alpha


def _scaling(update: peft.Update, rank_stabilized: bool) -> float:
    return scaling_of(update.alpha, update.down.shape[0], rank_stabilized)


def _require_usable(path: str, layer: Layer, a: np.ndarray, b: np.ndarray, scaling: float) -> None:
    """Raise ValueError unless factors, scaling and product are finite where they are used."""
    narrow = jnp.dtype(layer.dtype or a.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = all(np.isfinite(x.astype(narrow)).all() for x in (a, b))
        columns = np.abs(a).max(-2, initial=0).astype(np.float64)
        rows = np.abs(b).max(-1, initial=0).astype(np.float64)
        bound = abs(scaling) * float(np.sum(columns * rows))
    if not finite or not bound <= float(jnp.finfo(narrow).max):
        raise ValueError(
            f"the update of {path} is finite in the file and not in {a.dtype}, as which it is "
            f"loaded, or {narrow}, in which the layer computes; expected smaller entries or a "
            "wider dtype"
        )
