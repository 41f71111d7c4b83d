"""Appendix A.2 and Algorithms 1, 2: the linear adapter, NoRA, NoRA+."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import nyscaled as nys
from paper_checks.framework import Measured, claim, common, worst
from paper_checks.framework.common import M, N, eps, frobenius

RANK = 5


DRAWS = [
    (kappa, size, scale)
    for kappa in (2.0, 1e2, 1e4)
    for size, scale in zip((1.0, 1e-6, 1e6), (0.1, 1.0, 3.0), strict=True)
]
"""κ (float32: its root), σ_1(A) and ξ of the matrices."""


WHERE = (
    f"κ = {common.listed(sorted({kappa for kappa, *_ in DRAWS}))} (float32: their roots), "
    "(σ_1(A), ξ) = (1, 0.1), (1e-6, 1), (1e6, 3); float64 and float32"
)


def draws(dtype: str, m: int, n: int, rank: int) -> Iterator[tuple[jax.Array, np.ndarray, float]]:
    """Yield A, U and ξ of each draw.

    Args:
        dtype: of A.
        m: rows of A.
        n: columns of A; 0 for A = U diag(σ)Uᵀ.
        rank: the rank of A.
    """
    rng = np.random.default_rng((common.SEED, 75, m, n, rank))
    for kappa, size, scale in DRAWS:
        kappa = kappa if dtype == "float64" else kappa**0.5
        values = size * common.spectrum("geometric", rank, kappa)
        left = np.linalg.qr(rng.standard_normal((m, rank)))[0]
        right = np.linalg.qr(rng.standard_normal((n, rank)))[0] if n else left
        yield jnp.asarray((left * values) @ right.T, dtype), left, scale


@claim(
    "a2-linear-lora",
    "½‖(W_0 + XYᵀ)D − BD‖_F² with DDᵀ = I is f(X, Y) of (4) with A = B − W_0: equal losses and "
    "gradients",
    hypotheses="W_0, B 60 × 40, D 40 × 200 with orthonormal rows, 20 random (X, Y), r = 5",
    removes="whitened data",
    instead="Gaussian D/√200 without correction",
    whitened=False,
)
def linear_lora(whitened: bool = True) -> Measured:
    """Compare A.2 with the gradient of the layer's loss by automatic differentiation."""
    rng = np.random.default_rng((common.SEED, 70))
    base, target = rng.standard_normal((2, M, N))
    data = rng.standard_normal((N, 200)) / 200**0.5
    if whitened:
        data = np.linalg.qr(data.T)[0].T
    problem = nys.problems.Asymmetric(jnp.asarray(target - base))

    def layer_loss(f: nys.Factors) -> jax.Array:
        return jnp.sum(((base + f.left @ f.right.T) @ data - target @ data) ** 2) / 2

    value_and_gradient = jax.jit(jax.value_and_grad(layer_loss))
    plain_loss = jax.jit(lambda p, f: p.loss(f))
    plain_gradient = jax.jit(lambda p, f: p.gradient(f))
    losses, gradients = [], []
    for _ in range(20):
        f = nys.Factors(
            jnp.asarray(rng.standard_normal((M, RANK))), jnp.asarray(rng.standard_normal((N, RANK)))
        )
        loss, gradient = value_and_gradient(f)
        expected = plain_gradient(problem, f)
        losses.append(abs(float(loss / plain_loss(problem, f)) - 1))
        for part, other in zip(gradient, expected, strict=True):
            gradients.append(float(frobenius(part - other) / frobenius(other)))
    return worst(
        "relative differences",
        {"loss": (max(losses), 1e-12), "gradient": (max(gradients), 1e-12)},
        rounding=True,
    )


@claim(
    "a3-joint",
    "NoRA and LoRA adapters, trained, share one base: each model is W_0 + s·XYᵀ of its own "
    "adapter, and no bit of W_0 changes",
    hypotheses="nys.lora.apply on an nnx.Linear, 40 → 60, r = 5, s = 2; training imitated by a "
    "random change of all factors; each adapter activated in turn; float32, in units of "
    "eps·‖model‖",
    removes="NoRA's start",
    instead="PiSSA's, of which a trained model is W_0 − s·X_0Y_0ᵀ + s·XYᵀ",
    init="pissa",
)
def joint_deployment(init: str = "nora") -> Measured:
    """Measure A.3: adapters that do not change the base are deployed together."""
    model = nnx.Sequential(nnx.Linear(N, M, rngs=nnx.Rngs(0)))
    layer: Any = model.layers[0]
    kernel = np.array(layer.kernel[...])
    for i, start in enumerate(("lora", init)):
        key = common.key(88, i)
        nys.lora.apply(model, RANK, 2 * RANK, targets=".*", init=start, key=key, name=start)
    gaps = []
    for i, name in enumerate(("lora", init)):
        adapter = layer.adapters[name]
        for j, factor in enumerate((adapter.lora_a, adapter.lora_b)):
            change = jax.random.normal(common.key(89, i, j), factor.shape, jnp.float32)
            factor[...] += 0.1 * change
        nys.lora.activate(model, name)
        plain = kernel + 2.0 * np.asarray(adapter.lora_a[...]) @ np.asarray(adapter.lora_b[...])
        gap = frobenius(np.asarray(model(jnp.eye(N))) - plain) / frobenius(plain)
        gaps.append(float(gap) / eps("float32"))
    changed = float(np.array(layer.kernel[...]).tobytes() != kernel.tobytes())
    return worst(
        "‖model − (W_0 + s·XYᵀ)‖_F, and whether W_0 changed",
        {"difference": (max(gaps), 30.0), "changed": (changed, 0.5)},
        rounding=True,
    )


@claim(
    "alg-1",
    "NoRA's start X_0 = W_0Ω, Y_0 = 0: W_0 + X_0Y_0ᵀ is W_0 to the last bit, and X_0 is in "
    "range(W_0)",
    hypotheses=f"W_0 60 × 40 of rank 8, r = 1, 5; {WHERE}; range by optimality.residual_space in "
    "units of eps·‖X_0‖",
    removes="NoRA's start",
    instead="the balanced SVD start (PiSSA's), whose product must be taken from W_0",
    spectral=True,
)
def algorithm_1(spectral: bool = False) -> Measured:
    """Algorithm 1, lines 1 and 2: the adapter's start. The optimizer that follows is any."""
    changed, outside = 0.0, []
    for dtype in common.DTYPES:
        for rank in (1, RANK):
            for weight, left, scale in draws(dtype, M, N, 8):
                before = np.array(weight)
                start = _spectral if spectral else _nora
                x0, y0 = start(common.key(76), weight, rank, scale)
                after = np.asarray(weight + x0 @ y0.T)
                changed = max(changed, float(after.tobytes() != before.tobytes()))
                rest = nys.optimality.residual_space(x0, jnp.asarray(left, dtype))
                outside.append(float(rest / jnp.linalg.norm(x0)) / eps(dtype))
    return worst(
        "whether W_0 + X_0Y_0ᵀ is not W_0, and ‖(I − UUᵀ)X_0‖/‖X_0‖ in eps",
        {"changed": (changed, 0.5), "outside": (max(outside), 30.0)},
        rounding=True,
    )


@functools.partial(jax.jit, static_argnums=2)
def _nora(key: Any, weight: Any, rank: int, scale: Any) -> nys.Factors:
    return nys.initializers.nystrom_factors(key, weight, rank, scale)


@functools.partial(jax.jit, static_argnums=2)
def _spectral(key: Any, weight: Any, rank: int, scale: Any) -> Any:
    return nys.initializers.spectral(nys.problems.Asymmetric(weight), rank)


ALGORITHM_2: dict[str, Any] = {
    "statement": (
        "NoRA+: G_X ← G_X M/‖M‖_F, M = (YᵀY + λI)^{−1}, for t > 0 only, and G_Y ← G_Y N/‖N‖_F, N = "
        "(XᵀX + λI)^{−1}, both of the factors before the step"
    ),
    "hypotheses": (
        "nora_plus(optax.sgd) against a plain NumPy transcription, 4 steps from Algorithm 1's "
        "start with random gradients, that in X at t = 0 among them; r = 1, 5, λ = 1e-6, 1e-2; "
        "float64 and float32"
    ),
}


@claim(
    "alg-2-first",
    **ALGORITHM_2,
    removes="“for t > 0 only”",
    instead="a transcription that preconditions G_X at t = 0 too",
    first=0,
)
@claim(
    "alg-2",
    **ALGORITHM_2,
    removes="the normalization by ‖(·)^{−1}‖_F",
    instead="a transcription with the damped inverses as they are",
    normalized=False,
)
def algorithm_2(normalized: bool = True, first: int = 1) -> Measured:
    """Algorithm 2, lines 3 to 10, with gradient descent as the optimizer of line 9."""
    errors = {}
    for dtype in common.DTYPES:
        gaps = []
        for rank in (1, RANK):
            for damping in (1e-6, 1e-2):
                start, gradients, factors = _adapters_trained(dtype, rank, damping)
                expected = _algorithm_2_in_numpy(start, gradients, damping, normalized, first)
                for factor, other in zip(factors, expected, strict=True):
                    gap = np.linalg.norm(np.asarray(factor, np.float64) - other)
                    gaps.append(float(gap / np.linalg.norm(other)))
        errors[dtype] = (max(gaps), 1e3 * eps(dtype))
    return worst("relative error of the factors after 4 steps", errors, rounding=True)


@functools.cache
def _adapters_trained(
    dtype: str, rank: int, damping: float
) -> tuple[nys.Factors, list[jax.Array], nys.Factors]:
    """Return Algorithm 1's start, four gradients, and the library's factors after them."""
    weight = next(draws(dtype, M, N, 20))[0]
    start = factors = nys.initializers.nystrom_factors(common.key(78), weight, rank, 0.1)
    gradients = [jax.random.normal(common.key(79, t), (M + N, rank), dtype) for t in range(4)]
    state = nys.nora_plus(optax.sgd(0.1), damping).init(factors)
    for g in gradients:
        state, factors = _nora_plus(damping, nys.Factors(g[:M], g[M:]), state, factors)
    return start, gradients, factors


@jax.jit
def _nora_plus(damping: Any, gradient: Any, state: Any, factors: Any) -> tuple[Any, Any]:
    """Make a step as a training loop does."""
    updates, state = nys.nora_plus(optax.sgd(0.1), damping).update(gradient, state, factors)
    return state, optax.apply_updates(factors, updates)


def _algorithm_2_in_numpy(
    start: nys.Factors, gradients: list[jax.Array], damping: float, normalized: bool, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of a plain transcription; line 6 acts from the step `first` on."""
    x, y = (np.asarray(f, np.float64) for f in start)

    def preconditioned(g: np.ndarray, factor: np.ndarray) -> np.ndarray:
        inverse = np.linalg.inv(factor.T @ factor + damping * np.eye(factor.shape[1]))
        return g @ inverse / (np.linalg.norm(inverse) if normalized else 1)

    for t, g in enumerate(gradients):
        gx, gy = np.asarray(g[:M], np.float64), np.asarray(g[M:], np.float64)
        gx = preconditioned(gx, y) if t >= first else gx
        gy = preconditioned(gy, x)
        x, y = x - 0.1 * gx, y - 0.1 * gy
    return x, y
