"""The reduced dynamics of the paper, and the exact trajectories behind them.

Write A = QΣQᵀ. From a Nyström start X_t = QΦ_t for all t (Lemmas 2, 4, 12), so that the iteration
on m × r factors is one on r_A × r matrices. In all functions `spectrum` is diag(Σ), a vector
(r_A,), and `learning_rate` is η. A spectrum of another shape is a ValueError.

The paper writes B_t for two things; here `core` is ΦΦᵀ (r_A, r_A), of the exactly and
over-parametrized problems, and `weak_gram` is ΦᵀΣ⁻¹Φ (r, r), of the under-parametrized one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from nyscaled import lapack, linalg, validation
from nyscaled.numerics import full_precision, norm
from nyscaled.typing import Factors, Number

__all__ = [
    "asymmetric_scale",
    "core_step",
    "pair_step",
    "phi_step",
    "phi_step_over",
    "relative_core_step",
    "scalar_step",
    "subspace_rate",
    "symmetric_errors",
    "weak_gram",
    "weak_gram_step",
]


@full_precision
def phi_step(
    phi: Float[Array, "k r"], spectrum: Float[Array, " k"], learning_rate: Number
) -> Float[Array, "k r"]:
    """Return Φ⁺ = (1−η)Φ + ηΣΦ(ΦᵀΦ)⁻¹: (11) if r = r_A, (15) if r < r_A.

    Args:
        phi: Φ (r_A, r), of full column rank.
        spectrum: the singular values of A, the diagonal of Σ (r_A,), all positive.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> phi_step(jnp.array([[1.0]]), jnp.array([1.0]), 0.5)
        Array([[1.]], dtype=float32)
    """
    validation.require_spectrum(spectrum, len(phi))
    f = linalg.factor(phi)
    return (1 - learning_rate) * phi + learning_rate * f.dual_of(spectrum[:, None] * f.z)


@full_precision
def phi_step_over(
    phi: Float[Array, "k r"], spectrum: Float[Array, " k"], learning_rate: Number
) -> Float[Array, "k r"]:
    """Return Φ⁺ = (1−η)Φ + ηΣ(Φ†)ᵀ, (27), for more columns than the rank.

    Args:
        phi: Φ (r_A, r), of full row rank, r > r_A.
        spectrum: the singular values of A, the diagonal of Σ (r_A,), all positive.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> phi_step_over(jnp.array([[2.0, 0.0]]), jnp.array([4.0]), 0.5)
        Array([[2., 0.]], dtype=float32)
    """
    validation.require_spectrum(spectrum, len(phi))
    pseudo = linalg.dual(phi.T).T  # (Φ†)ᵀ = (ΦΦᵀ)⁻¹Φ, and Φᵀ is the thin factor
    return (1 - learning_rate) * phi + learning_rate * (spectrum[:, None] * pseudo)


@full_precision
def core_step(
    core: Float[Array, "k k"], spectrum: Float[Array, " k"], learning_rate: Number
) -> Float[Array, "k k"]:
    """Return B⁺ = (1−η)²B + 2η(1−η)Σ + η²ΣB⁻¹Σ with B = ΦΦᵀ or ΦΨᵀ: (12), (28), (32).

    Args:
        core: B = ΦΦᵀ, or ΦΨᵀ in the asymmetric case (r_A, r_A), invertible.
        spectrum: the singular values of A, the diagonal of Σ (r_A,), all positive.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> core_step(jnp.array([[2.0]]), jnp.array([4.0]), 0.5)
        Array([[4.5]], dtype=float32)
    """
    validation.require_spectrum(spectrum, len(core))
    eta = learning_rate
    sigma = jnp.diag(spectrum)
    new = (1 - eta) ** 2 * core + 2 * eta * (1 - eta) * sigma
    return new + eta**2 * sigma @ lapack.solve(core, sigma)


@full_precision
def relative_core_step(c: Float[Array, "k k"], learning_rate: Number) -> Float[Array, "k k"]:
    """Return C⁺ = (1−η)²C + 2η(1−η)I + η²C⁻¹ for C = Σ⁻¹B (Lemma 8), which does not depend on A.

    Args:
        c: C = Σ⁻¹B (r_A, r_A), invertible.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> relative_core_step(jnp.array([[0.5]]), 0.5)
        Array([[1.125]], dtype=float32)
    """
    eta = learning_rate
    eye = jnp.eye(c.shape[0], dtype=c.dtype)
    return (1 - eta) ** 2 * c + 2 * eta * (1 - eta) * eye + eta**2 * lapack.inverse(c)


@full_precision
def weak_gram(phi: Float[Array, "k r"], spectrum: Float[Array, " k"]) -> Float[Array, "r r"]:
    """Return B = ΦᵀΣ⁻¹Φ = XᵀA†X, which is the identity at weak optima (Definition 1).

    Args:
        phi: Φ (r_A, r).
        spectrum: the singular values of A, the diagonal of Σ (r_A,), all positive.

    Examples:
        >>> weak_gram(jnp.array([[2.0], [0.0]]), jnp.array([4.0, 1.0]))
        Array([[1.]], dtype=float32)
    """
    validation.require_spectrum(spectrum, len(phi))
    scaled = phi / jnp.sqrt(spectrum)[:, None]
    return scaled.T @ scaled


@full_precision
def weak_gram_step(
    gram: Float[Array, "r r"],
    phi: Float[Array, "k r"],
    spectrum: Float[Array, " k"],
    learning_rate: Number,
) -> Float[Array, "r r"]:
    """Return B⁺ = (1−η)²B + 2η(1−η)I + η²ΘᵀΣΘ with B = ΦᵀΣ⁻¹Φ and Θ = Φ(ΦᵀΦ)⁻¹: (16).

    Args:
        gram: B = ΦᵀΣ⁻¹Φ (r, r).
        phi: Φ (r_A, r), of full column rank.
        spectrum: the singular values of A, the diagonal of Σ (r_A,), all positive.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> phi, spectrum = jnp.array([[2.0], [0.0]]), jnp.array([4.0, 1.0])
        >>> weak_gram_step(weak_gram(phi, spectrum), phi, spectrum, 0.5)
        Array([[1.]], dtype=float32)
    """
    validation.require_spectrum(spectrum, len(phi))
    eta = learning_rate
    theta = linalg.dual(phi)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    new = (1 - eta) ** 2 * gram + 2 * eta * (1 - eta) * eye
    return new + eta**2 * theta.T @ (spectrum[:, None] * theta)


@full_precision
def pair_step(factors: Factors, spectrum: Float[Array, " k"], learning_rate: Number) -> Factors:
    """Return Φ⁺ = (1−η)Φ + ηΣΨ^{−T} and Ψ⁺ = (1−η)Ψ + ηΣΦ^{−T}, (30), for t ≥ 1 and r = r_A.

    The product ΦΨᵀ then obeys (31) = (32), which is `core_step`.

    Args:
        factors: `Factors(Φ, Ψ)`, both (r, r) and invertible.
        spectrum: the singular values of A, the diagonal of Σ (r_A,), all positive.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> one = jnp.ones((1, 1))
        >>> pair_step(Factors(one, one), jnp.array([3.0]), 0.5)
        Factors(left=Array([[2.]], dtype=float32), right=Array([[2.]], dtype=float32))
    """
    phi, psi = factors
    validation.require_spectrum(spectrum, len(phi))
    eta = learning_rate
    return Factors(
        (1 - eta) * phi + eta * spectrum[:, None] * linalg.dual(psi),
        (1 - eta) * psi + eta * spectrum[:, None] * linalg.dual(phi),
    )


def scalar_step(d: Any, learning_rate: Number) -> Any:
    """Return d⁺ = (1−η)d + η/d for each singular value d of Σ^{-1/2}Φ; at η = 1/2 Heron's rule.

    The fixed point is 1 and the multiplier there is 1 − 2η. Convergence is linear, and quadratic at
    η = 1/2.

    Args:
        d: the singular values of Σ^{-1/2}Φ, of any shape, all positive.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> scalar_step(3.0, 0.5)  # halfway between 3 and 1/3
        1.6666666666666667
    """
    return (1 - learning_rate) * d + learning_rate / d


@functools.partial(jax.jit, static_argnames="num_steps")
@full_precision
def symmetric_errors(
    phi0: Float[Array, "k r"],
    spectrum: Float[Array, " k"],
    learning_rate: Number,
    num_steps: int,
) -> Float[Array, " t"]:
    """Return ‖X_tX_tᵀ − A‖_F for t = 0 … num_steps, of (2) or (26), from Φ_0 only. r ≥ r_A.

    This is a result of this project, not of the paper. With S = Σ^{-1/2}Φ_0 = V diag(d_0) Wᵀ the
    iteration is S⁺ = (1−η)S + η(S†)ᵀ. V and W never change, each d moves by `scalar_step`, and
    X_tX_tᵀ − A = QΣ^{1/2} V diag(d_t² − 1) VᵀΣ^{1/2}Qᵀ. For η = 1/2 the recursion has the closed
    form d_t = coth(2ᵗ artanh(min(d_0, 1/d_0))), t ≥ 1, so that d_t² − 1 = sinh(2ᵗ …)⁻² decays below
    any rounding. For other η the scalars are iterated.

    Args:
        phi0: QᵀX_0 (r_A, r), of full row rank.
        spectrum: diag(Σ) (r_A,), positive.
        learning_rate: a constant η in (0, 1].
        num_steps: a Python integer.

    Returns:
        (num_steps + 1,) errors, in units of A.

    Raises:
        ValueError: on r < r_A, and on a spectrum of another length than r_A.

    Examples:
        >>> errors = symmetric_errors(jnp.array([[3.0]]), jnp.array([1.0]), 0.5, 3)
        >>> [f"{float(e):.3g}" for e in errors]
        ['8', '1.78', '0.284', '0.0157']
    """
    k, r = phi0.shape
    validation.require_spectrum(spectrum, k)
    if r < k:
        raise ValueError(f"phi0 has shape {phi0.shape}; expected (r_A, r) with r ≥ r_A")
    root = jnp.sqrt(spectrum)[:, None]
    v, d0, _ = lapack.svd(phi0 / root)
    gaps = _squared_gaps(d0, jnp.asarray(learning_rate, d0.dtype), num_steps)

    def error(gap: Array) -> Array:
        core = root * (v * gap) @ v.T * root.T
        return norm(core)

    return lax.map(error, gaps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _squared_gaps(d0: Array, learning_rate: Array, num_steps: int) -> Float[Array, "t r"]:
    """The d_t² − 1. Derivatives are of the iteration: the closed form holds for η = 1/2 only."""
    t = jnp.arange(num_steps + 1, dtype=d0.dtype)[:, None]
    rate = jnp.arctanh(jnp.minimum(d0, 1 / d0))
    newton = jnp.where(t == 0, (d0 - 1) * (d0 + 1), jnp.sinh(2.0**t * rate) ** -2)
    general = _iterated_gaps(d0, learning_rate, num_steps)
    return jnp.where(learning_rate == 0.5, newton, general)


def _iterated_gaps(d0: Array, learning_rate: Array, num_steps: int) -> Float[Array, "t r"]:
    def step(d: Array, _: None) -> tuple[Array, Array]:
        return scalar_step(d, learning_rate), (d - 1) * (d + 1)

    return lax.scan(step, d0, length=num_steps + 1)[1]


@_squared_gaps.defjvp
def _squared_gaps_jvp(
    num_steps: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    iterated = functools.partial(_iterated_gaps, num_steps=num_steps)
    return _squared_gaps(*primals, num_steps), jax.jvp(iterated, primals, tangents)[1]


@functools.partial(jax.jit, static_argnames="num_steps")
def asymmetric_scale(learning_rate: Number, num_steps: int) -> Float[Array, " t"]:
    """Return c_t − 1 for t = 1 … num_steps, where X_tY_tᵀ = c_t A exactly under (5), (6). r ≥ r_A.

    This is a result of this project, not of the paper. c_1 = η and c⁺ = (1−η)²c + 2η(1−η) + η²/c,
    regardless of A, Ω, the sizes and κ. At η = 1 it is Theorem 3. The iteration runs in e = c − 1,
    as e⁺ = (1−2η)e + η²e²/(1+e), which does not cancel.

    Args:
        learning_rate: the step size η, a number or a scalar array.
        num_steps: the number of values, ≥ 1.

    Examples:
        >>> [f"{float(e):.2g}" for e in asymmetric_scale(0.5, 4)]
        ['-0.5', '0.12', '0.0035', '3e-06']
    """
    eta = jnp.asarray(learning_rate, jnp.result_type(float))

    def body(e: Array, _: None) -> tuple[Array, Array]:
        return (1 - 2 * eta) * e + eta**2 * e**2 / (1 + e), e

    return lax.scan(body, eta - 1, length=num_steps)[1]


def subspace_rate(spectrum: Float[Array, " k"], rank: int, learning_rate: Number) -> Any:
    """Return ρ = 1 − η(1 − σ_{r+1}/σ_r), the rate per step of the iteration with r < r_A columns.

    This is a result of this project, not of the paper. (2) is a damped subspace iteration, whose
    only attracting fixed points span the top r eigenvectors. The angle to them decays as ρᵗ. The
    excess loss f − f* decays as max(ρ, |1−2η|)²ᵗ, where |1−2η| is the rate within the subspace. The
    iteration passes other weak optima and does not end there.

    Args:
        spectrum: the eigenvalues of A in descending order (r_A,).
        rank: the number of columns r < r_A.
        learning_rate: the step size η, a number or a scalar array.

    Examples:
        >>> float(subspace_rate(jnp.array([1.0, 0.5]), rank=1, learning_rate=0.5))
        0.75
    """
    ordered = jnp.sort(jnp.asarray(spectrum))[::-1]
    if not 1 <= rank < ordered.size:
        raise ValueError(f"rank is {rank}; expected 1 ≤ rank < r_A = {ordered.size}")
    return 1 - learning_rate * (1 - ordered[rank] / ordered[rank - 1])
