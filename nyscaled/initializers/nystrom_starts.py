"""Nyström starts: (3), (5), from gradients (A.4), perturbed, rescaled, and the approximation of A.

`scale` is ξ, the standard deviation of the entries of the sketch Ω, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from nyscaled import validation
from nyscaled.lapack import eigh, orthogonal, qr
from nyscaled.linalg import default_rcond
from nyscaled.matrices import as_array
from nyscaled.numerics import full_precision, norm
from nyscaled.problems import Asymmetric, Symmetric
from nyscaled.typing import Factors, MatrixLike, Number, Problem, Sketch


def random_sketch(
    key: Key[Array, ""], n: int, rank: int, scale: Number, sketch: Sketch, dtype: DTypeLike
) -> Float[Array, "n r"]:
    """Return Ω (n, rank): N(0, scale²) entries, or `scale` times a uniform orthonormal frame.

    Args:
        key: a PRNG key.
        n: the number of rows.
        rank: the number of columns r ≥ 1.
        scale: the standard deviation of the entries, or the length of the columns of a
            frame.
        sketch: "gaussian", or "stiefel" for a uniform orthonormal frame.
        dtype: float32 or float64, the dtype of the result.

    Examples:
        >>> random_sketch(jax.random.key(0), 50, 4, 1.0, "gaussian", jnp.float32).shape
        (50, 4)
    """
    validation.require_positive("scale", scale)
    size = jnp.asarray(scale, dtype)  # a scalar of NumPy would make float32 float64
    if sketch == "gaussian":
        return size * jax.random.normal(key, (n, rank), dtype)
    if sketch == "stiefel":
        return size * orthogonal(key, n, rank, dtype)
    raise ValueError(f"sketch is {sketch!r}; expected 'gaussian' or 'stiefel'")


@full_precision
def nystrom(
    key: Key[Array, ""],
    a: MatrixLike,
    rank: int,
    scale: Number = 1.0,
    *,
    sketch: Sketch = "gaussian",
) -> Float[Array, "m r"]:
    """Return the Nyström initialization (3) of a symmetric problem: X_0 = AΩ.

    Args:
        key: PRNG key for Ω.
        a: A (m, m), PSD: dense, sparse or an operator.
        rank: columns r of X_0, 1 ≤ r ≤ m.
        scale: ξ, the standard deviation of Ω's entries. For a Stiefel sketch, the length of
            Ω's orthonormal columns.
        sketch: "gaussian", or "stiefel" for a uniform draw of an orthonormal Ω.

    Returns:
        X_0 (m, r) in the dtype of A. Full column rank, almost surely, if rank(A) ≥ r (Lemma 1);
        rank(A) otherwise (Lemma 11).

    Raises:
        ValueError: on a bad rank or scale, a non-square, non-symmetric, non-finite, zero or
            integer A, or an A whose compression ΩᵀAΩ has a negative eigenvalue (outside of jit).

    Examples:
        >>> a = jnp.diag(jnp.array([2.0, 1.0, 0.0]))
        >>> nystrom(jax.random.key(0), a, rank=2).shape
        (3, 2)
    """
    a = Symmetric(a).a
    validation.require_rank(rank, a.shape)
    omega = random_sketch(key, a.shape[1], rank, scale, sketch, a.dtype)
    x0 = a @ omega
    validation.require_semidefinite(omega.T @ x0, a.shape[0])
    return x0


@full_precision
def nystrom_factors(
    key: Key[Array, ""],
    a: MatrixLike,
    rank: int,
    scale: Number = 1.0,
    *,
    sketch: Sketch = "gaussian",
) -> Factors:
    """Return the Nyström initialization (5) of an asymmetric problem: X_0 = AΩ, Y_0 = 0.

    Args:
        key: PRNG key for Ω (n, r).
        a: A (m, n): dense, sparse or an operator.
        rank: 1 ≤ r ≤ min(m, n).
        scale: ξ; see `nystrom`.
        sketch: see `nystrom`.

    Returns:
        Factors: left AΩ (m, r), right zeros (n, r).

    Raises:
        ValueError: on a bad rank or scale, or a non-finite, zero or integer A.

    Examples:
        >>> x0, y0 = nystrom_factors(jax.random.key(0), jnp.ones((4, 3)), rank=1)
        >>> x0.shape, y0.shape
        ((4, 1), (3, 1))
    """
    a = Asymmetric(a).a
    validation.require_rank(rank, a.shape)
    omega = random_sketch(key, a.shape[1], rank, scale, sketch, a.dtype)
    return Factors(a @ omega, jnp.zeros((a.shape[1], rank), a.dtype))


@full_precision
def nystrom_from_gradient(
    key: Key[Array, ""],
    gradient: Callable[[Float[Array, "m r"]], Float[Array, "m r"]],
    m: int,
    rank: int,
    scale: Number = 1.0,
    *,
    sketch: Sketch = "gaussian",
    dtype: DTypeLike | None = None,
) -> Float[Array, "m r"]:
    """Return (3) from a gradient oracle of (1), without A (A.4): X_0 = AΩ by one gradient.

    A.4 has −∇f(Ω) + ΩΩᵀΩ. Here the start is minus the derivative of ∇f at 0 along Ω, which takes
    one evaluation in forward mode. For (1) that is the same, without cancellation at any scale of
    A. For another loss of XXᵀ, such as sensing, it is minus the gradient in XXᵀ at 0, times Ω. The
    form of A.4 would have an error ((𝒜*𝒜 − I)(ΩΩᵀ))Ω there. It grows as ξ³, and exceeds the start
    at ξ = 1. `rescaled` makes the start independent of ξ.

    Args:
        key: PRNG key for Ω.
        gradient: ∇f, a function of JAX arrays that `jax.jvp` takes.
        m: rows of X.
        rank: columns of X, 1 ≤ r ≤ m.
        scale: see `nystrom`.
        sketch: see `nystrom`.
        dtype: float32 or float64; JAX's default float if None.

    Examples:
        >>> a = jnp.diag(jnp.array([2.0, 1.0, 0.0]))
        >>> x0 = nystrom_from_gradient(jax.random.key(0), Symmetric(a).gradient, m=3, rank=2)
        >>> bool(jnp.allclose(x0, nystrom(jax.random.key(0), a, rank=2), atol=1e-5))
        True
    """
    validation.require_rank(rank, (m, m))
    omega = random_sketch(key, m, rank, scale, sketch, dtype or jnp.result_type(float))

    def checked(x: Array) -> Array:
        return _gradient(gradient(x), x.shape)

    return -jax.jvp(checked, (jnp.zeros_like(omega),), (omega,))[1]


@full_precision
def nystrom_factors_from_gradient(
    key: Key[Array, ""],
    gradient: Callable[[Factors], Factors],
    shape: tuple[int, int],
    rank: int,
    scale: Number = 1.0,
    *,
    sketch: Sketch = "gaussian",
    dtype: DTypeLike | None = None,
) -> Factors:
    """Return (5) from a gradient oracle of (4), without A: X_0 = −∇_X f(0, Ω) = AΩ, Y_0 = 0 (A.4).

    For any other loss of XYᵀ, X_0 is minus the gradient in XYᵀ at 0, times Ω: 𝒜*(b)Ω for sensing.
    The adapters of a network start from their first gradients in this way.

    Args:
        key: a PRNG key.
        gradient: a function from `Factors` to the gradient of the loss, as `Factors`.
        shape: the shape (m, n) of A.
        rank: the number of columns r ≥ 1.
        scale: ξ, the standard deviation of the entries of Ω.
        sketch: "gaussian", or "stiefel" for a uniform orthonormal frame.
        dtype: float32 or float64, the dtype of the result.

    Examples:
        >>> a = jnp.ones((6, 5))
        >>> gradient = Asymmetric(a).gradient
        >>> x, y = nystrom_factors_from_gradient(jax.random.key(0), gradient, a.shape, rank=2)
        >>> bool(jnp.allclose(x, nystrom_factors(jax.random.key(0), a, rank=2).left, rtol=1e-4))
        True
    """
    validation.require_rank(rank, shape)
    m, n = shape
    omega = random_sketch(key, n, rank, scale, sketch, dtype or jnp.result_type(float))
    grads = gradient(Factors(jnp.zeros((m, rank), omega.dtype), omega))
    if not isinstance(grads, Factors):
        raise ValueError(f"the gradient is a {type(grads).__name__}; expected nyscaled.Factors")
    return Factors(-_gradient(grads.left, (m, rank)), jnp.zeros_like(omega))


def _gradient(value: Any, shape: tuple[int, ...]) -> Array:
    """The result of a user's gradient, if it is an array of this shape: others may broadcast."""
    value = as_array("the gradient", value)
    if value.shape != shape:
        raise ValueError(
            f"the gradient has shape {value.shape}; expected {shape}, that of its point"
        )
    return value


@full_precision
def perturbed(
    key: Key[Array, ""], a: MatrixLike, rank: int, scale: Number = 1.0, noise: Number = 1e-4
) -> Float[Array, "m r"]:
    """Return a perturbed Nyström start, Fig. 1 (b) and 4 (b): X_0 = AΩ + N, N_ij ~ N(0, noise²).

    Ω is the one of `nystrom(key, a, rank, scale)`, so the two starts differ by N only. N leaves
    range(A), and the rate drops from quadratic to linear.

    Args:
        key: a PRNG key.
        a: A (m, m), positive semidefinite.
        rank: the number of columns r ≥ 1.
        scale: ξ, the standard deviation of the entries of Ω.
        noise: ξ_n ≥ 0, the standard deviation of the entries of N.

    Examples:
        >>> a, key = jnp.diag(jnp.array([2.0, 1.0, 0.0])), jax.random.key(0)
        >>> x, exact = perturbed(key, a, 2), nystrom(key, a, 2)
        >>> bool(0 < jnp.abs(x - exact).max() < 1e-3)
        True
    """
    validation.require_nonnegative("noise", noise)
    x0 = nystrom(key, a, rank, scale)
    draw = jax.random.normal(jax.random.fold_in(key, 1), x0.shape, x0.dtype)
    return x0 + jnp.asarray(noise, x0.dtype) * draw


@full_precision
def rescaled(x0: Float[Array, "m r"], a: MatrixLike) -> Float[Array, "m r"]:
    """Return cX_0 with the c that minimizes ‖c²X_0X_0ᵀ − A‖_F, or ‖c²𝒜(X_0X_0ᵀ) − b‖ for sensing.

    c² = tr(X_0ᵀAX_0)/‖X_0ᵀX_0‖_F², and tr(X_0ᵀ𝒜*(b)X_0)/‖𝒜(X_0X_0ᵀ)‖², by one product with A or
    𝒜*(b). A run from a rescaled Nyström start does not depend on ξ. (Without this, the number of
    steps grows by |log₂ ξ|.)

    Args:
        x0: the start (m, r), for instance `nystrom(key, a, r, scale)`.
        a: A (m, m), PSD: dense, sparse or an operator; or a problem with `measured_norm`,
            such as a square `problems.Sensing`.

    Returns:
        (m, r) in the dtype of A.

    Raises:
        ValueError: if X_0 is zero or does not fit A, if A is not symmetric, or if X_0ᵀAX_0 has no
            positive trace, so that the best c is 0 (outside of jit).

    Examples:
        >>> a = jnp.diag(jnp.array([4.0, 0.0]))
        >>> rescaled(jnp.array([[100.0], [0.0]]), a)
        Array([[2.],
               [0.]], dtype=float32)
    """
    problem: Any = a if isinstance(a, Problem) else Symmetric(a)
    if not hasattr(problem, "measured_norm"):
        raise ValueError(
            f"the problem is a {type(problem).__name__}; expected one whose points may be X, such "
            "as problems.Symmetric"
        )
    x0 = problem.check(x0)
    unit = x0 / norm(x0)  # X_0ᵀX_0 of a large ξ would overflow float32
    image = problem.target() @ unit
    trace = jnp.sum(unit * image)
    if validation.is_concrete(trace) and not trace > 0:
        raise ValueError(
            f"tr(X₀ᵀAX₀) is {float(trace):.2g} for X₀ of unit length; expected it positive: a "
            "positive semidefinite A, and a start that is not zero"
        )
    return unit * (jnp.sqrt(trace) / problem.measured_norm(unit))


@full_precision
def nystrom_approximation(
    key: Key[Array, ""], a: MatrixLike, rank: int, *, sketch: Sketch = "gaussian"
) -> Float[Array, "m r"]:
    """Return the Nyström approximation of A as a factor X = AQ L⁻ᵀ, LLᵀ = QᵀAQ.

    Q is an orthonormal basis of range(AΩ). For r ≥ r_A the result solves (1), XXᵀ = A, with two
    products with A. For r < r_A, XXᵀ = AQ(QᵀAQ)⁻¹QᵀA is near-optimal, a start for more steps.

    The textbook form AΩ L⁻ᵀ with LLᵀ = ΩᵀAΩ needs one product less; its error is
    eps·κ(QᵀΩ)², and for r > r_A there is no such L. Here L is the root of an eigendecomposition of
    QᵀAQ, whose eigenvalues up to √m·eps times the largest are noise and are left out: those columns
    of X are zero.

    Args:
        key: PRNG key for Ω.
        a: A (m, m), PSD: dense, sparse or an operator.
        rank: columns of Ω and X, 1 ≤ r ≤ m.
        sketch: as in `nystrom`.

    Returns:
        (m, r) in the dtype of A, columns by falling eigenvalues of QᵀAQ.

    Raises:
        ValueError: as in `nystrom`.

    References:
        Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53, 2011,
        Algorithm 5.5.

    Examples:
        >>> a = jnp.diag(jnp.array([2.0, 1.0, 0.0]))
        >>> x = nystrom_approximation(jax.random.key(0), a, rank=2)
        >>> bool(jnp.allclose(x @ x.T, a, atol=1e-6))
        True
    """
    basis, _ = qr(nystrom(key, a, rank, sketch=sketch))
    image = Symmetric(a).a @ basis
    values, vectors = eigh(basis.T @ image)
    live = values > default_rcond(a.shape[0], values.dtype) * values[-1]
    root = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, values, 1)), 0)
    return (image @ (vectors * root))[:, ::-1]
