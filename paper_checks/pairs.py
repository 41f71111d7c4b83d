"""Families of asymmetric problems over shapes, spectra, scales and seeds, and their trajectories.

Cells of one shape are one batch: compilation costs more than the runs.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks import common
from paper_checks.common import Dtype, PairFamily, Regime, frobenius

Start = Literal["nystrom", "random", "lifted"]
"""X_0 = AΩ and Y_0 = 0; or a random X_0 and Y_0 = 0; or X_0 = AΩ and a random Y_0."""


class Shape(NamedTuple):
    """m, n, r and r_A of a batch."""

    m: int
    n: int
    rank: int
    true_rank: int


SHAPES: dict[Regime, tuple[Shape, ...]] = {
    "exact": (Shape(60, 40, 5, 5), Shape(60, 40, 1, 1), Shape(60, 6, 6, 6), Shape(6, 60, 6, 6)),
    "under": (Shape(60, 40, 5, 8), Shape(60, 40, 1, 8), Shape(60, 6, 4, 6)),
    "over": (Shape(60, 40, 8, 5), Shape(60, 40, 5, 1), Shape(60, 6, 6, 2)),
}
"""First the shape of the controls; then r or r_A = 1; then A of full rank, or r = min(m, n)."""

KINDS = ("geometric", "last", "repeated", "clustered")
SIZES = (1.0, 1e-6, 1e6)
SEEDS = 3
STEPS = 12


def where(*regimes: Regime, etas: str = "η = .1, .5, .9, 1", single: bool = True) -> str:
    """The runs of a claim in words; `single` if they are also made in float32."""
    shapes = ", ".join(
        f"{m} × {n} (r = {r}, r_A = {k})" for regime in regimes for m, n, r, k in SHAPES[regime]
    )
    kappas = "κ = 2 … 1e6" + (" (float32: 2 … 1e3)" if single else "") + ", 1 if r_A = 1"
    return (
        f"{shapes}; Nyström start X_0 = AΩ, Y_0 = 0; {kappas}; geometric, near-constant, repeated "
        f"and clustered singular values; σ_1(A) = 1e-6, 1, 1e6; ξ = .1, 1, 10; {etas}; "
        f"three seeds; float64" + (" and float32" if single else "")
    )


def spectrum(kind: str, rank: int, kappa: float) -> np.ndarray:
    """Singular values from 1 to 1/κ; "repeated": one half each; "clustered": split by 1e-9."""
    if rank == 1:
        return np.ones(1)
    if kind in ("geometric", "last"):
        return common.spectrum(kind, rank, kappa)
    halves = np.where(np.arange(rank) < rank / 2, 1.0, 1 / kappa)
    return halves * (1 - 1e-9 * np.arange(rank)) if kind == "clustered" else halves


@functools.partial(jax.jit, static_argnums=3)
def _starts(keys: Any, a: Any, scales: Any, rank: int) -> Any:
    """AΩ, over a batch."""
    start = nys.initializers.nystrom_factors
    return jax.vmap(lambda key, a, scale: start(key, a, rank, scale).left)(keys, a, scales)


def _orthonormal(rng: np.random.Generator, batch: int, m: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((batch, m, k)))[0]


@functools.cache
def _cells(shape: Shape, dtype: Dtype, etas: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """κ × kind × η × seed as arrays: spectra, η, κ, ξ."""
    kappas = common.KAPPAS[dtype] if shape.true_rank > 1 else (1.0,)
    kinds = KINDS if shape.true_rank > 1 else ("geometric",)
    cells = list(itertools.product(kappas, kinds, etas, range(SEEDS)))
    spectra = [
        SIZES[(i + seed) % 3] * spectrum(kind, shape.true_rank, kappa)
        for i, (kappa, kind, _, seed) in enumerate(cells)
    ]
    scales = [common.SCALES[(i // 3) % 3] for i in range(len(cells))]
    return (
        np.array(spectra),
        np.array([eta for _, _, eta, _ in cells]),
        np.array([kappa for kappa, *_ in cells]),
        np.array(scales),
    )


@functools.cache
def family(
    regime: Regime,
    index: int,
    dtype: Dtype,
    start: Start = "nystrom",
    etas: tuple[float, ...] = common.PAIR_ETAS,
) -> PairFamily:
    """The trajectories of (6) and (35) on one shape of SHAPES."""
    shape = SHAPES[regime][index]
    spectra, eta, kappa, scales = _cells(shape, dtype, etas)
    salt = {"exact": 0, "under": 1, "over": 2}[regime]
    rng = np.random.default_rng((common.SEED, 150, salt, index))
    left = _orthonormal(rng, len(eta), shape.m, shape.true_rank)
    right = _orthonormal(rng, len(eta), shape.n, shape.true_rank)
    a = (left * spectra[:, None]) @ np.swapaxes(right, 1, 2)
    x = _starts(common.keys(len(eta), 150, salt, index), a, scales, shape.rank)
    y = np.zeros((len(eta), shape.n, shape.rank))
    size = frobenius(x)[:, None, None]
    if start == "random":  # of the size of AΩ
        x = rng.standard_normal(x.shape)
        x *= size / frobenius(x)[:, None, None]
    if start == "lifted":  # of the size of Aᵀ(AΩ)†ᵀ
        y = rng.standard_normal(y.shape)
        y *= frobenius(a)[:, None, None] / size / frobenius(y)[:, None, None]
    # The float32 runs are those of the same problems, rounded.
    kind = jnp.dtype(dtype)
    a, left, right, x, y, sigma = (jnp.asarray(v, kind) for v in (a, left, right, x, y, spectra))
    x, y = common.pair_trajectories(a, nys.Factors(x, y), jnp.asarray(eta, kind), STEPS)
    return PairFamily(a, left, right, sigma, eta, kappa, x, y)


def families(regime: Regime, dtype: Dtype, start: Start = "nystrom") -> list[PairFamily]:
    """All shapes of a regime; the first alone for the starts of the controls."""
    count = len(SHAPES[regime]) if start == "nystrom" else 1
    return [family(regime, index, dtype, start) for index in range(count)]


def products(f: PairFamily) -> np.ndarray:
    """X_tY_tᵀ."""
    return np.asarray(f.x) @ np.swapaxes(np.asarray(f.y), -1, -2)


def norm(f: PairFamily) -> np.ndarray:
    """‖A‖_F."""
    return frobenius(f.a)
