"""The backward pass of models: what it reads, its derivatives, and forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import MODELS, saved

import nyscaled as nys
from nyscaled.models import blocks

TOKENS = jnp.ones((3, 5), int)
TARGETS = {"llama": ".*[qv]_proj", "opt": ".*[qv]_proj", "bert_encoder": ".*(query|value)"}
# Numbers per token and layer, of a width of 16: the layer's input; queries, keys, values; the sum
# before each norm that is not the next layer's input; inside of the MLP (24).
KEPT = {
    "llama": 16 + (16 + 8 + 8) + 16 + 2 * 24,
    "opt": 16 + 3 * 16 + 16 + 24,
    "bert_encoder": 16 + 3 * 16 + 2 * 16 + 24,
}


def adapted(name, dtype=jnp.float32, **options):
    """The loss of adapters whose products are not zero, and these."""
    model, _ = nys.models.load(MODELS / name, dtype=dtype, **options)
    nys.lora.apply(model, 2, targets=TARGETS[name], key=jax.random.key(0))
    graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    adapters = jax.tree.map(lambda x: x + jnp.asarray(0.1, x.dtype), adapters)

    def loss(adapters, tokens=TOKENS, mask=None):
        out = nnx.merge(graphdef, adapters, base, copy=True)(tokens, mask)
        out = out if mask is None else jnp.where(mask[..., None], out, 0)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return loss, adapters


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_what_the_backward_pass_reads(name, remat):
    """Each layer's products, or its input alone; nothing between them."""
    loss, adapters = adapted(name, remat=remat)
    read = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(loss, a)[1], adapters))
    stacked = [x.shape for x in read if x.shape[:3] == (3, *TOKENS.shape)]
    assert sum(map(np.prod, stacked)) == (16 if remat else KEPT[name]) * 3 * TOKENS.size


@pytest.mark.parametrize("name", KEPT)
def test_both_modes_agree(name):
    loss, adapters = adapted(name)
    tokens, mask = saved(name)["tokens"], saved(name)["mask"]
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    change = tree.unflatten(
        jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)
    )

    def both(adapters):
        gradient = jax.grad(loss)(adapters, tokens, mask)
        inner = jax.tree.map(jnp.vdot, gradient, change)
        along = lambda a: loss(a, tokens, mask)  # noqa: E731
        return sum(jax.tree.leaves(inner)), jax.jvp(along, (adapters,), (change,))[1]

    backward, forward = jax.jit(both)(adapters)
    np.testing.assert_allclose(backward, forward, rtol=1e-4)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same(f, reference, *inputs):
    """Values and gradients of a sum in which each number has a weight of its own."""

    def weighted(fn):
        def sum_(*inputs):
            out = fn(*inputs)
            return jnp.sum(out * jnp.arange(1.0, 1 + out.size).reshape(out.shape)) / out.size

        return jax.jit(lambda *x: (fn(*x), jax.grad(sum_, tuple(range(len(x))))(*x)))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        weighted(f)(*inputs),
        weighted(reference)(*inputs),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [None, (2, 1, 1, 5), (2, 1, 5, 5), (5, 5)])
def test_attention_is_that_of_jax(groups, causal, shape):
    query, key, value = (
        normal(0, 2, 5, 4, 6),
        normal(1, 2, 5, groups, 6),
        normal(2, 2, 5, groups, 6),
    )
    mask = None if shape is None else jax.random.bernoulli(jax.random.key(3), 0.6, shape)

    def reference(query, key, value):
        visible = mask if shape is None or mask.ndim == 4 else mask[None, None]
        out = jax.nn.dot_product_attention(query, key, value, mask=visible, is_causal=causal)
        return out.reshape(2, 5, -1)

    def ours(query, key, value):
        return blocks.attend(query, key, value, mask, causal=causal)

    assert_same(ours, reference, query, key, value)


def test_attention_to_nothing_is_finite():
    query = normal(0, 1, 2, 1, 4)
    out = blocks.attend(query, query, query, jnp.zeros((1, 1, 1, 2), bool), causal=True)
    assert np.isfinite(out).all()


def test_what_is_hidden_stays_so_beside_very_small_logits():
    query = jnp.full((1, 1, 1, 4), 1e3)
    value = normal(0, 1, 2, 1, 4)
    seen = jnp.array([[True, False]])
    out = blocks.attend(query, jnp.full((1, 2, 1, 4), -1e3), value, seen, causal=False)
    np.testing.assert_array_equal(out[0, 0], value[0, 0, 0])


def test_gelu_is_that_of_jax():
    x = jnp.concatenate([3 * normal(0, 200), jnp.array([-40.0, -1e4, 0.0, 1e-30, 40.0, 1e4])])
    assert_same(blocks.gelu, lambda x: jax.nn.gelu(x, approximate=False), x)
    narrow = x.astype(jnp.bfloat16)
    wide = blocks.gelu(narrow.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(blocks.gelu(narrow), wide)


def abstract(depth, compute_dtype):
    """The parts of a LLaMA in bfloat16 with adapters, and the bytes of its layers."""
    config = nys.models.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )

    def make():
        numerics = blocks.Numerics(jnp.bfloat16, compute_dtype)
        model = nys.models.Llama(config, numerics=numerics, rngs=nnx.Rngs(0))
        nys.lora.apply(model, 2, targets=TARGETS["llama"], key=jax.random.key(0))
        return model

    parts = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    return parts, sum(2 * x.size for x in jax.tree.leaves(parts[2]) if x.ndim == 3)


def temporary(fn, *inputs):
    """Bytes that a program takes beside its arguments and results."""
    return jax.jit(fn).lower(*inputs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.long
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others compute with bfloat16")
@pytest.mark.parametrize("compute_dtype", [jnp.bfloat16, jnp.float32])
def test_a_narrow_base_is_widened_a_layer_at_a_time(compute_dtype):
    taken, layers = [], []
    for depth in (8, 16):
        (graphdef, adapters, base), size = abstract(depth, compute_dtype)

        def loss(adapters, base, graphdef=graphdef):
            out = nnx.merge(graphdef, adapters, base, copy=True)(TOKENS[:1])
            return jnp.sum(out.astype(jnp.float32) ** 2)

        taken.append(temporary(jax.grad(loss), adapters, base))
        layers.append(size)
    # What is kept for the backward pass is a tenth of it; in float32 the layers alone would be 2.
    assert taken[1] - taken[0] < 0.2 * (layers[1] - layers[0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others compute with bfloat16")
def test_a_narrow_cache_is_widened_a_layer_at_a_time():
    (graphdef, *states), _ = abstract(8, jnp.bfloat16)
    cache = jax.eval_shape(lambda s: nnx.merge(graphdef, *s).new_cache(1, 4096), states)

    def following(states, cache):
        return nnx.merge(graphdef, *states, copy=True).hidden(TOKENS[:1, :1], None, cache)[0]

    assert temporary(following, states, cache) < 2 * cache.keys.size  # the bytes of the keys


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_stack_has_the_derivatives_of_its_layers(dtype):
    kernels, x = normal(0, 3, 4, 4).astype(dtype), normal(1, 2, 3, 4).astype(dtype)
    graphdef, state = nnx.split(
        blocks.stack(
            lambda rngs: nnx.Linear(4, 4, use_bias=False, dtype=dtype, rngs=rngs), 3, nnx.Rngs(0)
        )
    )

    def scanned(kernels, x):
        layers = nnx.merge(graphdef, jax.tree.map(lambda _: kernels, state))
        return jnp.sum(jnp.sin(blocks.run(layers, x, remat=False).astype(jnp.float32)))

    def looped(kernels, x):
        for kernel in kernels:
            x = x @ kernel
        return jnp.sum(jnp.sin(x.astype(jnp.float32)))

    got, reference = (jax.grad(fn, (0, 1))(kernels, x) for fn in (scanned, looped))
    for a, b in zip(got, reference, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0.05, atol=0.05)
