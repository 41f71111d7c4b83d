"""Models that are read straight onto a mesh: the logits, steps and files of one device."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nyscaled as nys

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
BOTH, FSDP, TENSOR = (("fsdp", 4), ("tensor", 2)), (("fsdp", 8),), (("tensor", 8),)
CASES = [
    ("llama", BOTH),
    ("gemma", TENSOR),
    ("opt", FSDP),
    ("qwen2_window", BOTH),
    ("bert_encoder", BOTH),
]


def make_mesh(axes, kind=AxisType.Auto):
    names, sizes = zip(*axes, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(axes))


@functools.cache
def loaded(name, axes):
    """The model on a mesh, or on one device."""
    return nys.models.load(MODELS / name, mesh=axes and make_mesh(axes))[0]


def batch(name, axes=None):
    """Eight rows of tokens, their mask and what else a model takes; then transformers' output."""
    saved = safetensors.numpy.load_file(MODELS / name / "expected.safetensors")
    rows = {key: value[np.arange(8) % len(value)] for key, value in saved.items()}
    inputs = [rows["tokens"], rows["mask"] > 0, *(rows[k] for k in rows if k == "types")]
    if axes is not None:
        spec = P("fsdp") if "fsdp" in dict(axes) else P()
        inputs = jax.device_put(inputs, NamedSharding(make_mesh(axes), spec))
    return inputs, rows["hidden" if "hidden" in rows else "logits"]


def state(model):
    return dict(nnx.to_flat_state(nnx.state(model)))


@pytest.mark.parametrize(("name", "axes"), CASES)
def test_logits_are_those_of_transformers(name, axes):
    model = loaded(name, axes)
    for path, value in state(model).items():
        held = {shard.data.nbytes for shard in value[...].addressable_shards}
        parts = 8 if path[-1] in ("kernel", "embedding") else 1
        assert held == {value[...].nbytes // parts}, path
    inputs, expected = batch(name, axes)
    compiled = jax.jit(lambda m, *x: m(*x)).lower(model, *inputs).compile()
    got, seen = compiled(model, *inputs), np.asarray(inputs[1])
    np.testing.assert_allclose(np.asarray(got)[seen], expected[seen], atol=2e-5, rtol=0)
    whole = sum(v[...].nbytes for v in state(model).values())
    assert compiled.memory_analysis().argument_size_in_bytes < whole / 4


@functools.partial(jax.jit, static_argnums=0)
def train(graphdef, params, rest, tokens, mask):
    """Gradient descent on the adapters."""

    def loss(params):
        logits = nnx.merge(graphdef, params, rest, copy=True)(tokens, mask)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(each, where=mask[:, 1:])

    def step(params, _):
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), value

    return jax.lax.scan(step, params, length=4)


def test_steps_on_adapters_are_those_of_one_device():
    found = {}
    for axes in (None, BOTH):
        model = nnx.clone(loaded("llama", axes))
        nys.lora.apply(model, 2, 4, targets=".*[qv]_proj", key=jax.random.key(0), scale=1.0)
        a = model.layers.self_attn.q_proj.adapters["default"].lora_a[...]
        assert a.addressable_shards[0].data.nbytes * (4 if axes else 1) == a.nbytes
        arguments = (*nnx.split(model, nnx.LoRAParam, ...), *batch("llama", axes)[0])
        with jax.set_mesh(make_mesh(axes or (("none", 1),))):
            compiled = train.lower(*arguments).compile()
        _, found[axes] = compiled(*arguments[1:])
    # The batch, 8 rows of 7 tokens, is split: no device has the logits of more than two rows.
    logits = r"f32\[(?:\d+,)*?8,7,(?:32|16)\]"
    assert not re.search(logits, compiled.as_text())
    assert found[None][-1] < found[None][0] - 1e-3
    np.testing.assert_allclose(found[BOTH], found[None], rtol=1e-5)


def test_files_from_a_mesh_are_those_from_one_device(tmp_path):
    for folder, axes in (("one", None), ("mesh", BOTH)):
        nys.models.save(loaded("llama", axes), tmp_path / folder, max_shard_size=4096)
    one, mesh = (
        {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
        for folder in ("one", "mesh")
    )
    assert len(one) > 4
    assert one == mesh


def test_what_the_mesh_does_not_divide_stays_whole():
    model = loaded("llama", None)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("fsdp", "tensor"))
    found = nys.models.shardings(model, mesh)
    specs = {
        path[-2]: tuple(sharding.get_value().spec) for path, sharding in nnx.to_flat_state(found)
    }
    assert specs["q_proj"] == (None, "fsdp", None)  # (3 layers, 16, 16)
    assert specs["up_proj"] == (None, "fsdp", "tensor")  # (3, 16, 24)
    assert specs["down_proj"] == (None, "tensor", "fsdp")
    assert specs["embed_tokens"] == (None, "fsdp")  # (32, 16)
    assert specs["norm"] == (None,)


def test_meshes_that_are_refused():
    explicit = make_mesh(BOTH, AxisType.Explicit)
    with pytest.raises(ValueError, match="expected Auto ones"):
        nys.models.load(MODELS / "llama", mesh=explicit)
    with pytest.raises(ValueError, match=r"has the axes \('rows',\); expected 'fsdp' or 'tensor'"):
        nys.models.load(MODELS / "llama", mesh=make_mesh((("rows", 8),)))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_new_tokens_and_adapters_of_the_embedding_lie_as_the_model_does(name, tmp_path):
    """Of a file that has them, on the mesh and on one device."""
    made, tokens = {}, batch(name)[0][0]
    for where, axes in (("mesh", BOTH), ("one", None)):
        model = nnx.clone(loaded(name, axes))
        model.untie()
        size = model.config.vocab_size
        nys.models.resize_token_embeddings(model, size + 8)
        options = {"targets": "lm_head|embed_tokens", "embeddings": True, "key": jax.random.key(0)}
        nys.lora.apply(model, 2, init="pissa", **options)
        for part in ("embed_tokens", "lm_head"):
            adapter = getattr(model, part).adapters["default"]
            adapter.lora_b[...] = 2 * adapter.lora_b[...]
        folder = tmp_path / where
        whole = ["norm", "layers.mlp"]
        nys.lora.save_peft(model, folder, base_model="x", modules_to_save=whole)
        again = nnx.clone(loaded(name, axes))
        again.untie()
        nys.models.resize_token_embeddings(again, size + 8)
        nys.lora.load_peft(again, folder)
        for path, value in state(again).items():
            if path[-1] in ("kernel", "embedding"):
                parts = 8 if axes else 1
                held = {shard.data.nbytes for shard in value[...].addressable_shards}
                assert held == {value[...].nbytes // parts}, path
        made[where] = [np.asarray(jax.jit(lambda m, t: m(t))(m, tokens)) for m in (model, again)]
    for got in (*made["mesh"], made["one"][1]):
        np.testing.assert_allclose(got, made["one"][0], atol=1e-4)
