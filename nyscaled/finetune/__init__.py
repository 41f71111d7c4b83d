"""Fine-tuning: data and templates, scorers, the training loop and evaluation."""

from nyscaled.finetune.examples import Encoded, Example

__all__ = [
    "Encoded",
    "Example",
]
