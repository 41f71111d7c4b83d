"""Models saved here in transformers, and adapters trained here in PEFT: the same logits."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is in the repository

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import safetensors.numpy  # noqa: E402
from flax import nnx  # noqa: E402

import nyscaled as nys  # noqa: E402

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
NAMES = sorted(path.name for path in MODELS.iterdir() if not path.name.startswith("bert"))


def inputs(name):
    saved = safetensors.numpy.load_file(MODELS / name / "expected.safetensors")
    return saved["tokens"], saved["mask"] > 0


def theirs(model, name):
    """Logits of a torch model, where there are tokens."""
    tokens, mask = inputs(name)
    with torch.no_grad():
        tensors = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}
        return model.eval()(**tensors).logits.numpy()[mask]


@nnx.jit
def ours(model, tokens, mask):
    return model(tokens, mask)


@nnx.jit
def step(model, optimizer, tokens, mask):
    def loss(model):
        logits, wanted = model(tokens, mask)[:, :-1], tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return jnp.mean(losses, where=mask[:, 1:])

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_load_in_transformers(name, tmp_path):
    model, _ = nys.models.load(MODELS / name)
    nys.models.save(model, tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    original = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name)
    np.testing.assert_array_equal(theirs(again, name), theirs(original, name))
    assert again.dtype == torch.float32
    got, wanted = (model.config.to_dict() for model in (again, original))
    # Where a file came from, and how training is regularized.
    for setting in wanted.keys() - {"_name_or_path", "transformers_version", "dropout"}:
        assert got[setting] == wanted[setting], setting


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("gemma", "nora"),
        ("llama", "pissa"),
        ("llama3", "nora"),
        ("opt", "nora"),
        ("opt_post", "pissa"),
    ],
)
def test_trained_adapters_load_in_peft(name, init, tmp_path):
    model, _ = nys.models.load(MODELS / name)
    tokens, mask = map(jnp.asarray, inputs(name))
    targets = r".*(_proj|fc\d)"
    options = {"init": init, "key": jax.random.key(0)}
    nys.lora.apply(model, 2, 4.0, targets=f"layers{targets}", **options)
    optimizer = nnx.Optimizer(model, nys.nora_plus(optax.adamw(1e-2)), wrt=nnx.LoRAParam)
    losses = [float(step(model, optimizer, tokens, mask)) for _ in range(4)]
    assert losses[-1] < losses[0]
    family = model.config.model_type
    nys.lora.save_peft(model, tmp_path, base_model=name, names=family, task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(MODELS / name)
    plain = theirs(base, name)
    adapted = theirs(peft.PeftModel.from_pretrained(base, tmp_path), name)
    got = np.asarray(ours(model, tokens, mask))[np.asarray(mask)]
    assert np.abs(adapted - plain).max() > 1e-2
    np.testing.assert_allclose(got, adapted, atol=1e-5, rtol=0)
