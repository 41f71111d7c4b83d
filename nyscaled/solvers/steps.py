"""The steps: ScaledGD fused with its matrix, and any optax transformation of a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from nyscaled import linalg, validation
from nyscaled._pytree import as_partial, field, pytree_dataclass
from nyscaled.matrices import transpose_times
from nyscaled.numerics import full_precision, tree_norm
from nyscaled.problems import Asymmetric, Symmetric
from nyscaled.solvers.rank import cut_rank
from nyscaled.solvers.status import Status
from nyscaled.transforms.gram import require_step_size
from nyscaled.typing import Factors, LinearMap, Number, Objective, Params, Problem


class ScaledState(NamedTuple):
    """State of `ScaledStep`: factors in rotated coordinates, X = factors · rotationᵀ."""

    step: Int[Array, ""]
    factors: Params
    rotation: Float[Array, "r r"]
    indefinite: Bool[Array, ""]


@pytree_dataclass
class ScaledStep:
    """The fused ScaledGD step; see `scaled_step`. A damping of None is 0, and compiled as that."""

    problem: Any
    learning_rate: Any
    damping: Any = None

    def init(self, params: Params) -> ScaledState:
        """Return the start, its numerical rank cut if there is no damping (`rank.cut_rank`)."""
        undamped = True if self.damping is None else jnp.asarray(self.damping) == 0
        cut = cut_rank(self.problem, params, undamped)
        return ScaledState(jnp.zeros((), jnp.int32), cut.factors, cut.rotation, cut.indefinite)

    @functools.partial(jax.jit, inline=True)
    @full_precision
    def update(self, state: ScaledState) -> ScaledState:
        """Return the state after one step; A is used only in A @ thin (and Aᵀ @ thin)."""
        eta = self.learning_rate
        eta = eta(state.step) if callable(eta) else eta
        eta = jnp.asarray(eta, self.problem.dtype)
        advance: Any = _symmetric if self.problem.symmetric else _asymmetric
        damping = 0.0 if self.damping is None else jnp.asarray(self.damping, eta.dtype)
        factors = advance(self.problem.target(), state.factors, eta, damping)
        return state._replace(step=state.step + 1, factors=factors)

    @full_precision
    def params(self, state: ScaledState) -> Params:
        """Return the factors in the caller's coordinates."""
        return jax.tree.map(lambda f: f @ state.rotation.T, state.factors)

    def status(self, state: ScaledState) -> Array:
        """Return INDEFINITE if a symmetric A is not PSD on the range of the start."""
        return jnp.where(state.indefinite, Status.INDEFINITE, Status.MAX_STEPS)


def _symmetric(a: LinearMap, x: Array, eta: Array, damping: Number) -> Array:
    """X⁺ = X + η((A + λI) X(XᵀX + λI)⁻¹ − X), which is X − η(XXᵀ − A)X(XᵀX + λI)⁻¹."""
    f = linalg.factor(x, damping)
    return (1 - eta) * x + eta * f.dual_of(a @ f.z + damping * f.z)


def _asymmetric(a: LinearMap, factors: Factors, eta: Array, damping: Number) -> Factors:
    """X⁺ = X + η(A dual(Y) − X P_Y), Y⁺ = Y + η(Aᵀ dual(X) − Y P_X), P_Y = Yᵀ dual(Y)."""
    x, y = factors
    fx, fy = linalg.factor(x, damping), linalg.factor(y, damping)

    new_x = x + eta * (fy.dual_of(a @ fy.z) - x @ fy.kept(damping))
    new_y = y + eta * (fx.dual_of(transpose_times(a, fx.z)) - y @ fx.kept(damping))
    return Factors(new_x, new_y)


def scaled_step(
    problem: Symmetric | Asymmetric,
    learning_rate: optax.ScalarOrSchedule = 0.5,
    damping: Number = 0.0,
) -> ScaledStep:
    """Return fused ScaledGD: (2) and (26) for a symmetric problem, (6) and (35) otherwise.

    The update is (1−η)X + ηA X(XᵀX)†, with the dual taken from an orthonormal factor: float32 does
    not lose accuracy with κ, and over a product with A it costs O(m r²). The numerical rank is
    decided once, by `init`: exactly and under-parametrized starts keep all columns; the zero
    directions of an over-parametrized Nyström start are cut. A start that has less rank than
    columns for another reason, because a column stands twice, say, does not follow (26): for it use
    `gradient_step` with `scaled_gd(η, pseudo_inverse=True)`. At Y_0 = 0 the left factor does not
    change, X_1 = X_0, as in (6a).

    Args:
        problem: `problems.Symmetric` or `problems.Asymmetric`.
        learning_rate: η in (0, 1], or a schedule of the step count, whose values are not checked,
            as those of traced numbers are not. On (1) 0.5 is quadratic; on
            (4) 1 is exact in one step (Theorems 3, 6).
        damping: λ ≥ 0 of ScaledGD(λ), in units of XᵀX; the rank is not cut where it is positive.

    Raises:
        ValueError: on another problem, η outside (0, 1] or a negative damping; by `init`, on
            factors whose shape or dtype does not fit the problem.

    Examples:
        >>> import nyscaled as nys
        >>> a, left, right = nys.spectra.rectangular(jax.random.key(0), 40, 30, [3.0, 2.0, 1.0])
        >>> step = scaled_step(nys.problems.Asymmetric(a), learning_rate=1.0)
        >>> start = nys.initializers.nystrom_factors(jax.random.key(1), a, rank=3)
        >>> x, y = nys.solvers.run(step, start, num_steps=1).params
        >>> bool(jnp.allclose(x @ y.T, a, atol=1e-5))
        True
    """
    require_step_size(learning_rate)
    validation.require_nonnegative("damping", damping)
    if callable(learning_rate):
        learning_rate = as_partial(learning_rate)
    if not isinstance(problem, Symmetric | Asymmetric):
        raise ValueError(
            f"problem is a {type(problem).__name__}; expected problems.Symmetric(A) or "
            "problems.Asymmetric(A)"
        )
    known_zero = isinstance(damping, int | float) and damping == 0
    return ScaledStep(problem, learning_rate, None if known_zero else damping)


class GradientState(NamedTuple):
    """State of `GradientStep`.

    Attributes:
        factors: the current factors.
        opt_state: the state of the transformation.
        step: how many steps were made.
        limit: the norm of the factors beyond which the run has diverged: 1/eps times the largest
            of the start's, the first iterate's and that of factors of A (none if the problem has no
            `factor_size`).
    """

    factors: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    limit: Float[Array, ""]


@pytree_dataclass
class GradientStep:
    """A step by the problem's gradient; see `gradient_step`."""

    problem: Any
    tx: Any = field(static=True)
    project: Any = None
    alternating: bool = field(static=True, default=False)

    def init(self, params: Params) -> GradientState:
        """Return the start and the transformation's state."""
        params = self.problem.check(params)
        if self.alternating and not isinstance(params, Factors):
            got = type(params).__name__
            raise ValueError(f"the start is a {got}; expected Factors, to alternate between them")
        limit = _limit(params)
        # From a small start factors may grow by any factor to where a solution is.
        size = getattr(self.problem, "factor_size", lambda: jnp.inf)()
        limit = jnp.maximum(limit, jnp.asarray(size, limit.dtype) / jnp.finfo(limit.dtype).eps)
        return GradientState(params, self.tx.init(params), jnp.zeros((), jnp.int32), limit)

    @functools.partial(jax.jit, inline=True)
    def update(self, state: GradientState) -> GradientState:
        """Return the state after one step, or after one sweep over both factors if alternating."""
        params, opt_state, step, limit = state
        if self.alternating:
            left, opt_state = self._descend(params, opt_state)
            half = Factors(left.left, params.right)
            right, opt_state = self._descend(half, opt_state)
            params = Factors(half.left, right.right)
        else:
            params, opt_state = self._descend(params, opt_state)
        if self.project is not None:
            params = self.project(params)
        # No step is known to be too long before the second: a first one from a small start is long.
        limit = jnp.where(step == 0, jnp.maximum(limit, _limit(params)), limit)
        return GradientState(params, opt_state, step + 1, limit)

    def _descend(self, params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
        """The transformation's step from the gradient at `params`."""
        # Under jit the losses cost nothing where the transformation does not read them.
        known = {"value": self.problem.loss(params)}
        if hasattr(self.problem, "root_loss"):
            known["root_value"] = self.problem.root_loss(params)
        gradient = self.problem.gradient(params)
        tx = optax.with_extra_args_support(self.tx)
        # Line searches call the loss, and refuse an argument that neither it nor they take.
        updates, opt_state = tx.update(
            gradient,
            opt_state,
            params,
            grad=gradient,
            value_fn=lambda params, root_value=None: self.problem.loss(params),
            **known,
        )
        return optax.apply_updates(params, updates), opt_state

    def params(self, state: GradientState) -> Params:
        """Return the factors."""
        return state.factors

    def status(self, state: GradientState) -> Array:
        """Return DIVERGED if the norm of the factors is beyond the state's limit."""
        grown = tree_norm(state.factors) > state.limit
        return jnp.where(grown, Status.DIVERGED, Status.MAX_STEPS)


def _limit(params: Params) -> Array:
    """1/eps times the norm of the factors: what is as large does not see a matrix of size 1."""
    size = tree_norm(params)
    return size / jnp.finfo(size.dtype).eps


def gradient_step(
    problem: Objective,
    tx: optax.GradientTransformation,
    project: Callable[[Params], Params] | None = None,
) -> GradientStep:
    """Return X⁺ = X + tx(∇f(X)) for an optax transformation: `optax.sgd` is GD.

    Args:
        problem: one of `nyscaled.problems`, or anything that has the methods of
            `nyscaled.typing.Objective`.
        tx: its `update` is also given `value=`, `grad=` and `value_fn=`, as `optax.lbfgs` and other
            line searches take them, and if the problem has `root_loss`, which neither overflows
            nor underflows, `root_value=`, its root.
        project: a pure function of the factors, applied after each step. For completion,
            `Partial(nys.problems.completion.project_incoherent, bound=…)` with jax's Partial.

    Raises:
        ValueError: on a problem without these methods, and on a `tx` that is not a transformation.

    Examples:
        >>> import nyscaled as nys
        >>> problem = nys.problems.Symmetric(jnp.eye(3))
        >>> step = gradient_step(problem, optax.sgd(0.1))
        >>> solution = nys.solvers.run(step, jnp.ones((3, 1)), 100, record=problem.loss)
        >>> solution.history.shape
        (101,)
    """
    if not isinstance(problem, Objective):
        raise ValueError(
            f"problem is a {type(problem).__name__}; expected one of nyscaled.problems, or a "
            "pytree with the methods loss, gradient and check"
        )
    validation.require_transformation("tx", tx)
    return GradientStep(problem, tx, None if project is None else as_partial(project))


def alternating_step(problem: Problem, tx: optax.GradientTransformation) -> GradientStep:
    """Return X⁺ = X + tx(∇_X f(X, Y)), then Y⁺ = Y + tx(∇_Y f(X⁺, Y)): AltGD with `optax.sgd`.

    Args:
        problem: a problem of `Factors`.
        tx: a transformation without memory (`optax.sgd` without momentum, `scaled_gd`). It is
            called twice per step, and each time the update of one factor is used.

    Raises:
        ValueError: on a problem whose points must be X; on a `tx` that is not a transformation.

    Examples:
        >>> import nyscaled as nys
        >>> problem = nys.problems.Asymmetric(jnp.ones((3, 2)))
        >>> step = alternating_step(problem, optax.sgd(0.1))
        >>> start = Factors(jnp.ones((3, 1)), jnp.zeros((2, 1)))
        >>> nys.solvers.run(step, start, 100).params.right.shape
        (2, 1)
    """
    require_pairs(problem)
    validation.require_transformation("tx", tx)
    return GradientStep(problem, tx, alternating=True)


def require_pairs(problem: object) -> None:
    """Raise ValueError unless `problem` is a problem of `Factors`."""
    if not isinstance(problem, Problem) or problem.symmetric:
        raise ValueError(
            f"problem is a {type(problem).__name__}; expected one of Factors, such as "
            "problems.Asymmetric(A)"
        )
