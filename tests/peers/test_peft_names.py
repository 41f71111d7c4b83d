"""Names of layers in PEFT's files are those of transformers, for every family."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is made from its configuration

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import safetensors.numpy  # noqa: E402
from flax import nnx  # noqa: E402
from peft_helpers import TENSORS, randomize, strictly  # noqa: E402

import nyscaled as nys  # noqa: E402
from nyscaled.models.family import MODELS  # noqa: E402

KEY = jax.random.key(0)

SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 32},
    **{"max_position_embeddings": 32},
}
FFN = {"intermediate_size": 24}
GATED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = {
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)
        ),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "model.decoder.",
    ),
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, **FFN, num_key_value_heads=2)
        ),
        GATED,
        "model.",
    ),
    "gemma": (
        lambda: transformers.GemmaForCausalLM(
            transformers.GemmaConfig(**SIZES, **FFN, num_key_value_heads=1, head_dim=8)
        ),
        GATED,
        "model.",
    ),
    "mistral": (
        lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**SIZES, **FFN, num_key_value_heads=2)
        ),
        GATED,
        "model.",
    ),
    "qwen2": (
        lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**SIZES, **FFN, num_key_value_heads=2)
        ),
        GATED,
        "model.",
    ),
    "qwen3": (
        lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**SIZES, **FFN, num_key_value_heads=2, head_dim=8)
        ),
        GATED,
        "model.",
    ),
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **FFN)),
        r"bert\.encoder\..*(query|key|value|dense)",
        "bert.encoder.",
    ),
}


def put(tree, path, layer):
    """Put a layer at a dotted path, in new modules (lists, where numbers follow)."""
    first, _, rest = path.partition(".")
    if not rest:
        setattr(tree, first, layer)
        return
    number, _, after = rest.partition(".")
    if not hasattr(tree, first):
        setattr(tree, first, nnx.List([]) if number.isdigit() else nnx.Module())
    child = getattr(tree, first)
    if number.isdigit():
        if int(number) == len(child):
            child.append(nnx.Module())
        child, rest = child[int(number)], after
    put(child, rest, layer)


def skeleton(modules, stacked):
    """Linear layers of these names and sizes, alone or in stacks, with no function."""
    tree, rngs = nnx.Module(), nnx.Rngs(0)
    for path, (rows, columns) in modules.items():
        layer = nnx.Linear(rows, columns, rngs=rngs)
        if stacked:
            before, number, after = path.partition(".0.")
            if not number:
                continue
            layer.kernel = nnx.Param(jnp.stack([layer.kernel[...]] * SIZES["num_hidden_layers"]))
            path = f"{before}.{after}"
        put(tree, path, layer)
    return tree


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stack"])
@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_transformers(name, stacked, tmp_path):
    make, targets, prefix = FAMILIES[name]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    their = peft.get_peft_model(make(), config)
    randomize(their)
    their.save_pretrained(tmp_path / "theirs")
    expected = safetensors.numpy.load_file(tmp_path / "theirs" / TENSORS)
    modules = {
        path.removeprefix(prefix): (module.in_features, module.out_features)
        for path, module in make().named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith(prefix)
    }
    model = skeleton(modules, stacked)
    names = MODELS[name][-1].family.layer_name
    assert len(expected) == 2 * len(modules)

    nys.lora.apply(model, 2, 3.0, targets=".*", key=KEY, name="ours")
    nys.lora.save_peft(model, tmp_path / "ours", base_model="tiny", name="ours", names=names)
    actual = safetensors.numpy.load_file(tmp_path / "ours" / TENSORS)
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in expected.items()}
    loaded = strictly(peft.PeftModel.from_pretrained, make(), tmp_path / "ours")
    state = peft.get_peft_model_state_dict(loaded)
    assert state.keys() == actual.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(value.numpy(), actual[key])

    nys.lora.load_peft(model, tmp_path / "theirs", name="theirs", names=names)
    nys.lora.save_peft(model, tmp_path / "again", base_model="tiny", name="theirs", names=names)
    again = safetensors.numpy.load_file(tmp_path / "again" / TENSORS)
    jax.tree.map(np.testing.assert_array_equal, again, expected)
