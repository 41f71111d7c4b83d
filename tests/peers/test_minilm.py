"""all-MiniLM-L6-v2, real weights, against transformers: cosine similarities of sentences."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is a file

import pydoc_data.topics
import re
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402

import nyscaled as nys  # noqa: E402

MINILM = Path(__file__).parents[2] / "build" / "weights" / "all-MiniLM-L6-v2"
pytestmark = pytest.mark.skipif(
    not MINILM.is_dir(), reason=f"no {MINILM.name}: `make weights` fetches it"
)
# The first sentences of the chapters of Python's own manual.
FOUND = (re.search(r"[A-Z][^.*]{30,200}\.\s", t) for t in pydoc_data.topics.topics.values())
SENTENCES = [" ".join(match[0].split()) for match in FOUND if match][:24]


@nnx.jit
def vectors(model, tokens, mask):
    return nys.models.sentence_vectors(model(tokens, mask), mask)


def their_vectors(model, tokens, mask):
    """Mean pooling and normalization, as the model's card has them."""
    mask = torch.tensor(mask)
    with torch.no_grad():
        hidden = model.eval()(torch.tensor(tokens).long(), mask.long()).last_hidden_state
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(means, dim=1).numpy()


def test_cosine_similarities(tmp_path):
    model, tokenizer = nys.models.load(MINILM)
    tokens, mask = tokenizer(SENTENCES)
    assert len(SENTENCES) == 24
    assert mask.all(1).sum() < 4  # nearly all have padding
    theirs = transformers.AutoModel.from_pretrained(MINILM)
    their = their_vectors(theirs, tokens, mask)
    our = np.asarray(vectors(model, tokens, mask))
    cosines = our @ our.T
    assert np.ptp(cosines) > 0.5
    np.testing.assert_allclose(cosines, their @ their.T, atol=1e-5, rtol=0)

    nys.lora.apply(model, 4, targets=".*(query|value)", init="nora", key=jax.random.key(0))
    for layer in nys.lora.adapted_layers(model).values():
        layer.adapters["default"].lora_b[...] += 0.01
    nys.lora.save_peft(model, tmp_path, base_model=str(MINILM), task_type="FEATURE_EXTRACTION")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path)
    our, their = np.asarray(vectors(model, tokens, mask)), their_vectors(adapted, tokens, mask)
    assert np.abs(our @ our.T - cosines).max() > 1e-2
    np.testing.assert_allclose(our @ our.T, their @ their.T, atol=1e-5, rtol=0)
