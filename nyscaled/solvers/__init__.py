"""Steps, the paper's iterations as triples of pure functions, and the two loops that run them.

A step has `init(factors) -> state`, `update(state) -> state`, `params(state) -> factors` and
`status(state)`, which reports a failure. It is a pytree: the matrix and the step size are arguments
of the compiled loop, so equal shapes do not compile twice, and steps can be built inside `jit` and
`vmap`. A function is a part of the program, so make each schedule, optax transformation, record
and measure once: a second one of the same kind compiles again. `update` is compiled in the same way
when it is called by itself.
"""

from nyscaled.solvers.loops import Solution, run, run_until
from nyscaled.solvers.modified import ModifiedState, ModifiedStep, modified_step, unbalance
from nyscaled.solvers.polar import (
    PolarState,
    QDWHStep,
    ScaledNewtonStep,
    qdwh_step,
    scaled_newton_step,
)
from nyscaled.solvers.rates import altgd_learning_rate, nesterov_parameters, staircase
from nyscaled.solvers.status import Status
from nyscaled.solvers.steps import (
    GradientState,
    GradientStep,
    ScaledState,
    ScaledStep,
    alternating_step,
    gradient_step,
    scaled_step,
)
from nyscaled.typing import Step

__all__ = [
    "GradientState",
    "GradientStep",
    "ModifiedState",
    "ModifiedStep",
    "PolarState",
    "QDWHStep",
    "ScaledNewtonStep",
    "ScaledState",
    "ScaledStep",
    "Solution",
    "Status",
    "Step",
    "alternating_step",
    "altgd_learning_rate",
    "gradient_step",
    "modified_step",
    "nesterov_parameters",
    "qdwh_step",
    "run",
    "run_until",
    "scaled_newton_step",
    "scaled_step",
    "staircase",
    "unbalance",
]
