"""What a claim is made of: a measurement with its bound, a control, and their registration."""

from paper_checks.framework.claim import Claim, Limit, Measured, Outcome, worst
from paper_checks.framework.registry import claim

__all__ = ["Claim", "Limit", "Measured", "Outcome", "claim", "worst"]
