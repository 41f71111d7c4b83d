"""A base and an adapter as one folder: what `export` writes is the model merged in memory."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from training_cases import write_model

import nyscaled as nys
from nyscaled.cli import main
from nyscaled.finetune import described, identity, merging
from nyscaled.models import BertClassifier

CLASSES = ("no", "maybe", "yes")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of two bases."""
    folder = tmp_path_factory.mktemp("export")
    write_model(folder / "llama")
    write_model(folder / "bert", "bert_encoder")
    return folder


def adapted(model, folder, targets, init="lora", embeddings=False, **options):
    """Put adapters whose update is not zero into a model, and save them."""
    key = jax.random.key(1)
    layers = nys.lora.apply(
        model, rank=2, alpha=3, targets=targets, init=init, embeddings=embeddings, key=key
    )
    for layer in layers.values():
        b = layer.adapters["default"].lora_b
        b[...] += jax.random.normal(jax.random.key(2), b.shape)
    nys.lora.save_peft(model, folder, base_model="base", **options)
    return model


def assert_same(model, folder):
    """The parameters of a model, and those that a folder holds."""
    read = nys.models.load(folder)[0]
    expected = dict(nnx.to_flat_state(nnx.state(model)))
    values = dict(nnx.to_flat_state(nnx.state(read)))
    assert values.keys() == expected.keys()
    for path, value in values.items():
        np.testing.assert_allclose(value[...], expected[path][...], rtol=1e-5, atol=1e-6)
    return read


@pytest.mark.parametrize(
    ("init", "targets"),
    [("lora", r".*(embed_tokens|[qo]_proj)"), ("pissa", r".*(lm_head|down_proj)")],
)
def test_a_merged_folder_is_the_model_merged_in_memory(root, tmp_path, init, targets, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK", 40)  # so that a tensor is merged in several parts
    base, adapter, out = root / "llama", tmp_path / "adapter", tmp_path / "out"
    model, tokenizer = nys.models.load(base)
    adapted(model, adapter, targets, init)
    words = ["--model", base, "--adapter", adapter, "--out", out]
    assert main(["export", *map(str, words)]) == 0
    nys.lora.merge(model)
    nys.lora.remove(model)
    assert_same(model, out)
    assert nys.models.load(out)[1].get_vocab() == tokenizer.get_vocab()
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())
    sizes = [
        sum(value.nbytes for value in safetensors.numpy.load_file(path).values())
        for path in out.glob("*.safetensors")
    ]
    assert len(sizes) > 2
    largest = max(
        x.nbytes for x in safetensors.numpy.load_file(base / "model.safetensors").values()
    )
    assert max(sizes) == largest


def test_the_update_of_a_head_that_is_saved_beside_its_factors_is_added(root, tmp_path):
    """PEFT saves the weights of a targeted head or embedding too."""
    base, adapter = root / "llama", tmp_path / "adapter"
    adapted(nys.models.load(base)[0], adapter, "lm_head|embed_tokens", embeddings=True)
    own = safetensors.numpy.load_file(base / "model.safetensors")
    path = adapter / "adapter_model.safetensors"
    values = safetensors.numpy.load_file(path)
    for name in ("lm_head", "model.embed_tokens"):
        values[f"base_model.model.{name}.base_layer.weight"] = own[f"{name}.weight"] + 1
    safetensors.numpy.save_file(values, path, metadata={"format": "pt"})
    done = nys.finetune.export(base, adapter, tmp_path / "out")
    assert (done.merged, done.replaced) == (2, 2)
    model = nys.models.load(base)[0]
    nys.lora.load_peft(model, adapter)
    nys.lora.merge(model)
    nys.lora.remove(model)
    assert_same(model, tmp_path / "out")


def test_a_narrow_base_stays_narrow(root, tmp_path):
    base, adapter = tmp_path / "narrow", tmp_path / "adapter"
    nys.models.save(nys.models.load(root / "llama", dtype=jnp.bfloat16)[0], base)
    model = adapted(nys.models.load(base)[0], adapter, ".*q_proj")  # in float32, of its values
    nys.finetune.export(base, adapter, tmp_path / "out")
    nys.lora.merge(model)
    values, expected = (
        x.layers.self_attn.q_proj.kernel[...] for x in (nys.models.load(tmp_path / "out")[0], model)
    )
    np.testing.assert_allclose(values, expected, rtol=2**-8)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_each_tensor_keeps_its_dtype(root, tmp_path):
    """In a base of float32, bfloat16 and float16 at once."""
    base, adapter = tmp_path / "mixed", tmp_path / "adapter"
    shutil.copytree(root / "llama", base)
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    dtypes = {
        name: np.float32 if "norm" in name else np.float16 if "mlp" in name else jnp.bfloat16
        for name in tensors
    }
    mixed = {name: value.astype(dtypes[name]) for name, value in tensors.items()}
    safetensors.numpy.save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    model = adapted(nys.models.load(base)[0], adapter, ".*(q_proj|up_proj)")
    nys.finetune.export(base, adapter, tmp_path / "out")
    written = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= safetensors.numpy.load_file(path)
    assert {name: value.dtype for name, value in written.items()} == dtypes
    nys.lora.merge(model)
    read = nys.models.load(tmp_path / "out")[0]
    for layer, own in (("self_attn.q_proj", 2**-8), ("mlp.up_proj", 2**-11)):
        values, expected = (
            nnx.state(x)["layers"][layer.split(".")[0]][layer.split(".")[1]]["kernel"][...]
            for x in (read, model)
        )
        np.testing.assert_allclose(values, expected, rtol=own)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("part", ["head", "update"])
def test_values_that_the_dtype_of_the_base_does_not_hold_are_refused(root, tmp_path, part):
    base, adapter = tmp_path / "narrow", tmp_path / "adapter"
    nys.models.save(nys.models.load(root / "bert", dtype=jnp.float16)[0], base)
    model = BertClassifier(nys.models.load(root / "bert")[0], CLASSES, rngs=nnx.Rngs(3))
    if part == "head":
        model.classifier.kernel[...] += 1e5
    head = {"modules_to_save": ["classifier", "bert.pooler"], "task_type": "SEQ_CLS"}
    adapted(model, adapter, ".*query", **head)
    if part == "update":
        path = adapter / "adapter_model.safetensors"
        values = safetensors.numpy.load_file(path)
        large = {k: 1e3 * v if "lora" in k else v for k, v in values.items()}
        safetensors.numpy.save_file(large, path, metadata={"format": "pt"})
    what = "classifier.weight of the adapter" if part == "head" else "query.weight with its update"
    with pytest.raises(ValueError, match=f"{what} is not finite in float16"):
        nys.finetune.export(base, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_changes_a_tied_embedding_is_written_from_memory(root, tmp_path):
    """By the calls that the message names."""
    base, adapter = tmp_path / "tied", tmp_path / "adapter"
    write_model(base, "gemma")
    adapted(nys.models.load(base)[0], adapter, "embed_tokens", embeddings=True)
    steps = "load_peft, model.untie.., nys.lora.merge, nys.lora.remove and nys.models.save"
    with pytest.raises(ValueError, match=f"expected nys.lora.{steps}"):
        nys.finetune.export(base, adapter, tmp_path / "out")
    model = nys.models.load(base)[0]
    nys.lora.load_peft(model, adapter)
    tokens = np.arange(1, 9)[None]
    expected = model(tokens)
    model.untie()
    nys.lora.merge(model)
    nys.lora.remove(model)
    nys.models.save(model, tmp_path / "out")
    read = assert_same(model, tmp_path / "out")
    np.testing.assert_allclose(read(tokens), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_tokens_are_written_from_memory(root, tmp_path):
    base, adapter = root / "llama", tmp_path / "adapter"
    adapted(nys.models.load(base)[0], adapter, ".*q_proj")
    path = adapter / "adapter_model.safetensors"
    values = safetensors.numpy.load_file(path)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    width = nys.models.load(base)[0].config.hidden_size
    values[name] = np.ones((1, width), np.float32)
    safetensors.numpy.save_file(values, path, metadata={"format": "pt"})
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"trainable_token_indices": {"embed_tokens": [3]}}
    config.write_text(json.dumps(fields))
    steps = "load_peft, nys.lora.merge, nys.lora.remove and nys.models.save"
    with pytest.raises(ValueError, match=f"rows of single tokens; expected nys.lora.{steps}"):
        nys.finetune.export(base, adapter, tmp_path / "out")
    model = nys.models.load(base)[0]
    nys.lora.load_peft(model, adapter)
    nys.lora.merge(model)
    nys.lora.remove(model)
    nys.models.save(model, tmp_path / "out")
    read = assert_same(model, tmp_path / "out")
    np.testing.assert_array_equal(read.embed_tokens.embedding[...][3], np.ones(width))


def test_an_encoder_gets_its_head(root, tmp_path):
    encoder = nys.models.load(root / "bert")[0]
    model = BertClassifier(encoder, CLASSES, rngs=nnx.Rngs(3))
    head = {"modules_to_save": ["classifier", "bert.pooler"], "task_type": "SEQ_CLS"}
    adapter = tmp_path / "adapter"
    adapted(model, adapter, ".*query", **head)
    task = nys.finetune.TASKS["classification"]
    task = described.with_classes(task, {"classes": [*CLASSES]})
    described.write(adapter, described.of_task(task, None, encoder=True, tokenizer=None))
    done = nys.finetune.export(root / "bert", adapter, tmp_path / "out")
    assert done.replaced == 4
    nys.lora.merge(model)
    nys.lora.remove(model)
    assert assert_same(model, tmp_path / "out").config.labels == CLASSES
    (adapter / described.FILE).unlink()
    nys.finetune.export(root / "bert", adapter, tmp_path / "unnamed")
    labels = nys.models.load(tmp_path / "unnamed")[0].config.labels
    assert labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_what_is_refused(root, tmp_path):
    base, adapter = root / "llama", tmp_path / "adapter"
    adapted(nys.models.load(base)[0], adapter, ".*q_proj")
    with pytest.raises(ValueError, match="which the model does not have"):
        nys.finetune.export(root / "bert", adapter, tmp_path / "out")
    identity.write_base(adapter, identity.of_base(root / "bert"))
    with pytest.raises(ValueError, match="is not the base of"):
        nys.finetune.export(base, adapter, tmp_path / "out")
    (adapter / identity.FILE).unlink()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists; expected a new folder"):
        nys.finetune.export(base, adapter, tmp_path)
    (adapter / "prefix.safetensors").touch()
    with pytest.raises(ValueError, match="has a prefix, which is added to no tensor of a base"):
        nys.finetune.export(base, adapter, tmp_path / "out")


@pytest.mark.long
def test_transformers_reads_an_export(root, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = adapted(nys.models.load(root / "llama")[0], tmp_path / "adapter", ".*q_proj")
    nys.finetune.export(root / "llama", tmp_path / "adapter", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = np.arange(1, 9)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(tokens), expected, rtol=1e-4, atol=1e-4)
