"""Accelerated polar iterations as fused steps of problem (1): scaled Newton, and QDWH.

With A = QΣQᵀ and X = QΣ^{1/2}S, step (2) at η = 1/2 reads S⁺ = (S + S⁻ᵀ)/2: Newton's iteration for
the orthogonal polar factor of S. The singular vectors of S do not change, and each singular value s
follows s⁺ = (s + 1/s)/2. Far from 1 a step only halves s, so the number of steps of (2) grows like
log κ. Weights that follow the extreme values of s avoid that: at most 9 steps of Newton's iteration
(Byers and Xu) and 6 of Halley's (QDWH) suffice for κ(S) ≤ 1e16. From a Nyström start X_0 = AΩ, κ(S)
is about κ(A)^{1/2} κ(QᵀΩ). The steps need A X(XᵀX)⁻¹, as (2) does, and r × r matrices.

References:
    Higham, Computing the polar decomposition, with applications, SIAM J. Sci. Stat. Comput. 7,
    1986.
    Byers and Xu, A new scaling for Newton's iteration for the polar decomposition and its backward
    stability, SIAM J. Matrix Anal. Appl. 30, 2008.
    Nakatsukasa, Bai and Gygi, Optimizing Halley's iteration for computing the matrix polar
    decomposition, SIAM J. Matrix Anal. Appl. 31, 2010.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from nyscaled import linalg
from nyscaled._pytree import field, pytree_dataclass
from nyscaled.lapack import eigh, inverse_cholesky, svd
from nyscaled.numerics import clipped, full_precision, norm
from nyscaled.problems import Symmetric
from nyscaled.solvers.rank import cut_rank
from nyscaled.solvers.status import Status
from nyscaled.typing import Params, Scalar

Scaling = Literal["byers_xu", "optimal", "frobenius"]


class PolarState(NamedTuple):
    """State of the polar steps: X = factors · rotationᵀ, and bounds low ≤ s ≤ high on σ(S)."""

    factors: Float[Array, "m r"]
    rotation: Float[Array, "r r"]
    indefinite: Bool[Array, ""]
    low: Scalar
    high: Scalar


def _relative(
    form: Float[Array, "r r"], x: Float[Array, "r r"], dual: Float[Array, "r r"]
) -> tuple[Float[Array, "r r"], Float[Array, "r r"]]:
    """S and S⁻ᵀ up to rotations, from WᵀAW, WᵀX and Wᵀ dual(X), W an orthonormal basis of range(X).

    Two matrices, because each extreme is accurate only as a largest singular value. Eigenvalues of
    A at its rounding level are raised to it: the bounds they give are then too wide, which costs a
    step. Zero columns of X leave zeros.

    Any root R of RRᵀ = `form` will do, and to derivatives it is one with R' = ½ form' R⁻ᵀ: that of
    eigenvectors would divide by gaps that may be rounding.
    """
    constant = lax.stop_gradient(form)
    values, vectors = eigh(constant)
    floor = form.shape[0] * jnp.finfo(form.dtype).eps * values[-1]
    seen = values > floor
    root = jnp.sqrt(jnp.where(seen, values, floor))[:, None]
    turned = jnp.where(seen[:, None] & seen, vectors.T @ (form - constant) @ vectors, 0)
    change = turned / root / root.T / 2  # zero, with the derivative R⁻¹R'
    s, s_dual = vectors.T @ x / root, root * (vectors.T @ dual)
    return s - change @ s, s_dual + change @ s_dual


def _measured(
    f: linalg.ThinFactorization, x: Float[Array, "m r"], image: Float[Array, "m r"]
) -> tuple[Float[Array, "r r"], Float[Array, "r r"]]:
    """`_relative` of a factor X, from its factorization and `image` = A z."""
    basis = f.z @ f.core
    form = f.core.T @ (f.z.T @ image) @ f.core
    return _relative(form, basis.T @ x, f.dual_of(basis.T @ f.z))


def _size(s: Float[Array, "r r"], order: Literal[2, "fro"]) -> Scalar:
    """The spectral or the Frobenius norm."""
    if order == "fro":
        return norm(s)
    u, singular, vt = svd(lax.stop_gradient(s))
    return singular[0] + u[:, 0] @ (s - lax.stop_gradient(s)) @ vt[0]


class _PolarStep:
    """What the two steps share: the start and its bounds."""

    problem: Any

    @full_precision
    def init(self, params: Params) -> PolarState:
        """Return the start, its numerical rank cut (`rank.cut_rank`), and the bounds on σ(S)."""
        cut = cut_rank(self.problem, params)
        f = linalg.factor(cut.factors)
        s, s_dual = _measured(f, cut.factors, self.problem.target() @ f.z)
        low, high = 1 / _size(s_dual, 2), _size(s, 2)
        return PolarState(cut.factors, cut.rotation, cut.indefinite, low, high)

    @full_precision
    def params(self, state: PolarState) -> Float[Array, "m r"]:
        """Return X in the caller's coordinates."""
        return state.factors @ state.rotation.T

    def status(self, state: PolarState) -> Array:
        """Return INDEFINITE if A is not positive semidefinite on the range of the start."""
        return jnp.where(state.indefinite, Status.INDEFINITE, Status.MAX_STEPS)


@pytree_dataclass
class ScaledNewtonStep(_PolarStep):
    """Newton's iteration with scaling; see `scaled_newton_step`."""

    problem: Any
    scaling: Scaling = field(static=True, default="byers_xu")

    @functools.partial(jax.jit, inline=True)
    @full_precision
    def update(self, state: PolarState) -> PolarState:
        """Return the state after one step; A is used only in A @ thin."""
        x, low, high = state.factors, state.low, state.high
        f = linalg.factor(x)
        image = self.problem.target() @ f.z
        if self.scaling == "byers_xu":
            mu = 1 / (jnp.sqrt(low) * jnp.sqrt(high))
        else:
            s, s_dual = _measured(f, x, image)
            order = 2 if self.scaling == "optimal" else "fro"
            mu = jnp.sqrt(_size(s_dual, order) / _size(s, order))
            # Near the end μ − 1 would be the rounding of S; the bounds are 1 by then.
            mu = clipped(mu, 1 / high, 1 / low)

        def newton(s: Array) -> Array:
            return (mu * s + 1 / (mu * s)) / 2

        new = (mu * x + f.dual_of(image) / mu) / 2
        bound = clipped(newton(high), newton(low), jnp.inf)
        return state._replace(factors=new, low=jnp.ones_like(low), high=bound)


@pytree_dataclass
class QDWHStep(_PolarStep):
    """Halley's iteration with dynamical weights; see `qdwh_step`."""

    problem: Any

    @functools.partial(jax.jit, inline=True)
    @full_precision
    def update(self, state: PolarState) -> PolarState:
        """Return the state after one step; A is used only in A @ thin."""
        x = state.factors / state.high
        eps = jnp.finfo(x.dtype).eps
        low = clipped(state.low / state.high, eps, 1)
        a, b, c = _halley_weights(low)
        f = linalg.factor(x)
        image = self.problem.target() @ f.z
        form = f.z.T @ image
        gram = f.dual_of(f.dual_of((form + form.T) / 2).T)  # C, eigenvalues 1/s² ≥ 1
        # C carries an error of eps/low², which c, about low^(-4/3), exceeds.
        t = inverse_cholesky((gram + gram.T) / 2 + c * jnp.eye(len(gram), dtype=x.dtype))
        new = (b / c) * x + (a - b / c) * (f.dual_of(image) @ (t @ t.T))
        bound = low * (a + b * low**2) / (1 + c * low**2)
        return state._replace(factors=new, low=clipped(bound, 0, 1), high=jnp.ones_like(state.high))


def _halley_weights(low: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """a, b, c for which s(a + bs²)/(1 + cs²) maps [low, 1] nearest to 1."""
    d = jnp.cbrt(4 * (1 - low**2) / low**4)
    root = jnp.sqrt(1 + d)
    a = root + jnp.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * root)) / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def _require_symmetric(problem: object) -> None:
    if not isinstance(problem, Symmetric):
        raise ValueError(
            f"problem is a {type(problem).__name__}; expected problems.Symmetric(A) "
            "(problem (4) is solved by one step of scaled_step with η = 1)"
        )


def scaled_newton_step(problem: Symmetric, scaling: Scaling = "byers_xu") -> ScaledNewtonStep:
    """Return scaled Newton: X⁺ = (μX + μ⁻¹A X(XᵀX)⁻¹)/2, (2) at η = 1/2 for μ = 1. r ≥ r_A.

    The weight μ follows bounds on σ(S) (see this module), from the start's r × r compression:

    - "byers_xu": μ = (low·high)^{-1/2} with bounds that the start gives and a scalar recursion
      carries on, low⁺ = 1, high⁺ = (μ·high + 1/(μ·high))/2. At most 9 steps for κ(S) ≤ 1e16.
    - "optimal": low and high are measured by an r × r eigenproblem in each step.
    - "frobenius": μ = (‖S⁻¹‖_F/‖S‖_F)^{1/2}, measured too.

    Rounding is that of `scaled_step`, in float32 as well: the final error does not depend on κ. A
    measured weight carries the rounding of A's least eigenvalue, eps·κ(A); from about
    κ(A) = 1e-4/eps on that may cost "optimal" and "frobenius" a few steps, and "byers_xu" none.

    Over-parametrized starts are cut once, as in `scaled_step`. Under-parametrized, S belongs to the
    compression of A to range(X), and after the first steps this is (2) at η = 1/2: it converges to
    the global optimum at the rate `dynamics.subspace_rate(spectrum, r, 1/2)`. The part of a start
    outside range(A) is halved in each step, as there.

    Args:
        problem: `problems.Symmetric`.
        scaling: how μ is chosen.

    Raises:
        ValueError: on another problem or scaling; by `init`, on a factor that does not fit.

    References:
        Higham 1986; Byers and Xu 2008 (in full at the head of this module).

    Examples:
        >>> import jax, nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(0), 30, [1.0, 0.1, 0.01])
        >>> problem = nys.problems.Symmetric(a)
        >>> start = nys.initializers.nystrom(jax.random.key(1), a, rank=3, scale=100.0)
        >>> measure = problem.residual
        >>> int(nys.solvers.run_until(scaled_newton_step(problem), start, measure, 1e-5).num_steps)
        4
        >>> unscaled = nys.solvers.scaled_step(problem)
        >>> int(nys.solvers.run_until(unscaled, start, measure, 1e-5).num_steps)
        10
    """
    _require_symmetric(problem)
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling is {scaling!r}; expected one of {', '.join(get_args(Scaling))}")
    return ScaledNewtonStep(problem, scaling)


def qdwh_step(problem: Symmetric) -> QDWHStep:
    """Return QDWH: X⁺ = (b/c)X + (a − b/c) A X(XᵀX)⁻¹(C + cI)⁻¹, C = dual(X)ᵀ A dual(X). r ≥ r_A.

    On range(A), where A dual(X) = XC, this is the step X(aC + bI)(C + cI)⁻¹ of Halley's iteration
    S⁺ = S(aI + bSᵀS)(I + cSᵀS)⁻¹. The weights a, b, c are the best for σ(S) in [ℓ, 1], and
    ℓ⁺ = ℓ(a + bℓ²)/(1 + cℓ²): at most 6 steps for κ(S) ≤ 1e16, the last ones cubic. The start gives
    ℓ, rounded down where rounding hides it; a smaller ℓ only costs a step.

    Written only with X, the step never leaves range(X_0) and multiplies what rounding left outside
    range(A) by up to 1/ℓ. Here A dual(X) replaces it: the final error is that of `scaled_step`, for
    each κ, and what a start has outside range(A) shrinks by b/c in each step, in the end 1/3.

    Over-parametrized starts are cut once, as in `scaled_step`. Under-parametrized, S belongs to the
    compression of A to range(X), and the step ends as a subspace iteration with η = 2/3: it goes on
    to the global optimum at the rate `dynamics.subspace_rate(spectrum, r, 2/3)`, faster than (2) at
    η = 1/2.

    Args:
        problem: `problems.Symmetric`.

    Raises:
        ValueError: on another problem; by `init`, on a factor that does not fit.

    References:
        Nakatsukasa, Bai and Gygi 2010 (in full at the head of this module).

    Examples:
        >>> import jax, nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(0), 30, [1.0, 0.1, 0.01])
        >>> problem = nys.problems.Symmetric(a)
        >>> start = nys.initializers.nystrom(jax.random.key(1), a, rank=3, scale=100.0)
        >>> int(nys.solvers.run_until(qdwh_step(problem), start, problem.residual, 1e-5).num_steps)
        3
    """
    _require_symmetric(problem)
    return QDWHStep(problem)
