"""Heads, embeddings and norms in adapter folders: adapted, or saved whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from model_cases import call, expected, load
from peft_cases import CONFIG, TENSORS

import nyscaled as nys
from nyscaled.checkpoints import peft

KEY = jax.random.key(0)
TIED = ["gemma", "opt"]
DECODERS = ["llama", *TIED]


def moved(model, *kinds):
    """Moves the adapters and the parameters at some paths, as training would."""
    rng = np.random.default_rng(0)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        if isinstance(value, nnx.LoRAParam) or any(kind in path for kind in kinds):
            value[...] += jnp.asarray(0.1 * rng.standard_normal(value.shape), value.dtype)
    return model


def save(model, folder, **options):
    nys.lora.save_peft(model, folder, base_model="mine", **options)
    return safetensors.numpy.load_file(folder / TENSORS)


def again(folder, name):
    model = load(name)
    nys.lora.load_peft(model, folder)
    return model


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("init", ["lora", "olora"])
@pytest.mark.parametrize("name", DECODERS)
def test_heads_and_embeddings_are_adapted(name, init, tmp_path):
    model, (tokens, mask, logits) = load(name), expected(name)
    if name in TIED:
        with pytest.raises(ValueError, match=r"the head is the embedding \(model\.untie"):
            nys.lora.apply(model, 2, targets="lm_head", key=KEY)
        model.untie()
        np.testing.assert_allclose(call(model, tokens, mask)[mask], logits[mask], atol=1e-4)
    with pytest.raises(ValueError, match="pass embeddings=True"):
        nys.lora.apply(model, 2, targets="embed_tokens", key=KEY)
    before = call(model, tokens, mask)
    targets = "lm_head|embed_tokens"
    layers = nys.lora.apply(model, 2, 3.0, targets=targets, init=init, key=KEY, embeddings=True)
    assert set(layers) == {"lm_head", "embed_tokens"}
    np.testing.assert_array_equal(call(model, tokens, mask), before)
    moved(model)
    reference = call(model, tokens, mask)
    assert jnp.max(jnp.abs(reference - before)[mask]) > 0.01
    embed = model.embed_tokens
    a, b = (getattr(embed.adapters["default"], side)[...] for side in ("lora_a", "lora_b"))
    if init == "lora":
        rows = embed.embedding[...] + 1.5 * a @ b
        np.testing.assert_allclose(embed(tokens), rows[tokens], atol=1e-5)
    tensors = save(model, tmp_path)
    embedding = next(k for k in tensors if k.endswith("embed_tokens.lora_embedding_A"))
    assert tensors[embedding].shape[1] == model.config.vocab_size
    assert "base_model.model.lm_head.lora_B.weight" in tensors
    loaded = again(tmp_path, name)
    np.testing.assert_allclose(call(loaded, tokens, mask)[mask], reference[mask], atol=1e-5)
    nys.lora.merge(model)
    np.testing.assert_allclose(call(model, tokens, mask)[mask], reference[mask], atol=1e-5)


@pytest.mark.parametrize("name", TIED)
def test_an_adapted_embedding_leaves_the_tied_head_and_is_not_merged(name, tmp_path):
    model, (tokens, mask, _) = load(name), expected(name)
    nys.lora.apply(model, 2, targets="embed_tokens", key=KEY, embeddings=True)
    moved(model)
    save(model, tmp_path)
    loaded = again(tmp_path, name)
    assert loaded.config.tie_word_embeddings
    reference = call(model, tokens, mask)
    np.testing.assert_array_equal(call(loaded, tokens, mask)[mask], reference[mask])
    with pytest.raises(ValueError, match=r"expected a head of its own before merging"):
        nys.lora.merge(model)
    model.untie()
    nys.lora.merge(model)
    np.testing.assert_allclose(call(model, tokens, mask)[mask], reference[mask], atol=1e-5)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("name", DECODERS)
def test_layers_of_any_kind_are_saved_whole(name, tmp_path):
    model, (tokens, mask, _) = load(name), expected(name)
    inside = ["self_attn_layer_norm", "final_layer_norm"] if name == "opt" else ["input_layernorm"]
    paths = ["embed_tokens", "final_layer_norm" if name == "opt" else "norm"]
    paths += [f"layers.{end}" for end in (*inside, "fc1" if name == "opt" else "mlp")]
    paths += [] if name in TIED else ["lm_head"]
    nys.lora.apply(model, 2, targets=r".*q_proj", key=KEY)
    moved(model, *(path.split(".")[-1] for path in paths))
    tensors = save(model, tmp_path, modules_to_save=paths)
    assert sum(f".layers.1.{inside[0]}.weight" in key for key in tensors) == 1
    # PEFT would tear a tied head from its embedding, which are therefore written both.
    assert "base_model.model.lm_head.weight" in tensors
    loaded = again(tmp_path, name)
    assert loaded.config == load(name).config
    np.testing.assert_array_equal(call(loaded, tokens, mask), call(model, tokens, mask))


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_that_peft_tore_off_gets_weights_of_its_own(name, tmp_path):
    model, (tokens, mask, _) = load(name), expected(name)
    model.untie()
    nys.lora.apply(model, 2, targets=r".*q_proj", key=KEY)
    moved(model, "lm_head")
    save(model, tmp_path, modules_to_save=["lm_head"])
    loaded = again(tmp_path, name)
    assert not loaded.config.tie_word_embeddings
    np.testing.assert_array_equal(call(loaded, tokens, mask), call(model, tokens, mask))
    np.testing.assert_array_equal(
        loaded.embed_tokens.embedding[...], load(name).embed_tokens.embedding[...]
    )
    # What is not there is refused, and then the head is still the embedding.
    tied = load(name)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(
        json.dumps(config | {"modules_to_save": ["lm_head", "embed_tokens"]})
    )
    with pytest.raises(ValueError, match=r"only one of them has .*embed_tokens\.weight"):
        nys.lora.load_peft(tied, tmp_path)
    assert tied.config.tie_word_embeddings
    assert not hasattr(tied, "lm_head")


def written(folder, whole, name="llama", extra=None, **fields):
    """A folder with an adapter of one layer, and tensors beside it."""
    model = load(name)
    _, width, out = model.layers.self_attn.q_proj.kernel.shape
    update = peft.Update(np.ones((1, width), "f"), np.ones((out, 1), "f"), 1.0)
    peft.write(folder, {"model.layers.0.self_attn.q_proj": update}, base_model="x", whole=whole)
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    for key, value in (extra or {}).items():
        tensors[f"base_model.model.{key}"] = value
    safetensors.numpy.save_file(tensors, folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"modules_to_save": None} | fields))


def table(name="llama", seed=0):
    shape = load(name).embed_tokens.embedding.shape
    return np.random.default_rng(seed).standard_normal(shape).astype("f")


def test_what_peft_saves_of_the_base_is_loaded(tmp_path):
    """`save_embedding_layers`: weights of embeddings and heads, inside of its wrappers too."""
    first, second = table(seed=1), table(seed=2)
    written(tmp_path, None, extra={"model.embed_tokens.weight": first, "lm_head.weight": second})
    model = again(tmp_path, "llama")
    np.testing.assert_array_equal(model.embed_tokens.embedding[...], first)
    np.testing.assert_array_equal(model.lm_head.kernel[...], second.T)
    wrapped = {
        "lm_head.weight": second,
        "lm_head.modules_to_save.weight": second,
        "lm_head.original_module.weight": first,
    }
    written(tmp_path, None, extra=wrapped, modules_to_save=["lm_head"])
    np.testing.assert_array_equal(again(tmp_path, "llama").lm_head.kernel[...], second.T)
    written(tmp_path, None, extra=wrapped | {"lm_head.modules_to_save.weight": first})
    with pytest.raises(ValueError, match=r"lm_head\.weight twice"):
        again(tmp_path, "llama")
    written(tmp_path, None, extra={"model.norm.weight": np.ones(16, "f")})
    with pytest.raises(ValueError, match=r"only one of them has model\.norm\.weight"):
        again(tmp_path, "llama")


def test_rows_of_tokens(tmp_path):
    rows = table(seed=3)[:2]
    delta = {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    for indices in ([5, 3], {"embed_tokens": [5, 3]}):
        written(tmp_path, None, extra=delta, trainable_token_indices=indices)
        model = again(tmp_path, "llama")
        np.testing.assert_array_equal(model.embed_tokens.embedding[...][jnp.array([5, 3])], rows)
        np.testing.assert_array_equal(
            model.embed_tokens.embedding[...][:3], load("llama").embed_tokens.embedding[...][:3]
        )
    for extra, indices, match in [
        (delta, [5], "expected a row for each"),
        (delta, [5, 10**6], "expected a row for each"),
        (delta, [5, -1], "expected a row for each"),
        (delta, [5, 5], "distinct integers"),
        (delta, {"embed_tokens": 5}, "distinct integers"),
        (delta, None, "one without the other"),
        ({}, [5, 3], "one without the other"),
        (
            {"model.norm.token_adapter.trainable_tokens_delta": rows},
            [5, 3],
            "not an embedding here",
        ),
        (delta, {"embed_tokens": [5, 3], "lm_head": [1]}, "no rows of the .* of lm_head"),
    ]:
        written(tmp_path, None, extra=extra, trainable_token_indices=indices)
        with pytest.raises(ValueError, match=match):
            again(tmp_path, "llama")


def test_rows_of_a_tied_head_leave_the_embedding(tmp_path):
    rows, before = np.ones((2, 16), "f"), load("gemma").embed_tokens.embedding[...]
    indices = {"embed_tokens": [5, 3], "lm_head": [1]}
    extra = {
        "model.embed_tokens.token_adapter.trainable_tokens_delta": rows,
        "lm_head.token_adapter.trainable_tokens_delta": 2 * rows[:1],
    }
    written(tmp_path, None, "gemma", extra, trainable_token_indices=indices)
    model = again(tmp_path, "gemma")
    embedding, head = model.embed_tokens.embedding[...], model.lm_head.kernel[...].T
    np.testing.assert_array_equal(embedding, before.at[jnp.array([5, 3])].set(1))
    np.testing.assert_array_equal(head, before.at[1].set(2))
    # Of both the same: PEFT saves the embedding's, and the weights stay tied.
    extra.pop("lm_head.token_adapter.trainable_tokens_delta")
    indices = {"embed_tokens": [5, 3], "lm_head": [5, 3]}
    written(tmp_path, None, "gemma", extra, trainable_token_indices=indices)
    assert again(tmp_path, "gemma").config.tie_word_embeddings


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda t: t[:-1], "resize_token_embeddings first"),
        (lambda t: t.astype("f8") * 1e300, "finite in .* and not in float32"),
        (lambda t: t.astype(int), "int64 tensors"),
        (lambda t: t * np.nan, "NaN or Inf"),
    ],
)
def test_whole_tensors_refused(value, match, tmp_path):
    written(tmp_path, None, extra={"lm_head.weight": value(table())}, modules_to_save=["lm_head"])
    model = load("llama")
    with pytest.raises(ValueError, match=match):
        nys.lora.load_peft(model, tmp_path)
    assert not nys.lora.adapted_layers(model)


def test_modules_to_save_refused(tmp_path):
    model = load("gemma")
    nys.lora.apply(model, 2, targets=".*q_proj", key=KEY)
    for path, match in [
        ("lm_head", "the head is the embedding"),
        ("nothing", "expected the path of a layer"),
        ("layers.self_attn", "expected a layer without adapters"),
    ]:
        with pytest.raises(ValueError, match=match):
            save(model, tmp_path, modules_to_save=[path])
    with pytest.raises(ValueError, match="modules_to_save is 'norm'; expected a sequence of paths"):
        save(model, tmp_path, modules_to_save="norm")
    save(model, tmp_path, modules_to_save=None)


def test_a_norm_is_meant_by_the_end_of_its_name(tmp_path):
    """PEFT's modules_to_save=["norm"] are the norms of all layers too."""
    model = load("llama")
    nys.lora.apply(model, 2, targets=".*q_proj", key=KEY)
    moved(model, "norm", "input_layernorm")
    paths = ["norm", "layers.input_layernorm", "layers.post_attention_layernorm"]
    save(model, tmp_path, modules_to_save=paths)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["norm"]}))
    tokens, mask, _ = expected("llama")
    loaded = again(tmp_path, "llama")
    np.testing.assert_array_equal(call(loaded, tokens, mask), call(model, tokens, mask))


class Headed(nnx.Module):
    """Two layers of which the name of one ends with that of the other, and one inside a third."""

    def __init__(self):
        self.head, self.pre_head, self.fc = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(3))
        self.decoder = nnx.Dict(head=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))


def test_layers_that_peft_takes_for_a_saved_one_are_saved_too(tmp_path):
    model = Headed()
    nys.lora.apply(model, 2, targets="fc", key=KEY)
    tensors = save(model, tmp_path, modules_to_save=["head"])
    assert "base_model.model.pre_head.weight" in tensors
    assert "base_model.model.decoder.head.bias" in tensors
    nys.lora.load_peft(Headed(), tmp_path)
    model = Headed()
    nys.lora.apply(model, 2, targets="decoder.head", key=KEY)
    with pytest.raises(ValueError, match=r"decoder\.head of modules_to_save is a LoRALinear"):
        save(model, tmp_path, modules_to_save=["head"])


def test_an_update_that_peft_leaves_out_is_not_written(tmp_path):
    update = peft.Update(np.ones((2, 4), "f"), np.ones((4, 2), "f"), 2.0)
    whole = {"head.weight": np.ones((4, 4), "f")}
    with pytest.raises(
        ValueError, match=r"decoder\.head\.fc of modules_to_save has an adapter, or"
    ):
        peft.write(tmp_path, {"decoder.head.fc": update}, base_model="mine", whole=whole)
