"""What a model class declares of its family, and what follows from it."""

import dataclasses
import json
import shutil
from typing import ClassVar

import jax
import numpy as np
import pytest
from flax import nnx
from model_cases import DECODERS, MODELS, arrays, call, expected, load

import nyscaled as nys
from nyscaled.checkpoints.folder import open_folder
from nyscaled.models import Bert, BertClassifier, Gemma, Llama, LlamaConfig, Opt, family


@pytest.mark.parametrize(
    ("model", "path", "index", "name"),
    [
        (Opt, "m.decoder.layers.3.fc1", (), "model.decoder.layers.3.fc1"),
        (Opt, "layers.final_layer_norm", (0,), "model.decoder.layers.0.final_layer_norm"),
        (Opt, "final_layer_norm", (), "model.decoder.final_layer_norm"),
        (Opt, "lm_head", (), "lm_head"),
        (Gemma, "layers.mlp.gate_proj", (2,), "model.layers.2.mlp.gate_proj"),
        (Llama, "norm", (), "model.norm"),
        (Llama, "lm_head", (), "lm_head"),
        (BertClassifier, "layer.output.dense", (1,), "bert.encoder.layer.1.output.dense"),
        (BertClassifier, "bert.pooler.dense", (), "bert.pooler.dense"),
        (BertClassifier, "classifier", (), "classifier"),
        (Bert, "encoder.layer.output.dense", (1,), "encoder.layer.1.output.dense"),
        (Bert, "embeddings.LayerNorm", (), "embeddings.LayerNorm"),
    ],
)
def test_names_of_layers(model, path, index, name):
    assert model.family.layer_name(path, index) == name


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("layers.self_attn.q_proj", ()),
        ("layers.3.self_attn.q_proj", (1,)),
        ("layers.self_attn.q_proj", (1, 2)),
        ("norm", (1,)),
        ("score", ()),
        ("classifier", ()),
    ],
)
def test_layers_without_a_name(path, index):
    with pytest.raises(
        ValueError, match="not a layer of the family 'llama'; expected one of embed"
    ):
        Llama.family.layer_name(path, index)


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_names_are_those_of_the_files(name):
    """For every linear layer, so that adapters and weights do not differ in what they call one."""
    model, names = load(name), set(open_folder(MODELS / name).names)
    layers = [(p, layer) for p, layer in nnx.iter_modules(model) if isinstance(layer, nnx.Linear)]
    assert len(layers) >= 6
    for path, layer in layers:
        stack = [(i,) for i in range(layer.kernel.shape[0])] if layer.kernel.ndim == 3 else [()]
        for index in stack:
            assert f"{model.layer_name('.'.join(map(str, path)), index)}.weight" in names


def test_sharding_of_a_state_requires_the_family():
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    model = load("llama")
    by_model = nys.models.shardings(model, mesh)
    by_state = nys.models.shardings(nnx.state(model), mesh, family=Llama.family)
    assert jax.tree.leaves(by_model) == jax.tree.leaves(by_state)
    with pytest.raises(ValueError, match="model is a State; expected a model of this package"):
        nys.models.shardings(nnx.state(model), mesh)


@pytest.mark.long
def test_a_new_family_is_a_config_and_a_class(tmp_path, monkeypatch):
    """The recipe of CONTRIBUTING.md: its folders, GGUF names and adapters need nothing more."""
    monkeypatch.setitem(family.MODELS, "toy", [])

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ToyConfig(LlamaConfig):
        model_type = "toy"
        fixed: ClassVar = {"hidden_act": ("relu",)}

    @family.register
    class Toy(nys.models.Llama):
        family = dataclasses.replace(
            Llama.family, config=ToyConfig, architecture="ToyForCausalLM", gguf=None
        )

        @staticmethod
        def activation(x):
            return jax.nn.relu(x)

    folder = shutil.copytree(MODELS / "llama", tmp_path / "toy")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "toy", "hidden_act": "relu", "architectures": ["ToyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = nys.models.load(folder)
    assert type(model) is Toy
    tokens, mask, logits = expected("llama")
    before = call(model, tokens, mask)
    assert np.abs(before - logits)[np.asarray(mask)].max() > 1e-2  # the activation is another
    assert nys.models.generate(model, tokens[:1], max_new_tokens=2).shape == (1, 2)
    for layer in nys.lora.apply(model, 2, targets=".*q_proj", key=jax.random.key(0)).values():
        layer.adapters["default"].lora_b[...] += 0.1
    nys.lora.save_peft(model, tmp_path / "adapter", base_model="toy")
    after = call(model, tokens, mask)
    nys.lora.merge(model)
    nys.lora.remove(model)
    nys.models.save(model, tmp_path / "merged")
    merged, _ = nys.models.load(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["hidden_act"] == "relu"
    np.testing.assert_allclose(call(merged, tokens, mask), after, atol=2e-5)
    again, _ = nys.models.load(folder)
    nys.lora.load_peft(again, tmp_path / "adapter")
    np.testing.assert_allclose(call(again, tokens, mask), after, atol=2e-5)
    assert arrays(again).keys() > arrays(merged).keys()
