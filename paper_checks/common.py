"""What the claims share: families of problems, and the library's trajectories on them.

A family is a batch of runs of equal shape over condition numbers, kinds of spectrum, step sizes
and seeds, made by one compiled call and kept: compilation costs more than the runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import nyscaled as nys

SEED = 20250
M, N = 60, 40
STEPS = 48
ETAS = (0.1, 0.3, 0.5, 0.9)
PAIR_ETAS = (0.1, 0.5, 0.9, 1.0)
KAPPAS = {"float64": (2.0, 1e2, 1e4, 1e6), "float32": (2.0, 1e1, 1e2, 1e3)}
SCALES = (0.1, 1.0, 10.0)  # ξ, in turn

Regime = Literal["exact", "under", "over"]
Start = Literal["nystrom", "perturbed", "small"]
Dtype = Literal["float64", "float32"]
DTYPES: tuple[Dtype, ...] = ("float64", "float32")
RANKS = {"exact": (5, 5), "under": (5, 8), "over": (8, 5)}
"""(r, r_A) of each regime."""


def eps(dtype: str) -> float:
    """Machine epsilon."""
    return float(np.finfo(dtype).eps)


def spectrum(kind: str, rank: int, kappa: float) -> np.ndarray:
    """Singular values from 1 to 1/κ: "geometric", or "last" as the paper's: near 1 but for the last."""
    if kind == "geometric":
        return np.geomspace(1.0, 1.0 / kappa, rank)
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


@dataclasses.dataclass(frozen=True)
class Family:
    """A batch of symmetric trajectories.

    Attributes:
        a: (b, m, m). basis: Q (b, m, k). spectrum: diag(Σ) (b, k). eta: (b,). kappa: (b,).
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
    return jax.vmap(lambda k, a, s: nys.initializers.perturbed(k, a, rank, s, noise))(
        batch_keys, a, scale
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def trajectories(a: Any, x0: Any, eta: Any, damping: float, steps: int) -> Any:
    """X_0 … X_steps of ScaledGD by `solvers.scaled_step`, over a batch."""

    def one(a: Any, x: Any, eta: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), eta, damping)
        return nys.solvers.run(step, x, steps, record=lambda x: x).history

    return jax.vmap(one)(a, x0, eta)


@functools.partial(jax.jit, static_argnums=3)
def pair_trajectories(a: Any, factors: Any, eta: Any, steps: int) -> Any:
    """(X, Y)_0 … (X, Y)_steps of the asymmetric iteration (6), (35), over a batch."""

    def one(a: Any, factors: Any, eta: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), eta)
        return nys.solvers.run(step, factors, steps, record=lambda f: f).history

    return jax.vmap(one)(a, factors, eta)


def grid(dtype: str, etas: tuple[float, ...], rank: int, kappa_max: float = np.inf) -> Any:
    """The runs of a family: κ × kind of spectrum × η, as arrays (spectra, η, κ, ξ)."""
    kappas = [k for k in KAPPAS[dtype] if k <= kappa_max]
    cells = list(itertools.product(kappas, ("geometric", "last"), etas))
    spectra = np.array([spectrum(kind, rank, kappa) for kappa, kind, _ in cells])
    eta = np.array([e for *_, e in cells])
    scale = np.array([SCALES[i % len(SCALES)] for i in range(len(cells))])
    return spectra, eta, np.array([k for k, *_ in cells]), scale


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
) -> Family:
    """The trajectories of (2) or (26) over `grid`; `start` and `damping` serve the controls."""
    rank, true_rank = RANKS[regime]
    spectra, eta, kappa, scales = grid(dtype, etas, true_rank)
    if scale is not None:
        scales = np.full_like(scales, scale)
    salt = {"exact": 0, "under": 1, "over": 2}[regime]
    batch = len(eta)
    a, basis = psd_batch(keys(batch, salt, 0), M, spectra)
    start_keys = keys(batch, salt, 1)
    if start == "small":
        x0 = jax.vmap(lambda k: nys.initializers.small(k, M, rank, 1e-3))(start_keys)
    else:
        x0 = start_batch(start_keys, a, rank, scales, noise if start == "perturbed" else 0.0)
    # The float32 runs are those of the same problems, rounded: sampling compiles once.
    kind = jnp.dtype(dtype)
    a, basis, x0, sigma = (jnp.asarray(v, kind) for v in (a, basis, x0, spectra))
    x = trajectories(a, x0, jnp.asarray(eta, kind), damping, steps)
    return Family(a, basis, sigma, eta, kappa, x)


@functools.partial(jax.jit, static_argnums=(5, 6))
def residual_curves(
    a: Any, basis: Any, spectrum: Any, x0: Any, eta: Any, damping: float, steps: int
) -> Any:
    """‖X_tX_tᵀ − A‖_F, t = 0 … steps, and X_steps, over a batch."""

    def one(a: Any, basis: Any, spectrum: Any, x: Any, eta: Any) -> Any:
        step = nys.solvers.scaled_step(nys.problems.Symmetric(a), eta, damping)

        def record(x: Any) -> Any:
            return nys.optimality.residual_in_basis(x, basis, spectrum)

        solution = nys.solvers.run(step, x, steps, record)
        return solution.history, solution.params

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


@functools.cache
def pair_family(
    regime: Regime,
    dtype: Dtype = "float64",
    start: Literal["nystrom", "small"] = "nystrom",
    etas: tuple[float, ...] = PAIR_ETAS,
    steps: int = 12,
) -> PairFamily:
    """The trajectories of (6) or (35) over `grid`, m × n = 60 × 40."""
    rank, true_rank = RANKS[regime]
    spectra, eta, kappa, scales = grid(dtype, etas, true_rank)
    salt = {"exact": 10, "under": 11, "over": 12}[regime]
    batch = len(eta)
    a, left, right, factors = _pair_problems(
        keys(batch, salt, 0), keys(batch, salt, 1), spectra, scales, rank, start
    )
    kind = jnp.dtype(dtype)
    a, left, right, x0, y0, sigma = (
        jnp.asarray(v, kind) for v in (a, left, right, *factors, spectra)
    )
    x, y = pair_trajectories(a, nys.Factors(x0, y0), jnp.asarray(eta, kind), steps)
    return PairFamily(a, left, right, sigma, eta, kappa, x, y)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _pair_problems(
    matrix_keys: Any, start_keys: Any, spectra: Any, scales: Any, rank: int, start: str
) -> Any:
    """A, U, V and the start, over a batch."""

    def one(matrix_key: Any, start_key: Any, spectrum: Any, scale: Any) -> Any:
        a, left, right = nys.spectra.rectangular(matrix_key, M, N, spectrum)
        if start == "nystrom":
            return a, left, right, nys.initializers.nystrom_factors(start_key, a, rank, scale)
        return a, left, right, nys.initializers.small_factors(start_key, (M, N), rank, 1e-3)

    return jax.vmap(one)(matrix_keys, start_keys, spectra, scales)


def at_eta(family: Any, eta: float) -> Any:
    """The runs of a family that have this step size."""
    rows = np.flatnonzero(family.eta == eta)
    if not len(rows):
        raise ValueError(f"no run has η = {eta}; the family has {sorted(set(family.eta))}")
    values = {f.name: getattr(family, f.name)[rows] for f in dataclasses.fields(family)}
    return type(family)(**values)


def over_time(fn: Any, *in_axes: int | None) -> Any:
    """`fn` of one iterate, compiled over (batch, time); axis None is an argument without time."""
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
