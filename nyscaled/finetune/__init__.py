"""Fine-tuning: data and templates, scorers, the training loop and evaluation."""

from nyscaled.finetune.examples import Encoded, Example
from nyscaled.finetune.methods import METHODS, Method, method

__all__ = [
    "METHODS",
    "Encoded",
    "Example",
    "Method",
    "method",
]
