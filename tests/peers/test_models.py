"""Models saved here in transformers, and adapters trained here in PEFT: the same logits."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is in the repository

import json
import shutil
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
from nyscaled.models.family import MODELS as MODELS_OF  # noqa: E402

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
NAMES = sorted(path.name for path in MODELS.iterdir())
ADAPTED = [name for name in NAMES if name != "bert_encoder"]
CLASSES = {
    "bert": transformers.AutoModelForSequenceClassification,
    "bert_encoder": transformers.AutoModel,
}
TASKS = {"bert": "SEQ_CLS"}
TARGETS = r".*\.(q_proj|v_proj|down_proj|fc2|query|value|output\.dense)"


def reference(name, folder=None):
    """The model in torch."""
    kind = CLASSES.get(name, transformers.AutoModelForCausalLM)
    return kind.from_pretrained(folder or MODELS / name)


def inputs(name):
    """Tokens and mask, and for BERT types."""
    saved = safetensors.numpy.load_file(MODELS / name / "expected.safetensors")
    mask = saved["mask"] > 0
    return (saved["tokens"], mask, *([saved["types"]] if "types" in saved else []))


def meant(name, output):
    """What there is a meaning in: not logits or hidden states at padding."""
    return np.asarray(output) if name == "bert" else np.asarray(output)[inputs(name)[1]]


def tensors(name):
    keys = "input_ids", "attention_mask", "token_type_ids"
    return {k: torch.tensor(v).long() for k, v in zip(keys, inputs(name), strict=False)}


def theirs(model, name):
    """What a torch model computes."""
    with torch.no_grad():
        output = model.eval()(**tensors(name))
    hidden = name == "bert_encoder"
    return meant(name, (output.last_hidden_state if hidden else output.logits).numpy())


@nnx.jit
def ours(model, *inputs):
    return model(*inputs)


def wanted_of(name):
    """Where and what to learn: the next token, or a class of each row."""
    tokens, mask = inputs(name)[:2]
    if name == "bert":
        return np.arange(len(tokens)) % 3, None
    return tokens[:, 1:], mask[:, 1:]


def loss_of(logits, expected, mask):
    if mask is not None:
        logits = logits[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, expected)
    return jnp.mean(losses, where=mask)


@nnx.jit
def step(model, optimizer, inputs, expected):
    def loss(model):
        return loss_of(model(*inputs), *expected)

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_load_in_transformers(name, tmp_path):
    model, _ = nys.models.load(MODELS / name)
    nys.models.save(model, tmp_path)
    again, report = CLASSES.get(name, transformers.AutoModelForCausalLM).from_pretrained(
        tmp_path, output_loading_info=True
    )
    # transformers makes a pooler, which no file of a masked language model has.
    report["missing_keys"] -= {"pooler.dense.weight", "pooler.dense.bias"}
    assert not any(report.values()), report
    original = reference(name)
    np.testing.assert_array_equal(theirs(again, name), theirs(original, name))
    assert again.dtype == torch.float32
    got, expected = (model.config.to_dict() for model in (again, original))
    # Where a file came from, what it was saved as, and how training is regularized.
    others = {"_name_or_path", "transformers_version", "dropout"}
    if name == "bert_encoder":
        others |= {"architectures"}
    for setting in expected.keys() - others:
        if setting == "rope_parameters":  # what a file leaves to defaults is written out
            assert got[setting].items() >= expected[setting].items()
        else:
            assert got[setting] == expected[setting], setting


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLASSES])
def test_rows_are_continued_as_in_transformers(name):
    model, _ = nys.models.load(MODELS / name)
    tokens, mask = (values[:2] for values in inputs(name))  # one with padding on its left
    assert not mask[1, 0]
    new = nys.models.generate(model, tokens, mask, max_new_tokens=12, pad_token=1)
    ids = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    expected = reference(name).eval().generate(**ids, **options).numpy()[:, tokens.shape[1] :]
    np.testing.assert_array_equal(new[:, : expected.shape[1]], expected)
    assert (new[:, expected.shape[1] :] == 1).all()


@pytest.mark.parametrize("name", ["llama", "opt_post"])
def test_generation_ends_as_in_transformers(name, tmp_path):
    """By `generation_config.json`, also after it was saved here."""
    folder = shutil.copytree(MODELS / name, tmp_path / "chat")
    tokens = inputs(name)[0][:1]
    ids, options = torch.tensor(tokens).long(), {"max_new_tokens": 6, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    free = reference(name).generate(ids, eos_token_id=-1, **options)[0, tokens.shape[1] :].tolist()
    for ends in (free[2], [31, free[1]], [free[3]]):
        settings = {"eos_token_id": ends, "pad_token_id": 30}
        (folder / "generation_config.json").write_text(json.dumps(settings))
        model, _ = nys.models.load(folder)
        nys.models.save(model, tmp_path / "saved")
        new = nys.models.generate(model, tokens, max_new_tokens=6)[0]
        for where in (folder, tmp_path / "saved"):
            expected = reference(name, where).generate(ids, **options)[0, tokens.shape[1] :].numpy()
            np.testing.assert_array_equal(new, np.append(expected, [30] * (6 - len(expected))))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"max_position_embeddings": 5}
SETTINGS = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, **LONG},
    "dynamic, not yet": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN, "rope_theta": 50.0},
    "yarn, mscale": {
        "rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 1, "beta_fast": 2}
    },
    "yarn, ends": {"rope_scaling": YARN | {"truncate": False, "attention_factor": 1.5}},
    "llama3 without original": {"rope_scaling": LLAMA3, **LONG, "rope_theta": 50.0},
    "older copy": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "default"},
    },
    "partial": {"rope_parameters": {"rope_theta": 50.0, "partial_rotary_factor": 1.0}},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
}


@pytest.mark.parametrize(
    ("family", "what"),
    [("llama", what) for what in SETTINGS]
    + [("gemma", what) for what in ("linear", "dynamic", "yarn", "attention_bias")],
)
def test_settings_of_rotations_and_biases(family, what, tmp_path):
    """Logits, those of a saved copy, and what is generated beyond the positions of training."""
    settings = json.loads((MODELS / family / "config.json").read_text())
    del settings["rope_parameters"]
    settings |= SETTINGS[what]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data = value.data + 0.3 * torch.randn_like(value)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    here, _ = nys.models.load(tmp_path / "model")
    nys.models.save(here, tmp_path / "saved")
    again, _ = nys.models.load(tmp_path / "saved")
    assert again.config == here.config
    tokens, mask = inputs(family)
    got = meant(family, ours(here, jnp.asarray(tokens), jnp.asarray(mask)))
    for where in ("model", "saved"):
        expected = theirs(reference(family, tmp_path / where), family)
        np.testing.assert_allclose(
            got, expected, atol=2e-5 * max(1, np.abs(expected).max()), rtol=0
        )
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": 31}
    ids = {
        "input_ids": torch.tensor(tokens[:2]).long(),
        "attention_mask": torch.tensor(mask[:2]).long(),
    }
    expected = reference(family, tmp_path / "model").eval().generate(**ids, **options).numpy()
    new = nys.models.generate(
        here, tokens[:2], mask[:2], max_new_tokens=9, stop_tokens=31, pad_token=0
    )
    np.testing.assert_array_equal(
        new[:, : expected.shape[1] - tokens.shape[1]], expected[:, tokens.shape[1] :]
    )


@pytest.mark.parametrize("name", ["llama3", "gemma", "llama"])
@pytest.mark.filterwarnings("ignore:.*against tie_word_embeddings")
def test_tied_files(name, tmp_path):
    """With the embedding, the head, both, or two that differ; and names without their root."""
    folder = shutil.copytree(MODELS / name, tmp_path / "copy")
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    embedding = tensors["model.embed_tokens.weight"]
    rest = {k: v for k, v in tensors.items() if k != "model.embed_tokens.weight"}
    outputs = []
    for case in (
        tensors,
        rest | {"lm_head.weight": embedding},
        tensors | {"lm_head.weight": embedding},
        tensors | {"lm_head.weight": embedding + 1},
        {k.removeprefix("model."): v for k, v in tensors.items()},
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, "f")},
    ):
        safetensors.numpy.save_file(case, folder / "model.safetensors", {"format": "pt"})
        here, _ = nys.models.load(folder)
        got = meant(name, ours(here, *map(jnp.asarray, inputs(name))))
        outputs.append(theirs(reference(name, folder), name))
        np.testing.assert_allclose(got, outputs[-1], atol=2e-5, rtol=0)
    assert np.abs(outputs[3] - outputs[0]).max() > 0.1


@pytest.mark.parametrize("name", ADAPTED)
def test_trained_adapters_load_in_peft(name, tmp_path):
    """Two sets, which are trained together and saved one by one."""
    model, _ = nys.models.load(MODELS / name)
    batch = tuple(map(jnp.asarray, inputs(name)))
    for init in ("nora", "pissa"):
        options = {"init": init, "name": init, "key": jax.random.key(0)}
        nys.lora.apply(model, 2, 4.0, targets=TARGETS, **options)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    losses = [float(step(model, optimizer, batch, wanted_of(name))) for _ in range(4)]
    assert losses[-1] < losses[0]
    plain = theirs(reference(name), name)
    for init in ("nora", "pissa"):
        nys.lora.save_peft(
            model,
            tmp_path / init,
            base_model=name,
            name=init,
            modules_to_save=["classifier"] if name == "bert" else [],
            task_type=TASKS.get(name, "CAUSAL_LM"),
        )
        nys.lora.activate(model, init)
        got = meant(name, ours(model, *batch))
        adapted = theirs(peft.PeftModel.from_pretrained(reference(name), tmp_path / init), name)
        assert np.abs(adapted - plain).max() > 1e-2
        np.testing.assert_allclose(got, adapted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_trained_in_peft_load_here(name, tmp_path):
    base = reference(name)
    plain = theirs(base, name)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["query", "value", "dense"] if name == "bert" else "all-linear",
        task_type=TASKS.get(name, "CAUSAL_LM"),
    )
    torch.manual_seed(0)
    their = peft.get_peft_model(base, config)
    trained = [p for p in their.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(4):
        logits = their.eval()(**tensors(name)).logits
        expected, mask = wanted_of(name)
        if mask is not None:
            logits, expected = logits[:, :-1][torch.tensor(mask)], expected[mask]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(expected))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    their.save_pretrained(tmp_path)
    model, _ = nys.models.load(MODELS / name)
    nys.lora.load_peft(model, tmp_path)
    adapted = theirs(their, name)
    assert np.abs(adapted - plain).max() > 1e-2
    got = ours(model, *map(jnp.asarray, inputs(name)))
    np.testing.assert_allclose(meant(name, got), adapted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (
            transformers.OPTConfig(
                hidden_size=2048,
                ffn_dim=8192,
                num_hidden_layers=24,
                num_attention_heads=32,
                word_embed_proj_dim=2048,
            ),
            1_315_758_080,
        ),
        (transformers.LlamaConfig(), 6_738_415_616),
        (transformers.GemmaConfig(), 8_537_680_896),
        (transformers.MistralConfig(), 7_241_732_096),
        (
            transformers.Qwen2Config(
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            ),
            494_032_768,
        ),
        (
            transformers.Qwen3Config(
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            ),
            596_049_920,
        ),
    ],
    ids=["opt-1.3b", "llama-7b", "gemma-7b", "mistral-7b", "qwen2-0.5b", "qwen3-0.6b"],
)
def test_real_sizes_have_as_many_parameters_as_in_transformers(config, count):
    """Without values; `experiments/fits.py` claims these counts."""
    make = MODELS_OF[config.model_type][0]
    sizes = make.family.config.from_json(config.to_dict())
    ours = nnx.state(nnx.eval_shape(lambda: make(sizes, rngs=nnx.Rngs(0))))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(x.size for x in jax.tree.leaves(ours)) == theirs.num_parameters() == count
