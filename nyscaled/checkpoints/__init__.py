"""File formats of model and adapter weights: names and tensors, without models."""
