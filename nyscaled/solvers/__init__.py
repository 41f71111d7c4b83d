"""Steps, the paper's iterations as triples of pure functions, and the two loops that run them.

A step has `init(factors) -> state`, `update(state) -> state` and `params(state) -> factors`. It is
a pytree: the matrix and the step size are arguments of the compiled loop, so equal shapes never
compile twice, and steps can be built inside `jit` and `vmap`.
"""

from nyscaled.solvers.loops import Solution as Solution
from nyscaled.solvers.loops import Status as Status
from nyscaled.solvers.loops import Step as Step
from nyscaled.solvers.loops import run as run
from nyscaled.solvers.loops import run_until as run_until
from nyscaled.solvers.modified import ModifiedState as ModifiedState
from nyscaled.solvers.modified import ModifiedStep as ModifiedStep
from nyscaled.solvers.modified import modified_step as modified_step
from nyscaled.solvers.modified import unbalance as unbalance
from nyscaled.solvers.polar import PolarState as PolarState
from nyscaled.solvers.polar import QDWHStep as QDWHStep
from nyscaled.solvers.polar import ScaledNewtonStep as ScaledNewtonStep
from nyscaled.solvers.polar import qdwh_step as qdwh_step
from nyscaled.solvers.polar import scaled_newton_step as scaled_newton_step
from nyscaled.solvers.steps import GradientState as GradientState
from nyscaled.solvers.steps import GradientStep as GradientStep
from nyscaled.solvers.steps import ScaledState as ScaledState
from nyscaled.solvers.steps import ScaledStep as ScaledStep
from nyscaled.solvers.steps import alternating_step as alternating_step
from nyscaled.solvers.steps import gradient_step as gradient_step
from nyscaled.solvers.steps import scaled_step as scaled_step
from nyscaled.solvers.steps import staircase as staircase
