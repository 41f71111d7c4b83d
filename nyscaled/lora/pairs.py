"""Adapters that others have put in: where they are, and how they lie over their kernels.

Found by name, in a tree of parameters or among the variables of an NNX model:

    lora_a, lora_b              with `kernel` beside them (flax nnx.LoRA, nnx.LoRALinear)
    <w>_lora_a, <w>_lora_b      with <w> beside them (qwix)
    lora/a, lora/b              with `w` or `kernel` beside `lora` (gemma)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

from nyscaled.lora.axes import Split

Path = tuple[str, ...]


class Pair(NamedTuple):
    """An adapter: its layer's path, those of its factors, and that of the kernel if there is one."""

    layer: str
    a: Path
    b: Path
    kernel: Path | None


class Layout(NamedTuple):
    """A pair over its kernel: leading axes in common, the kernel's split behind them."""

    depth: int
    parts: Split


def find(paths: Iterable[Path]) -> list[Pair]:
    """The pairs among the leaves of a tree.

    Raises:
        ValueError: on a factor without its partner; it names the leaf.
    """
    known = set(paths)
    found = []
    for path in sorted(known):
        if (relatives := _relatives(path)) is None:
            continue
        partner, layer, kernels = relatives
        if partner not in known:
            raise ValueError(
                f"{'.'.join(path)} has no {partner[-1]} beside it; expected both factors"
            )
        if path[-1].endswith("a"):
            kernel = next((k for k in kernels if k in known), None)
            found.append(Pair(".".join(layer) or "model", path, partner, kernel))
    return found


def _relatives(path: Path) -> tuple[Path, Path, list[Path]] | None:
    """A factor's partner, its layer, and where the kernel may be; None for other leaves."""
    parent, last = path[:-1], path[-1]
    other = last[:-1] + {"a": "b", "b": "a"}.get(last[-1:], "")
    if last in ("lora_a", "lora_b"):
        if parent[-2:-1] == ("adapters",):  # of `apply`, named
            return (*parent, other), parent[:-2], []
        layer = parent[:-1] if parent[-1:] == ("lora",) else parent
        return (*parent, other), layer, [(*layer, "kernel"), (*layer, "base_module", "kernel")]
    if last.endswith(("_lora_a", "_lora_b")):
        weight = last[: -len("_lora_a")]
        layer = parent if weight == "kernel" else (*parent, weight)
        return (*parent, other), layer, [(*parent, weight)]
    if last in ("a", "b") and parent[-1:] == ("lora",):
        return (*parent, other), parent[:-1], [(*parent[:-1], "w"), (*parent[:-1], "kernel")]
    return None


def leading(a: tuple[int, ...], b: tuple[int, ...], name: str) -> int:
    """How many leading axes a (…, in…, r) and b (…, r, out…) share: the most that fit.

    Raises:
        ValueError: if the two do not go together.
    """
    fits = [p for p in range(min(len(a), len(b)) - 1) if a[:p] == b[:p] and b[p] == a[-1]]
    if not fits:
        raise ValueError(
            f"{name}: factors {a} and {b} do not go together; expected (…, in, r), (…, r, out)"
        )
    return fits[-1]


def layout(kernel: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], name: str) -> Layout:
    """How factors of these shapes lie over a kernel.

    The kernel's first axes are taken as inputs where that fits (as in `Dense`), else the axes whose
    lengths are those of a (as in the einsum `BTD,NDH->BTNH`).

    Raises:
        ValueError: if nothing fits, or more than one choice of axes does.
    """
    depth = leading(a, b, name)
    rows, columns, rest = a[depth:-1], b[depth + 1 :], kernel[depth:]
    axes = tuple(range(len(rest)))
    splits: list[Split] = []
    if kernel[:depth] == a[:depth]:
        sizes = math.prod(rows), math.prod(columns)
        splits = [
            Split((), axes[:k], axes[k:])
            for k in range(1, len(rest))
            if (math.prod(rest[:k]), math.prod(rest[k:])) == sizes
        ][:1] or [
            Split((), chosen, others)
            for chosen in itertools.combinations(axes, len(rows))
            if (others := tuple(i for i in axes if i not in chosen)) is not None
            and tuple(rest[i] for i in chosen) == rows
            and tuple(rest[i] for i in others) == columns
        ]
    if len(splits) != 1:
        raise ValueError(
            f"{name}: factors {a} and {b} lie over the kernel {kernel} in {len(splits)} ways; expected one"
        )
    return Layout(depth, splits[0])
