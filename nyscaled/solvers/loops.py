"""The two loops of the project: `run` scans and records, `run_until` stops at a tolerance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from nyscaled import validation
from nyscaled._pytree import as_partial
from nyscaled.matrices import as_array
from nyscaled.solvers.status import Status
from nyscaled.typing import Params, Step


class Solution(NamedTuple):
    """What a loop returns.

    Attributes:
        params: the final factors.
        history: the outputs of `record`, stacked, with `num_steps + 1` rows from the start on. None
            without `record` and from `run_until`.
        status: a `Status`, or its integer under jit and vmap.
        num_steps: the number of steps that were made.
        value: the last value of `measure`. None from `run`.
    """

    params: Params
    history: Any
    status: Any
    num_steps: Any
    value: Any = None


def _all(test: Callable[[Any], Array], tree: Any) -> Array:
    return jnp.all(jnp.array([jnp.all(test(leaf)) for leaf in jax.tree.leaves(tree)]))


def _status(step: Step, state: Any, value: Any) -> Array:
    """A `Status` as an int32 array: what the step reports, and NON_FINITE."""
    status = jnp.asarray(step.status(state), jnp.int32)
    finite = _all(jnp.isfinite, step.params(state)) & _all(lambda x: ~jnp.isnan(x), value)
    # An indefinite A is the cause of NaN in the factors, and NaN never of an indefinite A.
    return jnp.where(finite | (status == Status.INDEFINITE), status, Status.NON_FINITE)


@functools.partial(jax.jit, static_argnums=2)
def _scan(step: Step, params: Params, num_steps: int, record: Any) -> Solution:
    def body(state: Any, _: None) -> tuple[Any, Any]:
        return step.update(state), record(step.params(state))

    state, history = lax.scan(body, step.init(params), length=num_steps)
    final = step.params(state)
    last = record(final)
    history = jax.tree.map(lambda h, x: jnp.concatenate([h, jnp.asarray(x)[None]]), history, last)
    return Solution(final, history, _status(step, state, None), jnp.int32(num_steps))


@jax.jit
def _while(step: Step, params: Params, measure: Any, tol: Any, max_steps: Any) -> Solution:
    def evaluate(state: Any, count: Any) -> tuple[Any, Any, Any, Any]:
        value = _require_real("the measure", measure(step.params(state)))
        status = _status(step, state, value)
        reached = (status == Status.MAX_STEPS) & (value <= tol)
        return state, count, value, jnp.where(reached, jnp.int32(Status.CONVERGED), status)

    def unfinished(carry: Any) -> Array:
        _, count, _, status = carry
        return (status == Status.MAX_STEPS) & (count < max_steps)

    def body(carry: Any) -> Any:
        return evaluate(step.update(carry[0]), carry[1] + 1)

    state, count, value, status = lax.while_loop(
        unfinished, body, evaluate(step.init(params), jnp.int32(0))
    )
    return Solution(step.params(state), None, status, count, value)


# `lax.while_loop` has no reverse mode. This error names the function that the user called.
_forward_only = jax.extend.core.Primitive("forward_only")
_forward_only.def_impl(lambda x: x)
_forward_only.def_abstract_eval(lambda x: x)
mlir.register_lowering(_forward_only, lambda ctx, x: [x])
batching.primitive_batchers[_forward_only] = lambda x, axes: (_forward_only.bind(*x), axes[0])


def _refuse_transpose(*args: Any) -> Any:
    raise ValueError(
        "run_until has no reverse-mode derivative: its number of steps is not known beforehand "
        "(use solvers.run with num_steps, or forward mode: jax.jvp, jax.jacfwd)"
    )


ad.deflinear2(_forward_only, _refuse_transpose)


def _no_record(params: Params) -> None:
    return None


def _require_real(name: str, value: Any) -> Array:
    """`value` as an array; ValueError unless it is one real number, and not a truth value."""
    value = as_array(name, value, "expected a real number")
    if value.ndim or value.dtype == bool or jnp.issubdtype(value.dtype, jnp.complexfloating):
        got = f"{value.dtype} of shape {value.shape}"
        raise ValueError(f"{name} is {got}; expected a real number, compared as measure <= tol")
    return value


def _require_run(step: Any, params: Any, **functions: Any) -> None:
    """ValueError unless a step, a start and functions are given in their places."""
    methods = ("init", "update", "params", "status")
    missing = [name for name in methods if not callable(getattr(step, name, None))]
    if missing:
        raise ValueError(
            f"step is a {type(step).__name__}, which has no {', no '.join(missing)}; expected one "
            "of nyscaled.solvers, such as scaled_step(problem), or the methods of nyscaled.typing."
            "Step"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(step):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)):
            raise ValueError(
                f"step{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; expected a pytree "
                "of arrays (jax.tree_util.register_dataclass makes one of a dataclass)"
            )
    if not jax.tree.leaves(params):
        raise ValueError(f"the start is a {type(params).__name__}; expected an array or Factors")
    for name, fn in functions.items():
        if not callable(fn):
            raise ValueError(f"{name} is a {type(fn).__name__}; expected a function of the factors")


def _check_start(params: Params) -> Params:
    params = jax.tree.map(lambda leaf: as_array("the start", leaf), params)
    validation.require_finite("the start", params)
    leaves = jax.tree.leaves(params)
    empty = any(jnp.size(x) == 0 for x in leaves)  # the step itself names what it expects
    known = validation.is_concrete(params) and not empty
    if known and not any(bool(jnp.any(x)) for x in leaves):
        raise ValueError(
            "the start is zero in all factors, a saddle point; expected a non-zero one"
        )
    return params


def _finish(solution: Solution, throw: bool) -> Solution:
    if not validation.is_concrete(solution.status) or jnp.ndim(solution.status):
        return solution
    status = Status(int(solution.status))
    if throw and status not in (Status.CONVERGED, Status.MAX_STEPS):
        raise ValueError(
            f"the run ended {status.name} by step {int(solution.num_steps)}: {status.message} "
            "(throw=False returns the solution with its status and history)"
        )
    return solution._replace(status=status)


def run(
    step: Step,
    params: Params,
    num_steps: SupportsIndex,
    record: Callable[[Params], Any] | None = None,
    *,
    throw: bool = True,
) -> Solution:
    """Make `num_steps` steps in one compiled scan.

    Args:
        step: a step, from `scaled_step`, `gradient_step`, ….
        params: the start: X for a symmetric problem, `Factors` for an asymmetric one.
        num_steps: ≥ 0.
        record: a pure function of the factors, evaluated at the start and after every step. Arrays
            that it needs are best bound with `jax.tree_util.Partial(fn, array)`; methods of
            problems (`problem.loss`) may be passed as they are.
        throw: raise if the run fails; otherwise read `status`. Under jit and vmap nothing is
            raised, and `status` is an array.

    Returns:
        A `Solution`; `history` has num_steps + 1 rows. Derivatives in both modes are those of the
        iteration; of an over-parametrized start, those along starts of the same rank. Second
        derivatives are too, except those of the polar steps, whose weights have only first ones.

    Raises:
        ValueError: on a start that does not fit, is not finite or is zero, and on failed runs.

    Examples:
        >>> import nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(0), 30, [1.0, 0.5])
        >>> problem = nys.problems.Symmetric(a)
        >>> x0 = nys.initializers.nystrom(jax.random.key(1), a, rank=2)
        >>> step = nys.solvers.scaled_step(problem, learning_rate=0.5)
        >>> solution = run(step, x0, num_steps=12, record=problem.residual)
        >>> solution.history.shape, bool(solution.history[-1] < 1e-5)
        ((13,), True)
    """
    count = validation.require_count("num_steps", num_steps)
    recorder = _no_record if record is None else record
    _require_run(step, params, record=recorder)
    params = _check_start(params)
    recorder = as_partial(recorder)
    return _finish(_scan(step, params, count, recorder), throw)


def run_until(
    step: Step,
    params: Params,
    measure: Callable[[Params], Any],
    tol: Any,
    max_steps: SupportsIndex = 1000,
    *,
    throw: bool = True,
) -> Solution:
    """Step until `measure(factors) <= tol`, at most `max_steps` times, in one compiled loop.

    Args:
        step: as in `run`.
        params: as in `run`.
        measure: a pure function of the factors to a scalar; bind arrays as in `run`.
        tol: the tolerance, in units of `measure`.
        max_steps: ≥ 0.
        throw: as in `run`. Reaching `max_steps` does not raise: read `status`.

    Returns:
        A `Solution`, whose `value` is the last value of `measure`.

    Raises:
        ValueError: as `run`; and in reverse-mode differentiation, which the loop does not have
            (forward mode it has).

    Examples:
        >>> import nyscaled as nys
        >>> a, _ = nys.spectra.psd(jax.random.key(0), 30, [1.0, 0.5, 0.1])
        >>> problem = nys.problems.Symmetric(a)
        >>> start = nys.initializers.nystrom(jax.random.key(1), a, rank=3)
        >>> step = nys.solvers.scaled_step(problem)
        >>> solution = run_until(step, start, problem.residual, tol=1e-5)
        >>> solution.status.name
        'CONVERGED'
    """
    count = validation.require_count("max_steps", max_steps)
    _require_run(step, params, measure=measure)
    tol = _require_real("tol", tol)
    validation.require_nonnegative("tol", tol)
    params = _check_start(params)
    solution = _while(step, params, as_partial(measure), tol, count)
    differentiable = jax.tree.map(_forward_only.bind, (solution.params, solution.value))
    solution = solution._replace(params=differentiable[0], value=differentiable[1])
    return _finish(solution, throw)
