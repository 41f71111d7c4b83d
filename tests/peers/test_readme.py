"""The README's snippets that read real weights run, in order."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nyscaled as nys

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "build" / "weights"


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no build/weights: make weights")
def test_snippets_with_real_weights_run(capsys, monkeypatch, tmp_path):
    (tmp_path / "build").symlink_to(ROOT / "build")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    names = {"jax": jax, "jnp": jnp, "optax": optax, "nnx": nnx, "nys": nys}
    names["key"] = jax.random.key(0)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Paris" in printed.splitlines()[0]
    assert float(names["value"]) < 2.5  # 4.8 before training
    first, *_, last = ast.literal_eval(printed.splitlines()[-1])
    assert last < 0.9 * first
    assert (tmp_path / "reviews" / "adapter_model.safetensors").is_file()
    again, _ = nys.models.load(tmp_path / "merged")
    assert again.config.model_type == "llama"
    similar = names["vectors"] @ names["vectors"].T
    assert similar[0, 1] > 0.8 > 0.3 > similar[0, 2]
