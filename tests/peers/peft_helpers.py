"""What the tests against PEFT share."""

import warnings

import torch

TENSORS = "adapter_model.safetensors"


def strictly(fn, *args, **kwargs):
    """PEFT only warns of tensors without a module and modules without tensors: here an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return fn(*args, **kwargs)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.15 * torch.randn(value.shape, generator=generator)
