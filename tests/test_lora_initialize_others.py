"""Filling the adapters of flax, qwix and gemma, and those in plain trees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from lora_cases import KEY, M, N, R, apply, inputs, kernel

import nyscaled as nys
from nyscaled.lora import inits

X = jax.random.normal(jax.random.key(3), (5, M))


# --- Adapters of flax and qwix, in NNX -----------------------------------------------------------


def flax_model():
    rngs = nnx.Rngs(0)
    base = nnx.Linear(N, 6, rngs=rngs)
    return nnx.Sequential(
        nnx.LoRALinear(M, N, lora_rank=R, rngs=rngs), nnx.LoRA(N, R, 6, base_module=base, rngs=rngs)
    )


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("init", ["nora", "pissa", "olora"])
def test_adapters_of_flax(init):
    model = flax_model()
    expected, w = model(X), model.layers[0].kernel[...]
    assert nys.lora.initialize(model, init, key=KEY) == ["layers.0", "layers.1"]
    np.testing.assert_allclose(model(X), expected, atol=1e-5)
    lora = model.layers[0].lora
    a = inits.KERNEL_INITS[init](nys.lora.path_key(KEY, "layers.0"), w, R, 1.0).a
    if init != "nora":
        np.testing.assert_allclose(lora.lora_a[...], a, atol=1e-5)
        assert not jnp.array_equal(model.layers[0].kernel[...], w)
    else:
        assert jnp.array_equal(model(X), expected)
        q = jnp.linalg.qr(model.layers[1].base_module.kernel[...])[0]
        a = model.layers[1].lora_a[...]
        np.testing.assert_allclose(q @ (q.T @ a), a, atol=1e-5)


@pytest.mark.long
def test_gradient_starts_of_flax_adapters():
    model = flax_model()
    expected = model(X)
    loss = lambda m, x: jnp.mean((m(x) - 1) ** 2)  # noqa: E731
    nys.lora.initialize(model, "nora_grad", key=KEY, loss=loss, batches=[X])
    assert jnp.array_equal(model(X), expected)


class Dense(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.query = nnx.Einsum("btd,dnh->btnh", (8, 2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.out(self.query(self.up(x)))


def provider(qtype):
    options = {} if qtype is None else {"weight_qtype": qtype}
    return qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0, **options)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("qtype", [None, "int8", "nf4"])
def test_adapters_of_qwix_over_plain_and_quantized_bases(qtype):
    base = Dense(nnx.Rngs(0))
    model = qwix.apply_lora_to_model(base, provider(qtype), inputs(), rngs=nnx.Rngs(1))
    expected = model(inputs())
    assert nys.lora.initialize(model, key=KEY, alpha=4.0) == ["out", "query", "up"]
    assert jnp.array_equal(model(inputs()), expected)
    a, w = model.query.kernel_lora_a[...], base.query.kernel[...].reshape(8, 8)
    sketch = inits.nora(nys.lora.path_key(KEY, "query"), w, 2, 2.0).a
    assert a.shape == sketch.shape
    assert jnp.linalg.matrix_rank(a) == 2
    if qtype is None:
        nys.lora.initialize(model, "pissa", key=KEY, alpha=4.0)
        np.testing.assert_allclose(model(inputs()), expected, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"kernel of .* is quantized.*dequantize it"):
            nys.lora.initialize(model, "pissa", key=KEY, alpha=4.0)


def test_apply_leaves_quantized_layers_to_qwix():
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8")
    model = qwix.quantize_model(Dense(nnx.Rngs(0)), qwix.PtqProvider([rule]), inputs())
    with pytest.raises(ValueError, match=r"was quantized by qwix.*LoraProvider.*`initialize`"):
        apply(model)


# --- Trees ---------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Linen: a scanned stack of layers."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.DenseGeneral(8, axis=(-2, -1))(nn.DenseGeneral((2, 4))(x)), None

        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="layers")(x, None)[0]


@pytest.mark.long
@pytest.mark.parametrize("qtype", [None, "int8"])
def test_linen_with_qwix_stacked(qtype):
    model = qwix.apply_lora_to_model(Stacked(), provider(qtype))
    params = qwix.apply_lora_to_model(Stacked(), provider(None)).init(KEY, inputs())
    if qtype is not None:  # under nn.scan qwix makes no adapters over a quantized kernel
        for name, layer in model.init(KEY, inputs())["params"]["layers"].items():
            params["params"]["layers"][name]["kernel"] = layer["kernel"]
    new = nys.lora.initialize_params(params, key=KEY, alpha=4.0)
    assert jnp.array_equal(model.apply(new, inputs()), model.apply(params, inputs()))
    a = new["params"]["layers"]["DenseGeneral_0"]["kernel_lora_a"]
    assert a.shape == (3, 8, 2)
    assert jnp.linalg.matrix_rank(a).tolist() == [2, 2, 2]
    if qtype is None:
        reduced = nys.lora.initialize_params(params, "pissa", key=KEY, alpha=4.0)
        actual = model.apply(reduced, inputs())
        np.testing.assert_allclose(actual, model.apply(params, inputs()), atol=1e-5)

        def loss(p):
            return jnp.mean((model.apply(p, inputs()) - 1) ** 2)

        new = nys.lora.initialize_params(params, "nora_grad", key=KEY, gradient=jax.grad(loss))
        assert jnp.array_equal(model.apply(new, inputs()), model.apply(params, inputs()))
        assert jnp.any(new["params"]["layers"]["DenseGeneral_0"]["kernel_lora_a"] != a)


def test_names_of_gemma_and_of_plain_trees():
    w = jax.random.normal(KEY, (2, 8, 4))  # N, D, H of 'BTD,NDH->BTNH'
    gemma = {"q": {"w": w, "lora": {"a": jnp.ones((8, 2)), "b": jnp.zeros((2, 2, 4))}}}
    a = nys.lora.initialize_params(gemma, key=KEY)["q"]["lora"]["a"]
    assert jnp.linalg.matrix_rank(a) == 2
    plain = {"kernel": kernel(), "lora_a": jnp.ones((M, R)), "lora_b": jnp.ones((R, N)), "bias": X}
    new = nys.lora.initialize_params(plain, key=KEY)
    assert new["bias"] is plain["bias"]
    assert new["kernel"] is plain["kernel"]
    assert not jnp.any(new["lora_b"])


def test_what_narrow_factors_subtract_is_their_own_product():
    w, (a, b) = kernel(), (jnp.ones(s, jnp.bfloat16) for s in ((M, R), (R, N)))
    new = nys.lora.initialize_params({"kernel": w, "lora_a": a, "lora_b": b}, "pissa", key=KEY)
    a, b = (np.asarray(new[name], np.float64) for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(new["kernel"] + a @ b, w, atol=1e-5)


A, B = jnp.ones((M, R)), jnp.ones((R, N))
BAD_TREES = {
    "none": ({"kernel": kernel()}, "has no adapters"),
    "orphan": ({"d": {"kernel": kernel(), "lora_a": A}}, r"d\.lora_a has no lora_b beside it"),
    "orphan b": ({"w_lora_b": B}, "w_lora_b has no w_lora_a beside it"),
    "no kernel": ({"lora_a": A, "lora_b": B}, "lora_a has no kernel beside it"),
    "other base": (
        {"kernel": kernel(), "lora_a": A[1:], "lora_b": B},
        r"\(23, 4\).*over the kernel \(24, 16\)",
    ),
    "two readings": (
        {
            "kernel": jnp.ones((2, 4, 4)),
            "lora_a": jnp.ones((4, 1)),
            "lora_b": jnp.ones((1, 2, 4)),
        },
        r"over the kernel \(2, 4, 4\) in 2 ways; expected one",
    ),
    "ranks": ({"kernel": kernel(), "lora_a": A, "lora_b": B[1:]}, "do not go together"),
    "integers": (
        {"kernel": jnp.ones((M, N), int), "lora_a": A, "lora_b": B},
        "is int32; expected a floating",
    ),
    "nan": ({"kernel": kernel() * jnp.nan, "lora_a": A, "lora_b": B}, "has NaN or Inf"),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_bad_trees_are_named(case):
    tree, message = BAD_TREES[case]
    with pytest.raises(ValueError, match=message):
        nys.lora.initialize_params(tree, key=KEY)
