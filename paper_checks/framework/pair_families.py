"""Families of asymmetric problems over shapes, spectra, scales and seeds, and their trajectories.

The runs of one shape are one batch, because compilation costs more than the runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework import common
from paper_checks.framework.common import (
    KAPPAS,
    SCALES,
    SEEDS,
    Dtype,
    M,
    N,
    frobenius,
    listed,
    short,
    transposed,
)
from paper_checks.framework.families import Regime

Start = Literal["nystrom", "random", "lifted"]
"""X_0 = AΩ and Y_0 = 0; or a random X_0 and Y_0 = 0; or X_0 = AΩ and a random Y_0."""


class Shape(NamedTuple):
    """m, n, r and r_A of a batch."""

    m: int
    n: int
    rank: int
    true_rank: int


SHAPES: dict[Regime, tuple[Shape, ...]] = {
    "exact": (Shape(M, N, 5, 5), Shape(M, N, 1, 1), Shape(M, 6, 6, 6), Shape(6, M, 6, 6)),
    "under": (Shape(M, N, 5, 8), Shape(M, N, 1, 8), Shape(M, 6, 4, 6)),
    "over": (Shape(M, N, 8, 5), Shape(M, N, 5, 1), Shape(M, 6, 6, 2)),
}
"""First the shape of the controls; then r or r_A = 1; then A of full rank, or r = min(m, n)."""
SPLIT = 1e-9
PROFILES = {
    "geometric": "geometric",
    "last": "near 1 except for the last value",
    "repeated": "two repeated values",
    "clustered": f"clusters {short(SPLIT)} apart",
}
"""The spectra by name, and how the report describes them."""
UNITS = (1.0, 1e-6, 1e6)
"""σ_1(A), in turn."""
ETAS = (0.1, 0.5, 0.9, 1.0)
STEPS = 12

RANDOM_START: dict[str, Any] = {
    "removes": "the Nyström start",
    "instead": "a random X_0 of the same norm, also with Y_0 = 0",
    "start": "random",
}
"""The control of most asymmetric claims."""


def where(*regimes: Regime, etas: tuple[float, ...] = ETAS, both_dtypes: bool = True) -> str:
    """Return the runs of a claim in the words of the report.

    Args:
        *regimes: "exact", "under" or "over".
        etas: the step sizes that the claim uses.
        both_dtypes: whether the claim is also measured in float32.
    """
    shapes = ", ".join(
        f"{m} × {n} (r = {r}, r_A = {k})" for regime in regimes for m, n, r, k in SHAPES[regime]
    )
    double, single = (
        f"{short(KAPPAS[d][0])} … {short(KAPPAS[d][-1])}" for d in ("float64", "float32")
    )
    return (
        f"{shapes}; Nyström start X_0 = AΩ, Y_0 = 0; κ = {double}"
        + (f" (float32: {single})" if both_dtypes else "")
        + f", 1 if r_A = 1; spectra: {', '.join(PROFILES.values())}; σ_1(A) = {listed(UNITS)}; "
        f"ξ = {listed(SCALES)}; η = {listed(etas)}; {SEEDS} seeds; float64"
        + (" and float32" if both_dtypes else "")
    )


def spectrum(profile: str, rank: int, kappa: float) -> np.ndarray:
    """Return singular values from 1 to 1/κ.

    Args:
        profile: a key of `PROFILES`; "repeated" has one half of each value, "clustered" splits
            them.
        rank: how many values.
        kappa: their ratio κ.
    """
    if rank == 1:
        return np.ones(1)
    if profile in ("geometric", "last"):
        return common.spectrum(profile, rank, kappa)
    halves = np.where(np.arange(rank) < rank / 2, 1.0, 1 / kappa)
    return halves * (1 - SPLIT * np.arange(rank)) if profile == "clustered" else halves


@dataclasses.dataclass(frozen=True)
class PairFamily:
    """A batch of asymmetric trajectories.

    Attributes:
        a: A, (b, m, n).
        left: U, (b, m, k).
        right: V, (b, n, k).
        spectrum: diag(Σ), (b, k).
        eta: step sizes, (b,).
        kappa: condition numbers, (b,).
        x: X_t, (b, steps + 1, m, r).
        y: Y_t, (b, steps + 1, n, r).
    """

    a: jax.Array
    left: jax.Array
    right: jax.Array
    spectrum: jax.Array
    eta: np.ndarray
    kappa: np.ndarray
    x: jax.Array
    y: jax.Array

    @property
    def phi(self) -> jax.Array:
        """Φ_t = UᵀX_t."""
        return jnp.einsum("bmk,btmr->btkr", self.left, self.x)

    @property
    def psi(self) -> jax.Array:
        """Ψ_t = VᵀY_t."""
        return jnp.einsum("bnk,btnr->btkr", self.right, self.y)

    @property
    def products(self) -> np.ndarray:
        """X_tY_tᵀ."""
        return np.asarray(self.x) @ transposed(self.y)

    @property
    def norm(self) -> np.ndarray:
        """‖A‖_F (b,)."""
        return frobenius(self.a)


@functools.partial(jax.jit, static_argnums=3)
def pair_trajectories(a: Any, factors: Any, eta: Any, steps: int) -> Any:
    """Return (X, Y)_0 … (X, Y)_steps of the asymmetric iteration (6), (35), over a batch.

    Args:
        a: A, (b, m, n).
        factors: (X, Y)_0, (b, m, r) and (b, n, r).
        eta: step sizes, (b,).
        steps: the number of steps.
    """

    def one(a: Any, factors: Any, eta: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), eta)
        return nys.solvers.run(step, factors, steps, record=lambda f: f).history

    return jax.vmap(one)(a, factors, eta)


@functools.partial(jax.jit, static_argnums=3)
def _starts(keys: Any, a: Any, scales: Any, rank: int) -> Any:
    """Return AΩ over a batch."""
    start = nys.initializers.nystrom_factors
    return jax.vmap(lambda key, a, scale: start(key, a, rank, scale).left)(keys, a, scales)


def _orthonormal(rng: np.random.Generator, batch: int, m: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((batch, m, k)))[0]


@functools.cache
def _cells(shape: Shape, dtype: Dtype, etas: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Return the runs κ × spectrum × η × seed as arrays: spectra, η, κ, ξ."""
    kappas = KAPPAS[dtype] if shape.true_rank > 1 else (1.0,)
    kinds = tuple(PROFILES) if shape.true_rank > 1 else ("geometric",)
    cells = list(itertools.product(kappas, kinds, etas, range(SEEDS)))
    spectra = [
        UNITS[(i + seed) % 3] * spectrum(profile, shape.true_rank, kappa)
        for i, (kappa, profile, _, seed) in enumerate(cells)
    ]
    scales = [SCALES[(i // 3) % 3] for i in range(len(cells))]
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
    etas: tuple[float, ...] = ETAS,
) -> PairFamily:
    """Return the trajectories of (6) and (35) on one shape.

    Args:
        regime: "exact", "under" or "over".
        index: which of the regime's `SHAPES`.
        dtype: of the iteration.
        start: the kind of start.
        etas: step sizes.
    """
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
    # The float32 runs round the same problems.
    a, left, right, x, y, sigma = (jnp.asarray(v, dtype) for v in (a, left, right, x, y, spectra))
    x, y = pair_trajectories(a, nys.Factors(x, y), jnp.asarray(eta, dtype), STEPS)
    return PairFamily(a, left, right, sigma, eta, kappa, x, y)


def families(regime: Regime, dtype: Dtype, start: Start = "nystrom") -> list[PairFamily]:
    """Return `family` at all shapes of a regime; only at the first for the starts of controls.

    Args:
        regime: "exact", "under" or "over".
        dtype: of the iteration.
        start: the kind of start.
    """
    count = len(SHAPES[regime]) if start == "nystrom" else 1
    return [family(regime, index, dtype, start) for index in range(count)]
