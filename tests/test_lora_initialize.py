"""Starts: the functions, and filling the adapters of flax, qwix, gemma and plain trees."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from lora_cases import KERNEL_INITS, KEY, apply, call, inputs, net, square

import nyscaled as nys
from nyscaled.lora import inits

M, N, R = 24, 16, 4
X = jax.random.normal(jax.random.key(3), (5, M))


def kernel(dtype=jnp.float32, m=M, n=N):
    """Of decaying singular values, so that leading subspaces are distinct."""
    return nys.spectra.rectangular(KEY, m, n, jnp.geomspace(1, 1e-3, min(m, n)))[0].astype(dtype)


def product(start, scaling):
    return scaling * start.a @ start.b


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("name", KERNEL_INITS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_have_their_shapes_in_float32_and_are_functions_of_the_key(name, dtype):
    init, options = nys.lora.KERNEL_INITS[name.split("_")[0]], KERNEL_INITS[name]
    first, again, other = (
        init(jax.random.key(k), kernel(dtype), R, 2.0, **options) for k in (1, 1, 2)
    )
    chex.assert_trees_all_equal(first, again)
    for x, shape in zip(first, ((M, R), (R, N)), strict=True):
        assert x is None or (x.shape == shape and x.dtype == jnp.float32)
    random = name not in ("pissa", "milora", "olora", "pissa_niter")
    close = [
        np.allclose(x, y, atol=1e-4) for x, y in zip(first, other, strict=True) if x is not None
    ]
    assert all(close) != random or name == "pissa_niter"


def test_lora_is_pefts():
    a, b = inits.lora(KEY, jnp.ones((400, N)), R, 1.0)
    assert b is None
    assert 0.9 / 20 < float(jnp.max(jnp.abs(a))) <= 1 / 20
    np.testing.assert_allclose(jnp.std(a), 1 / 20 / 3**0.5, rtol=0.1)
    a, _ = inits.lora(KEY, jnp.ones((400, N)), R, 1.0, distribution="gaussian")
    np.testing.assert_allclose(jnp.std(a), 1 / R, rtol=0.1)


def test_nora_of_either_side_is_a_sketch_of_the_kernel():
    w = kernel()
    a, b = inits.nora(KEY, w, R, 2.0, scale=0.5)
    omega = 0.5 * jax.random.normal(KEY, (N, R)) / 2
    assert b is None
    np.testing.assert_allclose(a, w @ omega, atol=1e-6)
    a, b = inits.nora(KEY, w, R, 2.0, scale=0.5, side="output")
    assert a is None
    np.testing.assert_allclose(b, (w.T @ (0.5 * jax.random.normal(KEY, (M, R)) / 2)).T, atol=1e-6)
    a, _ = inits.nora(KEY, jnp.eye(N), R, 2.0, scale=0.5, sketch="stiefel")
    np.testing.assert_allclose(a.T @ a, jnp.eye(R) / 16, atol=1e-6)


def test_nora_draws_with_deviation_a_tenth_unless_told():
    for a in (
        inits.nora(KEY, jnp.eye(400), R, 2.0).a,
        inits.nora(KEY, jnp.eye(400), R, 2.0, side="output").b,
    ):
        np.testing.assert_allclose(jnp.std(a), 0.1 / 2, rtol=0.1)


@pytest.mark.parametrize("side", ["input", "output"])
def test_auto_scale_of_nora_gives_columns_as_long_as_those_of_lora(side):
    for size in (1.0, 1e-20, 1e20):
        tuned = inits.nora(KEY, size * kernel(), R, 2.0, scale=0.5, side=side)
        auto = inits.nora(KEY, size * kernel(), R, 2.0, scale="auto", side=side)
        one, other = (start.a if side == "input" else start.b for start in (tuned, auto))
        np.testing.assert_allclose(jnp.linalg.norm(other), (R / 3) ** 0.5, rtol=1e-5)
        ratio = jnp.linalg.norm(other) / (jnp.linalg.norm(one / size) * size)
        np.testing.assert_allclose(other, one * ratio, rtol=1e-4, atol=1e-6)
    zero = inits.nora(KEY, jnp.zeros((M, N)), R, 2.0, scale="auto", side=side)
    assert not any(jnp.any(x) for x in zero if x is not None)
    with pytest.raises(ValueError, match="scale is 'rule'; expected a positive number or 'auto'"):
        inits.nora(KEY, kernel(), R, 2.0, scale="rule")


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("niter", [None, 4])
def test_pissa_is_the_best_approximation_balanced(niter):
    w = kernel()
    start = inits.pissa(KEY, w, R, 2.0, niter=niter)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    best = (u[:, :R] * s[:R]) @ vt[:R]
    np.testing.assert_allclose(product(start, 2.0), best, atol=1e-5)
    np.testing.assert_allclose(start.a.T @ start.a, start.b @ start.b.T, atol=1e-5)


def test_milora_is_the_part_of_the_smallest_singular_values_balanced():
    w = kernel()
    start = inits.milora(KEY, w, R, 2.0)
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    rest = (u[:, -R:] * s[-R:]) @ vt[-R:]
    np.testing.assert_allclose(product(start, 2.0), rest, atol=1e-6)
    np.testing.assert_allclose(
        product(start, 2.0) - w, product(inits.pissa(KEY, w, N - R, 2.0), -2.0), atol=1e-5
    )
    np.testing.assert_allclose(start.a.T @ start.a, start.b @ start.b.T, atol=1e-7)


def test_olora_is_the_leading_part_of_a_qr_factorization():
    w = kernel()
    a, b = inits.olora(KEY, w, R, 2.0)
    q, r = jnp.linalg.qr(w.T)
    np.testing.assert_allclose(a @ b, (q[:, :R] @ r[:R]).T, atol=1e-5)
    np.testing.assert_allclose(b @ b.T, jnp.eye(R), atol=1e-5)


def test_orthogonal_has_both_factors_and_no_product():
    a, b = inits.orthogonal(KEY, kernel(), R, 1.0)
    assert jnp.linalg.norm(a @ b) < 1e-6 * jnp.linalg.norm(a) * jnp.linalg.norm(b)


def test_orthogonal_has_the_size_of_pefts():
    """Gaussian (m, r/2) times r/2 orthonormal rows, over 10: mean squares of 1/200."""
    a, b = inits.orthogonal(KEY, jnp.ones((400, 300)), R, 1.0)
    for x in (a, b):
        np.testing.assert_allclose(jnp.mean(x**2), 1 / 200, rtol=0.15)


# --- From gradients ------------------------------------------------------------------------------

BATCHES = [inputs(), 2 * inputs(7)]


def gradient_of(path):
    """The mean gradient of the loss in a kernel of the base, by hand."""
    base = net()
    value = 0
    for batch in BATCHES:
        grads = nnx.grad(square)(base, batch)
        value = value + nnx.to_pure_dict(grads)[path[0]][path[1]][path[2]]["kernel"]
    return value.reshape(8, 8)


def started(init, first="pissa", **options):
    model = net()
    apply(model, first)
    paths = nys.lora.initialize(model, init, key=KEY, loss=square, batches=BATCHES, **options)
    assert set(paths) == set(nys.lora.adapted_layers(model))
    return model


@pytest.mark.long
def test_nora_grad_is_the_gradient_times_a_sketch():
    model = started("nora_grad", scale=0.5)
    for path, layer in (("up", model.blocks[0].up), ("query", model.blocks[0].query)):
        adapter = layer.adapters["default"]
        a, g = adapter.lora_a[...], gradient_of(("blocks", 0, path))
        assert not jnp.any(adapter.lora_b[...])
        np.testing.assert_allclose(jnp.linalg.norm(a), 0.5 * 2**0.5, rtol=1e-5)
        coefficients = jnp.linalg.lstsq(g, a)[0]
        np.testing.assert_allclose(g @ coefficients, a, atol=1e-4)
    assert jnp.array_equal(call(model), call(net()))
    assert (
        jnp.linalg.matrix_rank(model.layers.up.adapters["default"].lora_a[...]).tolist() == [2] * 3
    )


@pytest.mark.long
def test_lora_one_is_the_leading_part_of_the_negative_gradient():
    model = started("lora_one", gamma=4.0, niter=6)
    g = gradient_of(("blocks", 0, "up"))
    adapter = model.blocks[0].up.adapters["default"]
    u, s, vt = jnp.linalg.svd(-g)
    expected = (u[:, :2] * (s[:2] / s[0])) @ vt[:2] * 8**0.5 / 4
    np.testing.assert_allclose(adapter.lora_a[...] @ adapter.lora_b[...], expected, atol=2e-3)
    assert square(model, inputs()) < square(net(), inputs())


@pytest.mark.long
def test_inits_from_gradients_say_what_they_require():
    model = net()
    apply(model)
    with pytest.raises(
        ValueError, match=r"expected `loss`, a function of \(model, batch\), and batches"
    ):
        nys.lora.initialize(model, "nora_grad", key=KEY)
    with pytest.raises(
        ValueError, match=r"by `initialize`, 'nora_grad' or 'lora_one' \(from gradients\) or 'eva'"
    ):
        nys.lora.apply(net(), targets=".*", key=KEY, init="nora_grad")
    nys.lora.activate(model)
    with pytest.raises(ValueError, match=r"gradient of norm 0.0 at .*is the adapter active"):
        nys.lora.initialize(model, "nora_grad", key=KEY, loss=square, batches=BATCHES)


@pytest.mark.parametrize(("init", "options"), [("lora_one", {"gamma": -1}), ("eva", {"niter": -1})])
def test_options_that_would_start_from_noise_are_refused(init, options):
    model = nnx.Sequential(nnx.Linear(M, N, rngs=nnx.Rngs(0)))
    nys.lora.apply(model, R, targets=".*", key=KEY)
    with pytest.raises(ValueError, match=f"{next(iter(options))} is -1; expected"):
        nys.lora.initialize(model, init, key=KEY, loss=square, batches=[X], **options)


def test_initialize_starts_our_own_adapters_as_apply_does():
    model, other = net(), net()
    apply(model, "lora")
    apply(other, "olora")
    nys.lora.initialize(model, "olora", key=KEY)
    chex.assert_trees_all_equal(
        *(nnx.to_pure_dict(nnx.state(m, nnx.LoRAParam)) for m in (model, other))
    )
    assert jnp.array_equal(call(model), call(net()))
    with pytest.raises(ValueError, match="no adapter named 'french'"):
        nys.lora.initialize(model, "nora", key=KEY, name="french")


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


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="no adapter named 'default', nor any of flax or qwix"):
        nys.lora.initialize(net(), key=KEY)


def test_sums_of_a_sound_start_need_not_fit_float16():
    model = nnx.Sequential(nnx.Linear(200, N, rngs=nnx.Rngs(0)))
    model.layers[0].kernel[...] = jnp.ones((200, N))
    nys.lora.apply(model, 1, targets=".*", key=KEY, scale=500.0, dtype=jnp.float16)
    a = np.asarray(model.layers[0].adapters["default"].lora_a[...], np.float64)
    assert np.isfinite(a).all()
    assert np.abs(a.sum()) > 65504
