"""How a run ended, and in which words that is said."""

from __future__ import annotations

from nyscaled._outcome import Outcome


class Status(Outcome):
    """How a run ended; an int32 array under jit and vmap.

    Examples:
        >>> Status.CONVERGED.message
        'the measure fell to the tolerance'
    """

    CONVERGED = 0, "the measure fell to the tolerance"
    MAX_STEPS = 1, "all steps were made"
    NON_FINITE = (
        2,
        "a factor has NaN or Inf entries, or the measure is NaN; the learning rate is too large, a "
        "factor lost its rank, or a product left the range of the dtype",
    )
    DIVERGED = (
        3,
        "the factors grew to 1/eps times the size of the start and of A; the learning rate is too "
        "large, or a preconditioner without damping met factors that lost their rank",
    )
    INDEFINITE = (
        4,
        "A is not positive semidefinite on the range of the start (problems.Asymmetric takes any "
        "matrix)",
    )
