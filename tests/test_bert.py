"""BERT against what transformers computed (`tests/fixtures/make_models.py`), and its files."""

import json
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from model_cases import MODELS, arrays, call, change, load, saved

import nyscaled as nys
from nyscaled.models import Bert, BertClassifier

NAMES = {"bert": BertClassifier, "bert_encoder": Bert}


def expected(name):
    """Tokens, mask and types, and what transformers computed."""
    parts = saved(name)
    inputs = parts["tokens"], parts["mask"], jnp.asarray(parts["types"])
    return inputs, parts["logits" if name == "bert" else "hidden"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name):
    (tokens, mask, types), reference = expected(name)
    model = load(name)
    assert type(model) is NAMES[name]
    got = np.asarray(call(model, tokens, mask, types))
    assert np.isfinite(got).all()
    seen = mask if name == "bert_encoder" else ...
    np.testing.assert_allclose(got[seen], reference[seen], atol=2e-5, rtol=0)
    assert not mask[1:].all(1).any()
    others = np.asarray(call(model, tokens, mask, jnp.zeros_like(types)))
    assert np.abs(others - reference)[seen].max() > 1e-2
    # Without types, there is the first alone; without a mask, there is no padding.
    np.testing.assert_allclose(call(model, tokens[:1]), others[:1], atol=2e-5, rtol=0)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_do_not_depend_on_the_side_of_padding(name):
    """Nor on how much there is of it, nor on the rows beside."""
    (tokens, mask, types), reference = expected(name)
    model = load(name)
    width = tokens.shape[1] + 3

    def aside(rows):
        moved = np.zeros((len(rows), width), rows.dtype)
        for new, row, seen in zip(moved, np.asarray(rows), np.asarray(mask), strict=True):
            new[width - seen.sum() :] = row[seen]
        return moved

    left, seen = aside(tokens), aside(mask)
    got = np.asarray(call(model, left, seen, aside(types)))
    if name == "bert_encoder":
        got, reference = got[seen], reference[mask]
        pooled = BertClassifier(model, ["a"], rngs=nnx.Rngs(0)).bert
        states = pooled(left, seen, aside(types))
        np.testing.assert_allclose(
            pooled.pool(states, seen), pooled.pool(pooled(tokens, mask, types)), atol=2e-6
        )
    np.testing.assert_allclose(got, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(name, tmp_path):
    model = load(name)
    nys.models.save(model, tmp_path)
    again, _ = nys.models.load(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(model))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [NAMES[name].family.architecture]
    if name == "bert":
        assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
        assert config["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}


def test_classes_without_names(tmp_path):
    folder = shutil.copytree(MODELS / "bert", tmp_path / "copy")
    change(folder, id2label="absent", label2id=None, num_labels=3)
    assert nys.models.load(folder)[0].config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def older(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


def test_forms_that_older_files_have(tmp_path):
    """As `bert-base-uncased` is: old names of norms, constants, heads that it was trained with."""
    folder = shutil.copytree(MODELS / "bert_encoder", tmp_path / "copy")
    more = {
        "bert.embeddings.position_ids": np.arange(64)[None],
        "bert.pooler.dense.weight": np.eye(16, dtype="f"),
        "bert.pooler.dense.bias": np.zeros(16, "f"),
        "cls.seq_relationship.weight": np.zeros((2, 16), "f"),
        "cls.seq_relationship.bias": np.zeros(2, "f"),
    }
    change(folder, older, more)
    (*inputs, mask, types), hidden = expected("bert_encoder")
    model, _ = nys.models.load(folder)
    got = np.asarray(call(model, *inputs, mask, types))
    np.testing.assert_allclose(got[mask], hidden[mask], atol=2e-5)
    np.testing.assert_allclose(model.pool(jnp.asarray(hidden)), np.tanh(hidden[:, 0]), atol=1e-5)
    # And as all-MiniLM-L6-v2: an encoder alone.
    nys.models.save(model, folder)
    change(folder, tensors={"embeddings.position_ids": np.arange(64)[None]})
    names = safetensors.numpy.load_file(folder / "model.safetensors").keys()
    assert {"embeddings.LayerNorm.weight", "pooler.dense.bias"} < names
    again, _ = nys.models.load(folder)
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(model))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {"hidden_act": "silu"}, "hidden_act is 'silu'; expected one of gelu, gelu_new"),
        ("bert", {"position_embedding_type": "relative_key"}, "only 'absolute' or None"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"num_attention_heads": 5}, "with 5 heads; expected a multiple"),
        ("bert", {"layer_norm_eps": 0}, "layer_norm_eps is 0; expected a positive number"),
        ("bert", {"id2label": {"0": "a", "2": "b"}}, "id2label is .*; expected a label for each"),
        ("bert", {"id2label": ["a"]}, r"id2label is \['a'\]"),
        ("bert", {"id2label": None, "num_labels": 10**30}, "num_labels is 1000.*; expected an int"),
        ("bert", {"id2label": None, "num_labels": True}, "num_labels is True; expected an integer"),
        ("bert", {"id2label": None}, r"classifier\.bias of shape \(3,\); expected \(2,\)"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "no parameter for: classifier"),
        ("bert", {"architectures": None}, "no parameter for: classifier"),
        (
            "bert_encoder",
            {"architectures": ["BertForSequenceClassification"]},
            "no tensor for bert",
        ),
    ],
)
def test_settings_that_are_refused(name, settings, message, tmp_path):
    folder = shutil.copytree(MODELS / name, tmp_path / "copy")
    change(folder, **settings)
    with pytest.raises(ValueError, match=message):
        nys.models.load(folder)


@pytest.mark.parametrize("head", ["qa_outputs.weight", "cls.predictions.other.weight"])
def test_other_heads_are_refused(head, tmp_path):
    folder = shutil.copytree(MODELS / "bert_encoder", tmp_path / "copy")
    change(folder, tensors={head: np.ones((2, 16), "f")})
    with pytest.raises(ValueError, match=f"no parameter for: {head}"):
        nys.models.load(folder)


def test_what_the_encoder_cannot_do(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    model = load("bert_encoder")
    with pytest.raises(ValueError, match="have length 65; expected at most 64"):
        model(jnp.zeros((1, 65), int))
    with pytest.raises(ValueError, match=r"types have shape \(1, 3\); expected \(2, 3\)"):
        model(jnp.zeros((2, 3), int), types=jnp.zeros((1, 3), int))
    with pytest.raises(ValueError, match="the model has no pooler"):
        model.pool(jnp.zeros((1, 2, 16)))
    for labels in ([], "neg", ["a", "a"], {"a", "b"}, None):
        with pytest.raises(ValueError, match=r"labels is .*; expected a list of distinct names"):
            BertClassifier(model, labels, rngs=nnx.Rngs(0))


TRAINED = nnx.Any(nnx.LoRAParam, nnx.PathContains("classifier"), nnx.PathContains("pooler"))
HEAD = ["bert.pooler.dense", "classifier"]


def fresh(seed, labels=("no", "yes")):
    """A new head, and a new pooler, on the encoder."""
    return BertClassifier(load("bert_encoder"), labels, rngs=nnx.Rngs(seed))


@nnx.jit
def step(model, optimizer, inputs, reference):
    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(*inputs), reference)
        return losses.mean()

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, TRAINED))(model)
    optimizer.update(model, grads)
    return value


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A new head trained with adapters, its logits, and the folder that it was saved in."""
    inputs, _ = expected("bert_encoder")
    model, folder = fresh(0), tmp_path_factory.mktemp("adapter")
    np.testing.assert_allclose(np.std(model.bert.pooler.dense.kernel[...]), 0.02, rtol=0.2)
    np.testing.assert_allclose(np.std(model.classifier.kernel[...]), 0.02, rtol=0.4)
    assert not model.classifier.bias[...].any()
    nys.lora.apply(model, 2, targets=".*query", key=jax.random.key(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=TRAINED)
    losses = [float(step(model, optimizer, inputs, jnp.array([0, 1, 0]))) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    saving = {"base_model": "tiny", "task_type": "SEQ_CLS"}
    with pytest.raises(
        ValueError, match="the head from the adapter's folder; expected it in modules"
    ):
        nys.lora.save_peft(model, folder, **saving)
    assert not list(folder.iterdir())
    nys.lora.save_peft(model, folder, modules_to_save=HEAD, **saving)
    return model, folder


@pytest.mark.long
def test_a_trained_head_goes_with_its_adapter(trained):
    model, folder = trained
    inputs, _ = expected("bert_encoder")
    again = fresh(1)
    assert (again.classifier.kernel[...] != model.classifier.kernel[...]).all()
    nys.lora.load_peft(again, folder)
    reference = call(model, *inputs)
    np.testing.assert_allclose(call(again, *inputs), reference, atol=2e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize(
    ("labels", "lost", "message"),
    [
        (("a", "b", "c"), None, r"has classifier\.bias of shape \(2,\) .*, and the model \(3,\)"),
        (("a", "b"), "classifier.bias", r"only one of them has classifier\.bias"),
    ],
)
def test_heads_that_do_not_fit(labels, lost, message, trained, tmp_path):
    folder = shutil.copytree(trained[1], tmp_path / "copy")
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors.pop(f"base_model.model.{lost}", None)
    safetensors.numpy.save_file(tensors, path)
    model = fresh(1, labels)
    before = arrays(model)
    with pytest.raises(ValueError, match=message):
        nys.lora.load_peft(model, folder)
    jax.tree.map(np.testing.assert_array_equal, arrays(model), before)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "bert.encoder.layer.attention.self.query",
            "is a LoRALinear; expected .* without adapters",
        ),
        ("head", "has 'head'; expected the path of a layer"),
    ],
)
def test_what_cannot_be_saved_whole(path, message, trained, tmp_path):
    with pytest.raises(ValueError, match=message):
        nys.lora.save_peft(trained[0], tmp_path, base_model="tiny", modules_to_save=[path])
    assert not list(tmp_path.iterdir())


def test_sentence_vectors():
    hidden = jax.random.normal(jax.random.key(0), (4, 5, 3))
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    got = nys.models.sentence_vectors(hidden, jnp.asarray(mask))
    means = [np.asarray(rows)[kept].mean(0) for rows, kept in zip(hidden, mask[:3], strict=False)]
    reference = [*(mean / np.linalg.norm(mean) for mean in means), np.zeros(3)]
    np.testing.assert_allclose(got, np.stack(reference), atol=1e-6)
    np.testing.assert_allclose(nys.models.sentence_vectors(hidden)[:1], got[:1], atol=1e-6)
    narrow = jax.eval_shape(nys.models.sentence_vectors, hidden.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.float32
    slope = jax.grad(lambda h: nys.models.sentence_vectors(h, jnp.asarray(mask)).sum())(hidden)
    assert np.isfinite(slope).all()
