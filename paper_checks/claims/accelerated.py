"""Accelerated iterations: counts of scaled Newton and QDWH, the rescaled start, the direct factor.

The factor form reduces to the scalars s = σ(S) with X = QΣ^{1/2}S. Steps are counted on them in
extended precision, and the library's steps are compared with these scalars in float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np

import nyscaled as nys
from paper_checks.framework import Limit, Measured, claim, common, worst
from paper_checks.framework import pair_families as pairs
from paper_checks.framework.common import frobenius, singular_values

DIGITS = 60
LIMIT = 70  # the most steps of a scalar run
RANK = 6


def newton_scalars(s: list[Any], low: Any, high: Any, scaled: bool = True) -> Iterator[list[Any]]:
    """Yield the iterates of s⁺ = (μs + 1/(μs))/2 with the weights of Byers and Xu, or with μ = 1.

    Args:
        s: the start.
        low: a lower bound of s.
        high: an upper bound of s.
        scaled: whether μ follows the weights; otherwise it is 1.
    """
    mu = 1 / mp.sqrt(low * high) if scaled else mp.mpf(1)
    first = True
    while True:
        yield s
        s = [(mu * v + 1 / (mu * v)) / 2 for v in s]
        if scaled and first:
            mu = mp.sqrt(2 * mp.sqrt(low * high) / (low + high))
        elif scaled:
            mu = mp.sqrt(2 / (mu + 1 / mu))
        first = False


def halley_scalars(s: list[Any], low: Any, high: Any) -> Iterator[list[Any]]:
    """Yield s, s/high, and the iterates of s⁺ = s(a + bs²)/(1 + cs²) with the weights of QDWH.

    Args:
        s: the start.
        low: a lower bound of s.
        high: an upper bound of s.
    """
    yield s
    s, bound = [v / high for v in s], low / high
    while True:
        square = bound**2
        d = mp.cbrt(4 * (1 - square) / square**2)
        a = mp.sqrt(1 + d)
        a += mp.sqrt(8 - 4 * d + 8 * (2 - square) / (square * mp.sqrt(1 + d))) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        s = [v * (a + b * v**2) / (1 + c * v**2) for v in s]
        yield s
        bound = min(bound * (a + b * square) / (1 + c * square), mp.mpf(1))


def count(run: Iterator[list[Any]]) -> int:
    """Return the steps until all s are within 1e-16 of 1."""
    for t, s in enumerate(run):
        if max(abs(v - 1) for v in s) <= mp.mpf(10) ** -16 or t == LIMIT:
            return t
    raise AssertionError("an endless run ended")


def counts_by_condition(start: Callable[[list[Any], Any], Iterator[list[Any]]]) -> np.ndarray:
    """Return counts for κ(S) = 10, 1e2, …, 1e16, with 33 values of s from 1/κ to 1 each."""
    with mp.workdps(DIGITS):
        steps = []
        for k in range(1, 17):
            s = [mp.mpf(10) ** (-mp.mpf(k) * i / 32) for i in range(33)]
            steps.append(count(start(s, s[-1])))
    return np.array(steps)


def facts_of(steps: np.ndarray) -> dict[str, float]:
    """Return some of the counts, for the report."""
    return {f"steps at κ = 1e{k}": float(steps[k - 1]) for k in (2, 8, 16)}


@claim(
    "newton-count",
    "Byers, Xu 2008: scaled Newton with the weights of Byers and Xu brings every s within "
    "1e-16 of 1 in at most 9 steps for κ(S) ≤ 1e16",
    source="literature",
    hypotheses="the scalars s⁺ = (μs + 1/(μs))/2 with 60 digits, κ(S) = 10, 1e2, …, 1e16, 33 "
    "values of s each",
    removes="the scaling",
    instead="μ = 1, which is (2) at η = 1/2",
    scaled=False,
)
def newton_count(scaled: bool = True) -> Measured:
    """Byers and Xu 2008, on the scalars of (2)."""
    steps = counts_by_condition(lambda s, low: newton_scalars(s, low, mp.mpf(1), scaled))
    return Measured(int(max(steps)), 9, detail="steps, largest over κ(S)", facts=facts_of(steps))


@claim(
    "qdwh-count",
    "Nakatsukasa, Bai, Gygi 2010: QDWH brings every s within 1e-16 of 1 in at most 6 steps for "
    "κ(S) ≤ 1e16; a bound ℓ 1e3 times too small costs at most one more for each κ",
    source="literature",
    hypotheses="the scalars s⁺ = s(a + bs²)/(1 + cs²) with 60 digits, κ(S) = 10, 1e2, …, 1e16, "
    "33 values of s each; ℓ = s_min/s_max",
    removes="ℓ ≤ s_min/s_max",
    instead="ℓ ten times as large (at most 1)",
    factor=10,
)
def qdwh_count(factor: int = 1) -> Measured:
    """Nakatsukasa, Bai and Gygi 2010, on the scalars of (2)."""

    def steps(factor: Any) -> np.ndarray:
        one = mp.mpf(1)
        return counts_by_condition(lambda s, low: halley_scalars(s, min(factor * low, one), one))

    counts = steps(factor)
    extra = int(max(steps(mp.mpf(10) ** -3) - steps(1)))
    return worst(
        "steps, largest over κ(S)",
        {"steps": (int(max(counts)), 6), "more with a bound too small": (extra, 1)},
    )


STEPS: dict[str, Callable[[Any], Any]] = {
    "newton": nys.solvers.scaled_newton_step,
    "qdwh": nys.solvers.qdwh_step,
    "plain": lambda p: nys.solvers.scaled_step(p, 0.5),
    "plain, rescaled": lambda p: nys.solvers.scaled_step(p, 0.5),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _runs(name: str, steps: int, a: Any, basis: Any, spectra: Any, x0: Any) -> tuple[Any, Any]:
    """Return ‖X_tX_tᵀ − A‖_F/‖A‖_F and X_t, t = 0 … steps, over a batch."""

    def one(a: Any, basis: Any, spectrum: Any, x0: Any) -> Any:
        x0 = nys.initializers.rescaled(x0, a) if name.endswith("rescaled") else x0

        def record(x: Any) -> Any:
            error = nys.optimality.residual_in_basis(x, basis, spectrum)
            return error / jnp.linalg.norm(spectrum), x

        step = STEPS[name](nys.problems.Symmetric(a))
        return nys.solvers.run(step, x0, steps, record).history

    return jax.vmap(one)(a, basis, spectra, x0)


KAPPAS = (1e1, 1e4, 1e8, 1e12)
SHAPES = ((common.M, RANK), (common.M, 1), (RANK, RANK))
"""m and r = r_A; rescaled-start uses the first."""


@functools.cache
def _starts(m: int, rank: int) -> tuple[Any, ...]:
    """Return A, Q, diag(Σ), X_0 of each (κ and spectrum, ξ, seed) as one batch, and its shape."""
    cells = itertools.product(KAPPAS, ("geometric", "last", "repeated"))
    spectra = np.array(
        [
            pairs.UNITS[i % 3] * pairs.spectrum(profile, rank, k)
            for i, (k, profile) in enumerate(cells)
        ]
    )
    scales, keys = np.array([1e-3, 1.0, 1e3]), common.keys(5, 100)
    shape = (len(spectra), len(scales), len(keys))
    i, j, k = np.indices(shape).reshape(3, -1)
    a, basis = common.psd_batch(keys[k], m, spectra[i])
    sketch_keys = common.keys(5, 100, 1)[k]  # one Ω per key, for every ξ
    x0 = common.start_batch(sketch_keys, a, rank, scales[j], 0.0)
    return a, basis, spectra[i], x0, shape


def counts(name: str, steps: int, m: int = common.M, rank: int = RANK) -> np.ndarray:
    """Return steps to 1e-12, (κ × spectrum, ξ, seed); `steps` + 1 for runs that do not reach it.

    Args:
        name: a key of `STEPS`.
        steps: the most steps.
        m: the side of A.
        rank: r = r_A.
    """
    *start, shape = _starts(m, rank)
    errors = np.asarray(_runs(name, steps, *start)[0])
    reached = errors.reshape(*shape, -1) <= 1e-12
    return np.where(reached.any(axis=-1), np.argmax(reached, axis=-1), steps + 1)


@claim(
    "fast-steps",
    "the library's steps reach 1e-12 in at most 9 (Newton) and 6 (QDWH) steps, for every κ and ξ",
    source="ours",
    derivation="polar-iterations",
    hypotheses="Nyström starts, ξ = 1e-3, 1, 1e3; m = 60 with r = r_A = 6 and 1, and m = r = r_A "
    "= 6; κ = 10, 1e4, 1e8, 1e12; geometric, near-constant and repeated eigenvalues; σ_1(A) = "
    "1e-6, 1, 1e6; five seeds; float64",
    removes="the weights of both",
    instead="ScaledGD with η = 1/2 in place of both",
    plain=True,
)
def library_counts(plain: bool = False) -> Measured:
    """Count the steps of the fused iterations."""
    names, shapes = (("plain", "plain"), SHAPES[:1]) if plain else (("newton", "qdwh"), SHAPES)
    newton, qdwh = (
        int(max(np.max(counts(name, 40, *shape)) for shape in shapes)) for name in names
    )
    return worst("steps to 1e-12, largest", {"newton": (newton, 9), "qdwh": (qdwh, 6)})


@claim(
    "rescaled-start",
    "η = 1/2 from cX_0, c minimizing ‖c²X_0X_0ᵀ − A‖_F, takes the same number of steps to "
    "1e-12 for every ξ",
    source="ours",
    derivation="symmetric-trajectories",
    hypotheses="the problems of fast-steps with m = 60 and r = 6; ξ = 1e-3, 1, 1e3 with one Ω "
    "for each problem",
    removes="the rescaling",
    instead="the start as it was drawn",
    rescale=False,
)
def rescaled_start(rescale: bool = True) -> Measured:
    """Count steps from starts whose scale is found by one product with A."""
    steps = counts("plain, rescaled" if rescale else "plain", 40)
    spread = np.max(steps, axis=1) - np.min(steps, axis=1)
    facts = {
        f"median steps at ξ = {scale:g}": float(np.median(steps[:, i]))
        for i, scale in enumerate((1e-3, 1, 1e3))
    }
    return Measured(float(np.max(spread)), 0, detail="steps, most less fewest over ξ", facts=facts)


@claim(
    "fast-steps-dynamics",
    "σ(Σ^{−1/2}QᵀX_t) of the library's steps are the scalars of newton-count and qdwh-count, "
    "each on its own",
    source="ours",
    derivation="polar-iterations",
    hypotheses="m = 60, r = r_A = 6, κ = 1e4, ξ = 0.1, Nyström start, 8 steps in float64; the "
    "scalars with 60 digits from σ of the start",
    removes="the start inside range(A)",
    instead="AΩ + N with ξ_n = 1e-2",
    noise=1e-2,
)
def dynamics(noise: float = 0.0) -> Measured:
    """Compare the library's steps with the scalars on which steps are counted."""
    spectrum = common.spectrum("geometric", RANK, 1e4)
    a, basis = common.psd_batch(common.keys(1, 101), common.M, spectrum[None])
    x0 = common.start_batch(common.keys(1, 102), a, RANK, np.array([0.1]), noise)
    gaps = {}
    for name, scalars in (("newton", newton_scalars), ("qdwh", halley_scalars)):
        history = np.asarray(_runs(name, 8, a, basis, spectrum[None], x0)[1])[0]
        phi = np.einsum("mk,tmr->tkr", np.asarray(basis)[0], history)
        values = singular_values(phi / np.sqrt(spectrum)[:, None])
        with mp.workdps(DIGITS):
            s = [mp.mpf(float(v)) for v in values[0]]
            run = scalars(s, s[-1], s[0])
            expected = [sorted(map(float, next(run)), reverse=True) for _ in values]
        gaps[name] = (np.max(np.abs(values / np.array(expected) - 1)), 1e-9)
    return worst("relative difference, largest over steps and s", gaps, rounding=True)


@jax.jit
@jax.vmap
def _textbook_ends(a: Any, x: Any) -> Any:
    """Return X_8 of X(aC + bI)(C + cI)⁻¹ on X only, from the library's bounds on σ(X)."""
    state = STEPS["qdwh"](nys.problems.Symmetric(a)).init(x)
    x, low = x / state.high, state.low / state.high

    def step(carry: Any, _: None) -> Any:
        x, low = carry
        d = jnp.cbrt(4 * (1 - low**2) / low**4)
        root = jnp.sqrt(1 + d)
        first = root + jnp.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * root)) / 2
        second = (first - 1) ** 2 / 4
        third = first + second - 1
        dual = nys.linalg.dual(x)
        gram = dual.T @ (a @ dual)
        eye = jnp.eye(x.shape[1], dtype=x.dtype)
        x = nys.lapack.solve(gram + third * eye, (x @ (first * gram + second * eye)).T).T
        return (x, jnp.minimum(low * (first + second * low**2) / (1 + third * low**2), 1)), None

    return jax.lax.scan(step, (x, low), length=8)[0][0]


@claim(
    "float32-fast-steps",
    "float32: scaled Newton and QDWH end below 5e-6 for each κ, as ScaledGD does (float32-dual)",
    source="ours",
    derivation="polar-iterations",
    hypotheses="the problems of float32-dual: m = 200, r = r_A = 20, σ_20 = 1/κ, κ = 1e2 … 1e5, "
    "X_8",
    removes="A X(XᵀX)⁻¹ in QDWH's step",
    instead="X(aC + bI)(C + cI)⁻¹, equal on range(A), which keeps and multiplies what rounding "
    "left outside",
    on_x_alone=True,
)
def floor(on_x_alone: bool = False) -> Measured:
    """Compare the two forms of QDWH in factors."""
    kappas = (1e2, 1e3, 1e4, 1e5)
    spectra = np.array([common.spectrum("last", 20, k) for k in kappas])
    a, basis = common.psd_batch(common.keys(len(kappas), 94), 200, spectra)
    x0 = common.start_batch(common.keys(len(kappas), 95), a, 20, np.ones(len(kappas)), 0.0)
    a, basis, spectra, x0 = (jnp.asarray(v, jnp.float32) for v in (a, basis, spectra, x0))
    if on_x_alone:
        ends = {"qdwh": _textbook_ends(a, x0)}
    else:
        start = (a, basis, spectra, x0)
        ends = {name: _runs(name, 8, *start)[1][:, -1] for name in ("newton", "qdwh")}
    finals = {}
    for name, x in ends.items():
        wide = [jnp.asarray(v, jnp.float64) for v in (x[:, None], basis, spectra)]
        errors = common.over_time(nys.optimality.residual_in_basis, 0, None, None)(*wide)
        for kappa, error in zip(kappas, errors[:, 0], strict=True):
            finals[f"{name}, κ = {kappa:.0e}"] = float(error)
    return Measured(
        max(finals.values()),
        5e-6,
        detail="‖X_8X_8ᵀ − A‖_F, largest",
        rounding=True,
        at_least=3e-4,
    )


@claim(
    "direct-factor",
    "the Nyström approximation through an orthonormal basis of range(AΩ) is A itself for r ≥ "
    "r_A, to 3e-14",
    source="ours",
    derivation="direct-factor",
    hypotheses="m = 60, r_A = 6, r = 6 and 9, κ = 10, 1e4, 1e8, 1e12, two kinds of spectrum, ten "
    "seeds each; float64",
    removes="r ≥ r_A",
    instead="r = 5 < r_A",
    ranks=(5,),
)
def direct_factor(ranks: tuple[int, ...] = (6, 9)) -> Measured:
    """Measure the direct factor, and beside it the textbook form AΩ L⁻ᵀ with LLᵀ = ΩᵀAΩ."""
    spectra = [
        common.spectrum(profile, RANK, kappa)
        for kappa in KAPPAS
        for profile in ("geometric", "last")
    ]
    gaps, plain = [], []
    for i, spectrum in enumerate(spectra):
        a, _ = nys.spectra.psd(common.key(103, i), common.M, jnp.asarray(spectrum))
        for rank in ranks:
            xs = np.asarray(_direct(common.keys(10, 104, i), a, rank))
            gaps.append(np.max(frobenius(xs @ np.swapaxes(xs, 1, 2) - np.asarray(a))))
        rng = np.random.default_rng((common.SEED, 105, i))
        for _ in range(10):
            omega = rng.standard_normal((common.M, 6))
            image = np.asarray(a) @ omega
            try:
                x = np.linalg.solve(np.linalg.cholesky(omega.T @ image), image.T).T
                plain.append(frobenius(x @ x.T - np.asarray(a)))
            except np.linalg.LinAlgError:  # indefinite by rounding, on some processors
                plain.append(np.inf)
    facts = {"textbook form, r = r_A": Limit(float(np.max(plain)), 1e-13, "≥")}
    detail = "‖XXᵀ − A‖_F, largest"
    return Measured(float(max(gaps)), 3e-14, detail=detail, facts=facts, rounding=True)


@functools.partial(jax.jit, static_argnums=2)
def _direct(keys: Any, a: Any, rank: int) -> Any:
    return jax.vmap(lambda k: nys.initializers.nystrom_approximation(k, a, rank))(keys)
