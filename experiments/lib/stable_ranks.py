"""Stable ranks of weights: how far their spectra are from that of a matrix of rank one."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from flax import nnx


def kernels(model: nnx.Module, targets: str) -> list[np.ndarray]:
    """Return the kernels of layers in float64.

    Args:
        model: the model.
        targets: pattern of the layers' paths.
    """
    return [
        np.asarray(getattr(layer, "kernel")[...], np.float64)  # noqa: B009
        for path, layer in nnx.iter_modules(model)
        if re.fullmatch(targets, ".".join(map(str, path)))
    ]


def quartiles(weights: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the quartiles of ‖W‖_F² / ‖W‖² over weights.

    Args:
        weights: the weights W.

    Examples:
        >>> quartiles([np.eye(2), np.eye(4)])["median"]
        3.0
    """
    ranks: list[float] = []
    for weight in weights:
        values = np.linalg.svd(weight, compute_uv=False)
        ranks.append(float((values**2).sum() / values[0] ** 2))
    edges = np.quantile(ranks, (0.25, 0.5, 0.75)).tolist()
    return dict(zip(("lower", "median", "upper"), edges, strict=True))
