"""Adapters of whole models against PEFT: heads, embeddings, norms, new tokens, single layers."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is made from its configuration

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402

import nyscaled as nys  # noqa: E402

TOKENS = np.array([[3, 5, 9, 1], [0, 2, 4, 30]])
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
MAKE = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=False)
    ),
    "tied llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, head_dim=4)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8)
    ),
}
NORMS = {"opt": ["final_layer_norm"], "llama": ["norm"], "gemma": ["model.norm"]}


@pytest.fixture(scope="module", params=MAKE)
def base(request, tmp_path_factory):
    """A folder with a model, and its family."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    net = MAKE[request.param]()
    for value in net.parameters():
        value.data += 0.1 * torch.randn(value.shape)
    net.save_pretrained(folder)
    return folder, request.param.split()[-1]


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@nnx.jit
def call(model):
    return model(jnp.asarray(TOKENS))


def trained(net, **options):
    """A PEFT model whose trainable parameters have been moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        net = peft.get_peft_model(net, peft.LoraConfig(**({"r": 2, "lora_alpha": 3} | options)))
    generator = torch.Generator().manual_seed(0)
    for value in net.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return net


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


def quietly(fn, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **options)


CASES = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "lora_dropout": 0.1},
    "both": {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tying": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "norms": {"target_modules": ["v_proj"], "modules_to_save": None},
    "layers saved whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["layers.1.self_attn.v_proj"],
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 30]},
    "tokens of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 30], "lm_head": [4]},
    },
    "tokens of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"lm_head": [3]},
        "ensure_weight_tying": True,
    },
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [2]},
    "layers by pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "expression": {"target_modules": r".*layers\.(0|2)\.self_attn\.[qv]_proj"},
    "excluded": {
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": r".*\.1\.self_attn\.q_proj",
    },
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "c_attn"],
        "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 5, r"^.*\.0\..*v_proj": 1, "c_attn": 7},
        "alpha_pattern": {r"layers\.[01]\.self_attn\.q_proj": 7, r"0.*v_proj": 5},
    },
    "rank-stabilized ranks": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"1.self_attn.q_proj": 5, "2.self_attn.q_proj": 3},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_is_computed_here_and_saved_again(case, base, tmp_path):
    folder, family = base
    options = CASES[case] | ({"modules_to_save": NORMS[family]} if case == "norms" else {})
    their = trained(theirs(folder), **options)
    expected = logits(their)
    quietly(their.save_pretrained, tmp_path / "theirs")
    model, _ = quietly(nys.models.load, folder)
    before = call(model)
    nys.lora.load_peft(model, tmp_path / "theirs")
    actual = call(model)
    close(actual, expected)
    assert np.abs(actual - before).max() > 1e-4
    if case.startswith(("tokens", "biases")):
        return  # these changed the base, and are no part of the adapter here
    saved = list(_saved_paths(model, options.get("modules_to_save") or ()))
    nys.lora.save_peft(model, tmp_path / "ours", base_model="b", modules_to_save=saved)
    again = quietly(peft.PeftModel.from_pretrained, theirs(folder), tmp_path / "ours")
    close(logits(again), expected)


def _saved_paths(model, modules):
    """Our paths of what PEFT was asked to save."""
    ends = {"model.norm": "norm", "layers.1.self_attn.v_proj": "layers.self_attn.v_proj"}
    for module in modules:
        end = ends.get(module, module)
        for path, _ in nnx.iter_modules(model):
            if (path := ".".join(map(str, path))).endswith(end):
                yield path


@pytest.mark.parametrize("save_embeddings", [True, "auto"])
def test_new_tokens(save_embeddings, base, tmp_path):
    """Both sides resize, PEFT's trains and saves the new rows, and they come back the same."""
    folder, _ = base
    their = theirs(folder)
    quietly(their.resize_token_embeddings, 35, mean_resizing=False)
    new = {"modules_to_save": ["embed_tokens", "lm_head"]} if save_embeddings == "auto" else {}
    their = trained(their, target_modules=["q_proj"], **new)
    quietly(their.save_pretrained, tmp_path, save_embedding_layers=save_embeddings)
    model, _ = quietly(nys.models.load, folder)
    with pytest.raises(ValueError, match="resize_token_embeddings first"):
        nys.lora.load_peft(model, tmp_path)
    nys.models.resize_token_embeddings(model, 35)
    nys.lora.load_peft(model, tmp_path)
    tokens = np.array([[3, 33, 34, 1]])
    with torch.no_grad():
        expected = their.eval()(torch.tensor(tokens)).logits.numpy()
    assert expected.shape[-1] == 35
    close(model(jnp.asarray(tokens)), expected)


@pytest.mark.parametrize("init", ["nora", "pissa"])
def test_peft_computes_what_was_trained_here(init, base, tmp_path):
    """LoRA on the head and the embedding, and norms saved whole."""
    folder, family = base
    model, _ = quietly(nys.models.load, folder)
    if model.config.tie_word_embeddings:
        with pytest.raises(ValueError, match="untie"):
            nys.lora.apply(model, 2, targets="lm_head", key=jax.random.key(0))
        model.untie()
    close(call(model), logits(theirs(folder)))
    targets = "lm_head|embed_tokens|.*q_proj"
    nys.lora.apply(
        model, 2, 3.0, targets=targets, key=jax.random.key(0), embeddings=True, init=init
    )
    norm = "final_layer_norm" if family == "opt" else "norm"
    rng = np.random.default_rng(0)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if isinstance(value, nnx.LoRAParam) or path[0] == norm or "input_layernorm" in path:
            value[...] += 0.1 * rng.standard_normal(value.shape).astype(np.float32)
    model = nnx.merge(nnx.graphdef(model), nnx.state(model))
    expected = call(model)
    whole = [p for p in (norm, "layers.input_layernorm") if p in _paths(model)]
    nys.lora.save_peft(model, tmp_path, base_model="b", modules_to_save=whole)
    loaded = quietly(peft.PeftModel.from_pretrained, theirs(folder), tmp_path)
    close(logits(loaded), expected)
    nys.lora.merge(model)
    close(call(model), expected)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head", "embed_tokens"]])
def test_what_peft_saved_is_exported(targets, base, tmp_path):
    """PEFT saves the weights of a targeted head or embedding beside its factors."""
    folder, _ = base
    if theirs(folder).config.tie_word_embeddings and len(targets) > 1:
        pytest.skip("the head is the embedding: such an adapter is not exported")
    their = trained(theirs(folder), target_modules=targets, init_lora_weights=False)
    quietly(their.save_pretrained, tmp_path / "theirs")
    quietly(nys.finetune.export, folder, tmp_path / "theirs", tmp_path / "out")
    close(logits(theirs(tmp_path / "out")), logits(their))


def _paths(model):
    return {".".join(map(str, path)) for path, _ in nnx.iter_modules(model)}


def test_models_with_another_head_and_size_are_read_by_transformers(base, tmp_path):
    folder, _ = base
    model, _ = quietly(nys.models.load, folder)
    model.untie()
    nys.models.resize_token_embeddings(model, 35)
    model.lm_head.kernel[...] = 2 * model.lm_head.kernel[...]
    nys.models.save(model, tmp_path)
    net = theirs(tmp_path)
    assert net.config.vocab_size == 35
    close(logits(net), call(model))


BERT = {
    "embedding": {"target_modules": ["query", "word_embeddings"]},
    "norms": {"target_modules": ["query"], "modules_to_save": ["classifier", "LayerNorm"]},
    "biases": {"target_modules": ["query", "dense"], "bias": "all"},
    "one layer": {"target_modules": ["query"], "layers_to_transform": 1, "layers_pattern": "layer"},
}


@pytest.mark.parametrize("case", BERT)
def test_classifiers(case, tmp_path):
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=16)
    )
    for value in net.parameters():
        value.data += 0.1 * torch.randn(value.shape)
    net.save_pretrained(tmp_path / "base")
    their = trained(net, task_type="SEQ_CLS", **BERT[case])
    expected = logits(their)
    quietly(their.save_pretrained, tmp_path / "theirs")
    model, _ = quietly(nys.models.load, tmp_path / "base")
    nys.lora.load_peft(model, tmp_path / "theirs")
    close(call(model), expected)
    if case == "biases":
        return
    ends = ("classifier", "LayerNorm") if case == "norms" else ("classifier",)
    saved = [path for path in _paths(model) if path.endswith(ends)]
    options = {"task_type": "SEQ_CLS", "modules_to_save": saved}
    nys.lora.save_peft(model, tmp_path / "ours", base_model="b", **options)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    close(logits(quietly(peft.PeftModel.from_pretrained, again, tmp_path / "ours")), expected)
