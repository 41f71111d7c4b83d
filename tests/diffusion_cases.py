"""Tiny pipelines, whose outputs diffusers computed (fixtures/make_diffusion.py)."""

from pathlib import Path

import numpy as np
import safetensors.numpy

FOLDER = Path(__file__).parent / "fixtures" / "diffusion"


def expected(*parts):
    """What diffusers computed with a model."""
    return safetensors.numpy.load_file(FOLDER.joinpath(*parts) / "expected.safetensors")


def close(actual, expected, tolerance=1e-4):
    """Asserts equality up to a fraction of the largest entry."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()
