"""Starts: the functions, and filling our own adapters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_cases import KERNEL_INITS, KEY, M, N, R, apply, call, inputs, kernel, net, square

import nyscaled as nys
from nyscaled.lora import inits

X = jax.random.normal(jax.random.key(3), (5, M))


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


@pytest.mark.long
def test_pissa_without_iterations_is_exact_at_the_rank_of_its_sketch():
    """Which has 8 columns more than the start."""
    u, s, vt = np.linalg.svd(kernel())
    s[R + 8 :] = 0
    start = inits.pissa(KEY, jnp.asarray((u[:, : len(s)] * s) @ vt), R, 2.0, niter=0)
    best = (u[:, :R] * s[:R]) @ vt[:R]
    np.testing.assert_allclose(product(start, 2.0), best, atol=1e-5)


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
