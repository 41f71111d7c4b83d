"""The modified gradient descent of Xiong, Ding and Du, which unbalances the factors once.

With more columns than the rank, plain gradient descent on ½‖XYᵀ − A‖² from a small start of scale
α gains only a factor of about 1 − ηα² per step: XᵀX − YᵀY is nearly conserved, and is of size α² in
the columns beyond the rank. Once XYᵀ is near A, one exact refactoring of the same product makes all
singular values of X equal to β. The rate then depends on β, and not on α.

References:
    Xiong, Ding, Du, How over-parameterization slows down gradient descent in matrix sensing: the
    curses of symmetry and initialization, ICLR 2024 (Section 5).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from nyscaled import validation
from nyscaled._pytree import pytree_dataclass
from nyscaled.lapack import svd
from nyscaled.numerics import full_precision
from nyscaled.solvers.steps import GradientState, GradientStep, gradient_step, require_pairs
from nyscaled.typing import Factors, Number, Params, Problem


@full_precision
def unbalance(factors: Factors, beta: Number) -> Factors:
    """Return (βP, YQΣ/β) with the thin SVD X = PΣQᵀ: the same product, and XᵀX = β²I.

    Args:
        factors: X (m, r) and Y (n, r), m ≥ r.
        beta: β > 0. With β² of the order of σ_r(A), the least singular value to be found, the
            count is O(κ² log 1/ε). Near A, descent then requires η below 2/(β² + ‖A‖²/β²).

    Raises:
        ValueError: on β ≤ 0.

    Examples:
        >>> factors = Factors(jnp.array([[3.0], [4.0]]), jnp.array([[1.0], [2.0]]))
        >>> x, y = unbalance(factors, 0.5)
        >>> bool(jnp.allclose(x @ y.T, factors.left @ factors.right.T, atol=1e-5))
        True
        >>> round(float(jnp.linalg.norm(x)), 4)
        0.5
    """
    validation.require_positive("beta", beta)
    p, sigma, qt = svd(factors.left)
    beta = jnp.asarray(beta, factors.left.dtype)
    return Factors(beta * p, (factors.right @ qt.T) * (sigma / beta))


class ModifiedState(NamedTuple):
    """State of `ModifiedStep`: steps made, and the state of the descent."""

    step: Int[Array, ""]
    inner: GradientState


@pytree_dataclass
class ModifiedStep:
    """Gradient descent that is refactored once; see `modified_step`."""

    descent: GradientStep
    at: Any
    beta: Any

    def init(self, params: Params) -> ModifiedState:
        """Return the state at the start; ValueError unless `params` are Factors."""
        return ModifiedState(jnp.zeros((), jnp.int32), self.descent.init(params))

    @functools.partial(jax.jit, inline=True)
    def update(self, state: ModifiedState) -> ModifiedState:
        """Return the state after one step of descent, refactored before step number `at`."""

        def modify(inner: GradientState) -> GradientState:
            # The memory of the transformation, if any, belongs to the former factors.
            return self.descent.init(unbalance(inner.factors, self.beta))

        inner = lax.cond(state.step == self.at, modify, lambda inner: inner, state.inner)
        return ModifiedState(state.step + 1, self.descent.update(inner))

    def params(self, state: ModifiedState) -> Params:
        """Return the factors."""
        return state.inner.factors

    def status(self, state: ModifiedState) -> Array:
        """Return the status of the descent."""
        return self.descent.status(state.inner)


def modified_step(
    problem: Problem, tx: optax.GradientTransformation, at: int | Array, beta: Number
) -> ModifiedStep:
    """Return modified GD: `gradient_step(problem, tx)` with one refactoring by `unbalance`.

    The start is small and unequal: entries of X_0 of scale α, those of Y_0 of α/3, also where A is
    symmetric. The factors do not show whether XYᵀ is near enough to A; the reference assumes
    ‖XYᵀ − A‖ below a fraction of σ_r(A), which takes about log(1/α)/(ησ_r(A)) steps. Under `vmap`
    both sides of the condition are computed, an SVD per step: batches are cheaper in two runs with
    `unbalance` between them.

    Args:
        problem: a problem of `Factors`.
        tx: `optax.sgd`, whose learning rate must suit the factors before and after.
        at: number of steps before the refactoring, ≥ 0; a negative one means never.
        beta: see `unbalance`.

    Raises:
        ValueError: on a problem without pairs of factors, and on β ≤ 0.

    Examples:
        >>> import jax, nyscaled as nys
        >>> a = nys.spectra.rectangular(jax.random.key(0), 12, 10, [1.0, 0.5])[0]
        >>> problem = nys.problems.Asymmetric(a)
        >>> x, y = nys.initializers.small_factors(jax.random.key(1), a.shape, rank=4)
        >>> step = modified_step(problem, optax.sgd(0.3), at=60, beta=0.7)
        >>> solution = nys.solvers.run(step, Factors(x, y / 3), 200, record=problem.residual)
        >>> bool(solution.history[-1] < 1e-5)
        True
    """
    require_pairs(problem)
    validation.require_positive("beta", beta)
    return ModifiedStep(gradient_step(problem, tx), at, beta)
