"""Models where JAX's default is float64: theirs stays float32 unless asked."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import nyscaled as nys

MODELS = Path(__file__).parents[1] / "fixtures" / "models"


@pytest.mark.parametrize(("name", "dtype"), [("llama", jnp.float32), ("opt", jnp.float64)])
def test_logits_and_generation(name, dtype):
    saved = safetensors.numpy.load_file(MODELS / name / "expected.safetensors")
    model, _ = nys.models.load(MODELS / name, dtype=dtype)
    logits = jax.jit(model)(saved["tokens"], saved["mask"])
    assert logits.dtype == dtype
    mask = saved["mask"] > 0
    np.testing.assert_allclose(logits[mask], saved["logits"][mask], atol=2e-5, rtol=0)
    prompt = saved["tokens"][:1]
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "key": jax.random.key(0)}
    for sampling in ({}, options):
        new = nys.models.generate(model, prompt, max_new_tokens=2, stop_tokens=(), **sampling)
        assert new.shape == (1, 2)
    greedy = nys.models.generate(model, prompt, max_new_tokens=1, stop_tokens=())
    assert greedy[0, 0] == np.argmax(saved["logits"][0, -1])
