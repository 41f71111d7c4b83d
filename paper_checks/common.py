"""What the claims share: families of problems, and the library's trajectories on them.

A family is a batch of runs of equal shape over condition numbers, kinds of spectrum, step sizes
and seeds, made by one compiled call and kept: compilation costs more than the runs.
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

SEED = 20250
M, N = 60, 40
STEPS = 48
ETAS = (0.1, 0.3, 0.5, 0.9, 1.0)
PAIR_ETAS = (0.1, 0.5, 0.9, 1.0)
KAPPAS = {"float64": (2.0, 1e2, 1e4, 1e6), "float32": (2.0, 1e1, 1e2, 1e3)}
KINDS = ("geometric", "last", "repeated", "clustered")
SCALES = (0.1, 1.0, 10.0)  # ξ, in turn
UNITS = (1.0, 1e6, 1e-6)  # σ_1(A), in turn
SEEDS = 3

Regime = Literal["exact", "under", "over"]
Start = Literal["nystrom", "perturbed", "small"]
Dtype = Literal["float64", "float32"]
DTYPES: tuple[Dtype, ...] = ("float64", "float32")
Size = tuple[int, int, int]
SIZES: dict[Regime, tuple[Size, ...]] = {
    "exact": ((M, 5, 5), (12, 1, 1), (12, 12, 12)),
    "under": ((M, 5, 8), (12, 1, 12)),
    "over": ((M, 8, 5), (12, 12, 1), (12, 12, 9)),
}
"""(m, r, r_A) of each regime; the first also in float32."""
RUNS = (
    "κ = 2 … 1e6 (float32: 2 … 1e3), σ_1(A) = 1e-6, 1, 1e6; spectra geometric, near 1 but for the last, "
    "of two repeated values, of clusters 1e-6 apart; η = .1, .3, .5, .9, 1; ξ = .1, 1, 10; three starts "
    "each, 48 steps"
)
EVERYWHERE = {
    "exact": f"m = 60, r = r_A = 5, and in float64 m = 12, r = r_A = 1, 12; {RUNS}",
    "under": f"m = 60, r = 5, r_A = 8, and in float64 m = 12, r = 1, r_A = 12; {RUNS}",
    "over": f"m = 60, r = 8, r_A = 5, and in float64 m = r = 12, r_A = 1, 9; {RUNS}",
}
"""What the families of a regime run over."""


def eps(dtype: str) -> float:
    """Machine epsilon."""
    return float(np.finfo(dtype).eps)


def spectrum(kind: str, rank: int, kappa: float) -> np.ndarray:
    """Singular values from 1 to 1/κ, descending; 1 if there is but one.

    Args:
        kind: "geometric"; "last" as the paper's, near 1 but for the last; "repeated", 1 and 1/κ
            half and half; "clustered", in pairs that differ by 1e-6.
        rank: how many.
        kappa: their ratio.
    """
    if rank == 1:
        return np.ones(1)
    if kind == "geometric":
        return np.geomspace(1.0, 1.0 / kappa, rank)
    if kind == "repeated":
        return np.where(np.arange(rank) < (rank + 1) // 2, 1.0, 1.0 / kappa)
    if kind == "clustered":
        pairs = np.repeat(np.geomspace(1.0, 1.0 / kappa, (rank + 1) // 2), 2)[:rank]
        values = pairs * (1 + 1e-6 * (np.arange(rank) % 2 == 0))
        return values / values[0]
    return np.array([*(1.0 - 0.3 * i / rank for i in range(rank - 1)), 1.0 / kappa])


def key(*salt: int) -> jax.Array:
    """The seed's PRNG key, one a salt."""
    result = jax.random.key(SEED)
    for s in salt:
        result = jax.random.fold_in(result, s)
    return result


def keys(count: int, *salt: int) -> jax.Array:
    """`count` PRNG keys."""
    return jax.random.split(key(*salt), count)


def over_grid(fn: Callable[..., Any], *axes: Any) -> np.ndarray:
    """`fn` of every combination of entries of `axes`, one axis of the result for each.

    The combinations are one compiled batch: each level of a nest of `vmap` would compile as loops of
    its own around every factorization. An axis is an array, or a tree of arrays of one length. The
    same `fn` with axes of the same shapes compiles once.
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


@dataclasses.dataclass(frozen=True)
class Family:
    """A batch of symmetric trajectories.

    Attributes:
        a: (b, m, m). basis: Q (b, m, k). spectrum: diag(Σ) (b, k). eta: (b,). kappa: σ_1/σ_k (b,).
        x: X_t (b, steps + 1, m, r).
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


@functools.partial(jax.jit, static_argnums=1)
def psd_batch(batch_keys: Any, m: int, spectra: Any) -> Any:
    """`spectra.psd` over a batch."""
    return jax.vmap(lambda k, s: nys.spectra.psd(k, m, s))(batch_keys, spectra)


@functools.partial(jax.jit, static_argnums=2)
def start_batch(batch_keys: Any, a: Any, rank: int, scale: Any, noise: Any) -> Any:
    """`initializers.perturbed` over a batch; at noise = 0 it is `initializers.nystrom`, to the bit."""
    noise = jnp.broadcast_to(noise, scale.shape)
    return jax.vmap(lambda k, a, s, n: nys.initializers.perturbed(k, a, rank, s, n))(
        batch_keys, a, scale, noise
    )


@functools.partial(jax.jit, static_argnums=4)
def trajectories(a: Any, x0: Any, eta: Any, damping: Any, steps: int) -> Any:
    """X_0 … X_steps of ScaledGD by `solvers.scaled_step`, over a batch."""

    def one(a: Any, x: Any, eta: Any, damping: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), eta, damping)
        return nys.solvers.run(step, x, steps, record=lambda x: x).history

    return jax.vmap(one)(a, x0, eta, jnp.broadcast_to(damping, eta.shape))


@functools.partial(jax.jit, static_argnums=3)
def pair_trajectories(a: Any, factors: Any, eta: Any, steps: int) -> Any:
    """(X, Y)_0 … (X, Y)_steps of the asymmetric iteration (6), (35), over a batch."""

    def one(a: Any, factors: Any, eta: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), eta)
        return nys.solvers.run(step, factors, steps, record=lambda f: f).history

    return jax.vmap(one)(a, factors, eta)


def grid(dtype: str, etas: tuple[float, ...], rank: int) -> Any:
    """The runs of a symmetric family, as arrays (spectra, η, ξ).

    They are κ × kind of spectrum × η × start; ξ and σ_1(A) take turns.
    """
    cells = list(itertools.product(KAPPAS[dtype], KINDS, etas, range(SEEDS)))
    turns = np.arange(len(cells))
    units = np.array(UNITS)[turns // SEEDS % len(UNITS)]
    spectra = np.array([spectrum(kind, rank, kappa) for kappa, kind, *_ in cells])
    eta = np.array([eta for *_, eta, _ in cells])
    return units[:, None] * spectra, eta, np.array(SCALES)[turns % len(SCALES)]


@functools.cache
def family(
    regime: Regime,
    dtype: Dtype = "float64",
    start: Start = "nystrom",
    etas: tuple[float, ...] = ETAS,
    damping: float = 0.0,
    noise: float = 1e-2,
    scale: float | None = None,
    steps: int = STEPS,
    size: Size | None = None,
) -> Family:
    """The trajectories of (2) or (26) over `grid`.

    Args:
        regime: which of `SIZES`.
        dtype: of the iteration.
        start: "nystrom"; "perturbed" by N with ξ_n = `noise`; "small" with ζ = 1e-3 √σ_1.
        etas: step sizes.
        damping: λ, in units of σ_1(A).
        noise: ξ_n, in units of σ_1(A).
        scale: ξ, if it is to be one.
        steps: of each run.
        size: (m, r, r_A), if it is not the first of the regime.
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
        x0 = jax.vmap(lambda k: nys.initializers.small(k, m, rank, 1e-3))(start_keys)
        x0 = x0 * np.sqrt(top)[:, None, None]
    else:
        x0 = start_batch(start_keys, a, rank, scales, top * noise * (start == "perturbed"))
    # The float32 runs are those of the same problems, rounded: sampling compiles once.
    kind = jnp.dtype(dtype)
    a, basis, x0, sigma = (jnp.asarray(v, kind) for v in (a, basis, x0, spectra))
    x = trajectories(a, x0, jnp.asarray(eta, kind), jnp.asarray(damping * top, kind), steps)
    return Family(a, basis, sigma, eta, top / spectra[:, -1], x)


def families(regime: Regime, dtype: Dtype = "float64", **options: Any) -> list[Family]:
    """`family` at all `SIZES` of the regime; in float32 at the first."""
    sizes = SIZES[regime] if dtype == "float64" else SIZES[regime][:1]
    return [family(regime, dtype, size=size, **options) for size in sizes]


def everywhere(
    regime: Regime, measure: Callable[[Family, Dtype], float], bound: float, **options: Any
) -> dict[str, tuple[float, float]]:
    """The largest `measure(family, dtype)` over sizes beside its bound, for each dtype."""
    return {
        dtype: (largest([measure(f, dtype) for f in families(regime, dtype, **options)]), bound)
        for dtype in DTYPES
    }


@functools.partial(jax.jit, static_argnums=5)
def residual_curves(a: Any, basis: Any, spectrum: Any, x0: Any, eta: Any, steps: int) -> Any:
    """‖X_tX_tᵀ − A‖_F, t = 0 … steps, over a batch."""

    def one(a: Any, basis: Any, spectrum: Any, x: Any, eta: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), eta)

        def record(x: Any) -> Any:
            return nys.optimality.residual_in_basis(x, basis, spectrum)

        return nys.solvers.run(step, x, steps, record).history

    return jax.vmap(one)(a, basis, spectrum, x0, eta)


@dataclasses.dataclass(frozen=True)
class PairFamily:
    """A batch of asymmetric trajectories; U, V are `left`, `right`, and X_t, Y_t are `x`, `y`."""

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


def at_eta(family: Any, eta: float) -> Any:
    """The runs of a family that have this step size."""
    rows = np.flatnonzero(family.eta == eta)
    if not len(rows):
        raise ValueError(f"no run has η = {eta}; the family has {sorted(set(family.eta))}")
    values = {f.name: getattr(family, f.name)[rows] for f in dataclasses.fields(family)}
    return type(family)(**values)


@functools.cache
def over_time(fn: Any, *in_axes: int | None) -> Any:
    """`fn` of one iterate, compiled once over (batch, time); axis None is an argument without time."""
    return jax.jit(jax.vmap(jax.vmap(fn, in_axes=in_axes)))


def frobenius(x: Any) -> np.ndarray:
    """Frobenius norms of the last two axes."""
    return np.linalg.norm(np.asarray(x), axis=(-2, -1))


def singular_values(x: Any) -> np.ndarray:
    """Singular values of the last two axes, descending."""
    return np.linalg.svd(np.asarray(x), compute_uv=False)


def largest(x: Any) -> float:
    """The maximum as a float; NaN if there is one."""
    return float(np.max(np.asarray(x)))
