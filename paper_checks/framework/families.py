"""Families of symmetric problems, and the library's trajectories on them.

A family is a batch of runs of equal shape over condition numbers, kinds of spectrum, step sizes
and seeds. One compiled call makes it, and it is cached: compilation costs more than the runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys
from paper_checks.framework.common import (
    KAPPAS,
    PROFILES,
    SCALES,
    SEEDS,
    UNITS,
    Dtype,
    M,
    Parts,
    keys,
    largest,
    listed,
    per_dtype,
    psd_batch,
    short,
    spectrum,
    start_batch,
)

STEPS = 48
ETAS = (0.1, 0.3, 0.5, 0.9, 1.0)
NOISE = 1e-2
"""ξ_n of the perturbed starts, in units of σ_1(A)."""
SMALL = 1e-3
"""ζ of the small starts, in units of √σ_1(A)."""

Regime = Literal["exact", "under", "over"]
Start = Literal["nystrom", "perturbed", "small"]
Size = tuple[int, int, int]
SIZES: dict[Regime, tuple[Size, ...]] = {
    "exact": ((M, 5, 5), (12, 1, 1), (12, 12, 12)),
    "under": ((M, 5, 8), (12, 1, 12)),
    "over": ((M, 8, 5), (12, 12, 1), (12, 12, 9)),
}
"""(m, r, r_A) of each regime; float32 has only the first."""


def _described(regime: Regime) -> str:
    first, *others = (f"({m}, {r}, {k})" for m, r, k in SIZES[regime])
    kappas = {
        dtype: f"{short(values[0])} … {short(values[-1])}" for dtype, values in KAPPAS.items()
    }
    return (
        f"(m, r, r_A) = {first}, and in float64 {', '.join(others)}; "
        f"κ = {kappas['float64']} (float32: {kappas['float32']}), σ_1(A) = {listed(UNITS)}; "
        f"spectra: {', '.join(PROFILES.values())}; η = {listed(ETAS)}; ξ = {listed(SCALES)}; "
        f"{SEEDS} starts each, {STEPS} steps"
    )


EVERYWHERE: dict[Regime, str] = {regime: _described(regime) for regime in SIZES}
"""What the families of a regime run over, in the words of the report."""

LEAVES_RANGE: dict[str, Any] = {
    "removes": "the start inside range(A)",
    "instead": f"AΩ + N with ξ_n = {short(NOISE)} σ_1(A)",
    "start": "perturbed",
}
"""The control of claims that require X_0 inside range(A)."""
SMALL_START: dict[str, Any] = {
    "removes": "the start inside range(A)",
    "instead": f"a small random start, ζ = {short(SMALL)} √σ_1(A)",
    "start": "small",
}
"""The control of claims on how the smallest singular value grows."""
DAMPED: dict[str, Any] = {
    "removes": "zero damping",
    "instead": "λ = 1e-2 σ_1(A) in XᵀX + λI",
    "damping": 1e-2,
}
"""The control of claims that require the inverse without damping."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A batch of symmetric trajectories.

    Attributes:
        a: A, (b, m, m).
        basis: Q, (b, m, k).
        spectrum: diag(Σ), (b, k).
        eta: step sizes, (b,).
        kappa: σ_1/σ_k, (b,).
        x: X_t, (b, steps + 1, m, r).
    """

    a: jax.Array
    basis: jax.Array
    spectrum: jax.Array
    eta: np.ndarray
    kappa: np.ndarray
    x: jax.Array

    @property
    def phi(self) -> jax.Array:
        """Φ_t = QᵀX_t (b, steps + 1, k, r)."""
        return jnp.einsum("bmk,btmr->btkr", self.basis, self.x)


@functools.partial(jax.jit, static_argnums=4)
def trajectories(a: Any, x0: Any, eta: Any, damping: Any, steps: int) -> Any:
    """Return X_0 … X_steps of ScaledGD by `solvers.scaled_step`, over a batch.

    Args:
        a: A, (b, m, m).
        x0: X_0, (b, m, r).
        eta: step sizes, (b,).
        damping: λ, a number or (b,).
        steps: the number of steps.
    """

    def one(a: Any, x: Any, eta: Any, damping: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), eta, damping)
        return nys.solvers.run(step, x, steps, record=lambda x: x).history

    return jax.vmap(one)(a, x0, eta, jnp.broadcast_to(damping, eta.shape))


@functools.partial(jax.jit, static_argnums=5)
def residual_curves(a: Any, basis: Any, spectrum: Any, x0: Any, eta: Any, steps: int) -> Any:
    """Return ‖X_tX_tᵀ − A‖_F, t = 0 … steps, over a batch.

    Args:
        a: A, (b, m, m).
        basis: Q, (b, m, k).
        spectrum: diag(Σ), (b, k).
        x0: X_0, (b, m, r).
        eta: step sizes, (b,).
        steps: the number of steps.
    """

    def one(a: Any, basis: Any, spectrum: Any, x: Any, eta: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), eta)

        def record(x: Any) -> Any:
            return nys.optimality.residual_in_basis(x, basis, spectrum)

        return nys.solvers.run(step, x, steps, record).history

    return jax.vmap(one)(a, basis, spectrum, x0, eta)


def grid(dtype: Dtype, etas: tuple[float, ...], rank: int) -> Any:
    """Return the runs of a symmetric family as arrays (spectra, η, ξ).

    The runs are κ × kind of spectrum × η × start; ξ and σ_1(A) take turns.

    Args:
        dtype: of the iteration, which limits κ.
        etas: step sizes.
        rank: r_A.
    """
    cells = list(itertools.product(KAPPAS[dtype], PROFILES, etas, range(SEEDS)))
    turns = np.arange(len(cells))
    units = np.array(UNITS)[turns // SEEDS % len(UNITS)]
    spectra = np.array([spectrum(profile, rank, kappa) for kappa, profile, *_ in cells])
    eta = np.array([eta for *_, eta, _ in cells])
    return units[:, None] * spectra, eta, np.array(SCALES)[turns % len(SCALES)]


@functools.cache
def family(
    regime: Regime,
    dtype: Dtype = "float64",
    start: Start = "nystrom",
    etas: tuple[float, ...] = ETAS,
    damping: float = 0.0,
    scale: float | None = None,
    size: Size | None = None,
) -> Family:
    """Return the trajectories of (2) or (26) over `grid`.

    Args:
        regime: "exact", "under" or "over".
        dtype: of the iteration.
        start: "nystrom"; "perturbed" by N with ξ_n = NOISE σ_1; "small" with ζ = SMALL √σ_1.
        etas: step sizes.
        damping: λ, in units of σ_1(A).
        scale: ξ for all runs; by default `SCALES` in turn.
        size: (m, r, r_A); by default the first of the regime.
    """
    m, rank, true_rank = size or SIZES[regime][0]
    spectra, eta, scales = grid(dtype, etas, true_rank)
    top = spectra[:, 0]
    if scale is not None:
        scales = np.full_like(scales, scale)
    salt = {"exact": 0, "under": 1, "over": 2}[regime]
    batch = len(eta)
    a, basis = psd_batch(keys(batch, salt, 0), m, spectra)
    start_keys = keys(batch, salt, 1)
    if start == "small":
        x0 = jax.vmap(lambda k: nys.initializers.small(k, m, rank, SMALL))(start_keys)
        x0 = x0 * np.sqrt(top)[:, None, None]
    else:
        x0 = start_batch(start_keys, a, rank, scales, top * NOISE * (start == "perturbed"))
    # The float32 runs round the same problems, so that sampling compiles once.
    a, basis, x0, sigma = (jnp.asarray(v, dtype) for v in (a, basis, x0, spectra))
    x = trajectories(a, x0, jnp.asarray(eta, dtype), jnp.asarray(damping * top, dtype), STEPS)
    return Family(a, basis, sigma, eta, top / spectra[:, -1], x)


def families(regime: Regime, dtype: Dtype = "float64", **options: Any) -> list[Family]:
    """Return `family` at all `SIZES` of the regime; in float32 only at the first.

    Args:
        regime: "exact", "under" or "over".
        dtype: of the iteration.
        **options: further arguments of `family`.
    """
    sizes = SIZES[regime] if dtype == "float64" else SIZES[regime][:1]
    return [family(regime, dtype, size=size, **options) for size in sizes]


def everywhere(
    regime: Regime, measure: Callable[[Family, Dtype], float], bound: float, **options: Any
) -> Parts:
    """Return the largest `measure(family, dtype)` over sizes with its bound, per dtype.

    Args:
        regime: "exact", "under" or "over".
        measure: takes a family and the name of its dtype, and returns a number.
        bound: the upper bound of the number.
        **options: further arguments of `family`.
    """
    return per_dtype(
        lambda dtype: largest([measure(f, dtype) for f in families(regime, dtype, **options)]),
        bound,
    )


def at_eta(family: Any, eta: float) -> Any:
    """Return the runs of a family that have this step size.

    Args:
        family: a Family or PairFamily.
        eta: the step size η.
    """
    rows = np.flatnonzero(family.eta == eta)
    if not len(rows):
        raise ValueError(f"η is {eta}; expected one of {sorted(set(family.eta))}, the family's")
    values = {f.name: getattr(family, f.name)[rows] for f in dataclasses.fields(family)}
    return type(family)(**values)
