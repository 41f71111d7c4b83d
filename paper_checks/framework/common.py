"""What the claims share: seeds, spectra, batches of problems and starts, array functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework.claim import Parts

SEED = 20250
M, N = 60, 40
KAPPAS = {"float64": (2.0, 1e2, 1e4, 1e6), "float32": (2.0, 1e1, 1e2, 1e3)}
PROFILES = {
    "geometric": "geometric",
    "last": "near 1 except for the last value",
    "repeated": "two repeated values",
    "clustered": "clusters 1e-6 apart",
}
"""The spectra by name, and how the report describes them."""
SCALES = (0.1, 1.0, 10.0)
"""ξ, in turn."""
UNITS = (1.0, 1e6, 1e-6)
"""σ_1(A), in turn."""
SEEDS = 3

Dtype = Literal["float64", "float32"]
DTYPES: tuple[Dtype, ...] = ("float64", "float32")


def short(value: float) -> str:
    """Return a number as the report's texts write it: 0.1, 60, 1e6."""
    return f"{value:g}".replace("e+0", "e").replace("e-0", "e-")


def listed(values: Iterable[float]) -> str:
    """Return numbers as the report's texts list them, separated by commas."""
    return ", ".join(map(short, values))


def eps(dtype: str) -> float:
    """Return machine epsilon."""
    return float(np.finfo(dtype).eps)


def per_dtype(measure: Callable[[Dtype], Any], bound: float, label: str = "") -> Parts:
    """Return one measurement in float64 and in float32, each with the bound, for `worst`.

    Args:
        measure: takes the name of a dtype and returns the number measured in it.
        bound: the upper bound of both numbers.
        label: what the number is, where a claim measures several.
    """
    return {f"{label} {dtype}".strip(): (float(measure(dtype)), bound) for dtype in DTYPES}


def spectrum(profile: str, rank: int, kappa: float) -> np.ndarray:
    """Return singular values from 1 to 1/κ, descending; the value 1 if the rank is 1.

    Args:
        profile: a key of `PROFILES`: "geometric"; "last" as in the paper, near 1 except for the
            last; "repeated", one half 1 and one half 1/κ; "clustered", in pairs that differ by
            1e-6.
        rank: how many values.
        kappa: their ratio κ.
    """
    if rank == 1:
        return np.ones(1)
    if profile == "geometric":
        return np.geomspace(1.0, 1.0 / kappa, rank)
    if profile == "repeated":
        return np.where(np.arange(rank) < (rank + 1) // 2, 1.0, 1.0 / kappa)
    if profile == "clustered":
        pairs = np.repeat(np.geomspace(1.0, 1.0 / kappa, (rank + 1) // 2), 2)[:rank]
        values = pairs * (1 + 1e-6 * (np.arange(rank) % 2 == 0))
        return values / values[0]
    return np.array([*(1.0 - 0.3 * i / rank for i in range(rank - 1)), 1.0 / kappa])


def key(*salt: int) -> jax.Array:
    """Return the PRNG key of the seed and the salts."""
    result = jax.random.key(SEED)
    for s in salt:
        result = jax.random.fold_in(result, s)
    return result


def keys(count: int, *salt: int) -> jax.Array:
    """Return `count` PRNG keys of the seed and the salts.

    Args:
        count: how many.
        *salt: numbers that distinguish claims.
    """
    return jax.random.split(key(*salt), count)


def over_grid(fn: Callable[..., Any], *axes: Any) -> np.ndarray:
    """Return `fn` of every combination of entries of `axes`, with one axis of the result per axis.

    The combinations are one compiled batch: each level of nested `vmap` would compile into loops
    around every factorization. The same `fn` with axes of the same shapes compiles once.

    Args:
        fn: takes one entry of each axis.
        *axes: arrays, or trees of arrays of one length.
    """
    axes = tuple(jax.tree.map(jnp.asarray, axis) for axis in axes)
    shape = tuple(len(jax.tree.leaves(axis)[0]) for axis in axes)
    indices = np.indices(shape).reshape(len(shape), -1)
    cells = [jax.tree.map(lambda x, i=i: x[i], axis) for axis, i in zip(axes, indices, strict=True)]
    result = np.asarray(_batched(fn)(*cells))
    return result.reshape(*shape, *result.shape[1:])


@functools.cache
def _batched(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(jax.vmap(fn))


@functools.partial(jax.jit, static_argnums=1)
def psd_batch(batch_keys: Any, m: int, spectra: Any) -> Any:
    """Return `spectra.psd` over a batch.

    Args:
        batch_keys: PRNG keys, (b,).
        m: the side of A.
        spectra: diag(Σ), (b, k).
    """
    return jax.vmap(lambda k, s: nys.spectra.psd(k, m, s))(batch_keys, spectra)


@functools.partial(jax.jit, static_argnums=2)
def start_batch(batch_keys: Any, a: Any, rank: int, scale: Any, noise: Any) -> Any:
    """Return `initializers.perturbed` over a batch; with noise 0 it equals `nystrom` bit by bit.

    Args:
        batch_keys: PRNG keys.
        a: A, (b, m, m).
        rank: the columns of X_0.
        scale: ξ, (b,).
        noise: ξ_n, a number or (b,).
    """
    noise = jnp.broadcast_to(noise, scale.shape)
    return jax.vmap(lambda k, a, s, n: nys.initializers.perturbed(k, a, rank, s, n))(
        batch_keys, a, scale, noise
    )


@functools.cache
def over_time(fn: Any, *in_axes: int | None) -> Any:
    """Return `fn` of one iterate, compiled over (batch, time).

    Args:
        fn: takes one iterate and constants.
        *in_axes: 0 for an argument with a time axis, None for one without.
    """
    return jax.jit(jax.vmap(jax.vmap(fn, in_axes=in_axes)))


def transposed(x: Any) -> np.ndarray:
    """Return x with its last two axes exchanged."""
    return np.swapaxes(np.asarray(x), -1, -2)


def frobenius(x: Any) -> np.ndarray:
    """Return Frobenius norms of the last two axes."""
    return np.linalg.norm(np.asarray(x), axis=(-2, -1))


def singular_values(x: Any) -> np.ndarray:
    """Return singular values of the last two axes, descending."""
    return np.linalg.svd(np.asarray(x), compute_uv=False)


def largest(x: Any) -> float:
    """Return the maximum as a float; NaN if there is one."""
    return float(np.max(np.asarray(x)))
