"""The U-Net of terrain computes what onnxruntime computes with the published file."""

import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from experiments.lib.terrain_unet import denoise, load

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "tests" / "fixtures"))
import make_terrain  # noqa: E402

WEIGHTS = ROOT / "build" / "weights" / "terrain" / "unet.safetensors"

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="no build/weights: make weights")


def test_denoised_images_are_those_of_onnxruntime():
    images = make_terrain.noisy()[..., None]
    sigma, difficulty = make_terrain.SIGMA, make_terrain.DIFFICULTY
    actual = nnx.jit(denoise)(load(WEIGHTS), images, sigma, difficulty)[..., 0]
    with np.load(make_terrain.FILE) as file:
        expected = file["denoised"]  # clipped at the end, which `denoise` leaves out
    every = make_terrain.EVERY
    clipped = np.clip(actual[:, ::every, ::every], -1, 1)
    assert np.mean(np.abs(expected) < 1) > 0.5
    assert np.abs(clipped - expected).max() <= 1e-4 * np.abs(expected).max()
