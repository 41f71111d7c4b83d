"""Adapters that flax and qwix have put in: merged, and saved as PEFT folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from lora_cases import apply

import nyscaled as nys
from nyscaled.checkpoints import peft

X = jax.random.normal(jax.random.key(1), (3, 8))
KEY = jax.random.key(0)


class Net(nnx.Module):
    """Plain layers, and the same with adapters of flax beside or around them."""

    def __init__(self, flax):
        rngs = nnx.Rngs(0)
        self.plain = nnx.Linear(8, 8, rngs=rngs)
        first, second = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.first, self.second = first, second
        if flax:
            self.first = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)
            self.first.kernel[...], self.first.bias[...] = first.kernel[...], first.bias[...]
            self.second = nnx.LoRA(8, 3, 4, base_module=second, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(jnp.tanh(self.plain(x)))))


class Heads(nnx.Module):
    """What qwix finds in products and einsums."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.query = nnx.Einsum("bd,dnh->bnh", (8, 2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.out(self.query(jnp.tanh(self.up(x))))


def with_qwix(model, **options):
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=6.0, **options)
    return qwix.apply_lora_to_model(model, provider, X, rngs=nnx.Rngs(1))


def moved(model):
    rng = np.random.default_rng(0)
    for _, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        value[...] += jnp.asarray(0.3 * rng.standard_normal(value.shape), value.dtype)
    return model


CASES = {
    "flax": (lambda: Net(True), lambda: Net(False), None),
    "qwix": (lambda: with_qwix(Heads()), Heads, 6.0),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_where_the_base_is_plain(case, tmp_path):
    make, base, alpha = CASES[case]
    model = make()
    nys.lora.initialize(model, "nora", key=KEY, alpha=alpha)
    moved(model)
    nys.lora.save_peft(model, tmp_path, base_model="mine", alpha=alpha)
    again = base()
    layers = nys.lora.load_peft(again, tmp_path)
    assert set(layers) == ({"first", "second"} if case == "flax" else {"up", "query", "out"})
    expected = model(X)
    assert jnp.max(jnp.abs(expected - base()(X))) > 0.1
    np.testing.assert_allclose(again(X), expected, atol=1e-5)
    nys.lora.merge(model, alpha=alpha)
    np.testing.assert_allclose(model(X), expected, atol=1e-5)
    kernels = [v for p, v in nnx.to_flat_state(nnx.state(model)) if p[-1] == "kernel"]
    nys.lora.merge(again)
    others = [v for p, v in nnx.to_flat_state(nnx.state(again)) if p[-1] == "kernel"]
    for one, other in zip(kernels, others, strict=True):
        np.testing.assert_allclose(one[...], other[...], atol=1e-5)


@pytest.mark.parametrize("weight_qtype", ["int8", "nf4"])
def test_over_quantized_bases_they_are_saved_and_not_merged(weight_qtype, tmp_path):
    options = {"tile_size": 8} if weight_qtype == "nf4" else {}
    model = moved(with_qwix(nnx.Sequential(Heads().up), weight_qtype=weight_qtype, **options))
    nys.lora.save_peft(model, tmp_path, base_model="mine", alpha=6.0)
    update = peft.read(tmp_path).updates["layers.0"]
    layer = model.layers[0]
    np.testing.assert_array_equal(update.down, layer.kernel_lora_a[...].T)
    np.testing.assert_array_equal(update.up, layer.kernel_lora_b[...].T)
    assert update.alpha == 6
    before = model(X)
    with pytest.raises(ValueError, match=r"the kernel of layers\.0 was quantized by qwix"):
        nys.lora.merge(model, alpha=6.0)
    np.testing.assert_array_equal(model(X), before)


def test_a_lora_of_flax_without_its_base_is_saved_under_the_name_that_it_is_given(tmp_path):
    model = moved(nnx.Sequential(nnx.LoRA(8, 2, 4, rngs=nnx.Rngs(0))))
    nys.lora.save_peft(model, tmp_path, base_model="mine", names={"layers.0": "fc"})
    update = peft.read(tmp_path).updates["fc"]
    np.testing.assert_allclose(X @ (update.up @ update.down).T, model(X), atol=1e-5)
    assert update.alpha == 2
    with pytest.raises(ValueError, match=r"layers\.0 has no kernel beside its adapter"):
        nys.lora.merge(model)


def test_adapters_of_both_kinds_are_saved_and_merged_together(tmp_path):
    model = Net(True)
    apply(model, targets="plain", rank_stabilized=True)
    moved(model)
    expected = model(X)
    nys.lora.save_peft(model, tmp_path, base_model="mine")
    again = Net(False)
    assert set(nys.lora.load_peft(again, tmp_path)) == {"plain", "first", "second"}
    np.testing.assert_allclose(again(X), expected, atol=1e-5)
    nys.lora.merge(model)
    np.testing.assert_allclose(model(X), expected, atol=1e-5)


def test_what_initialize_was_told_is_remembered(tmp_path):
    model = with_qwix(Heads())
    nys.lora.initialize(model, "nora", key=KEY, alpha=6.0)
    graphdef, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    factors = jax.jit(lambda f: jax.tree.map(lambda x: x + 0.1, f))(factors)  # as training does
    model = nnx.merge(graphdef, factors, rest)
    expected = model(X)
    nys.lora.save_peft(model, tmp_path, base_model="mine")
    again = Heads()
    nys.lora.load_peft(again, tmp_path)
    np.testing.assert_allclose(again(X), expected, atol=1e-5)
    nys.lora.merge(model)
    np.testing.assert_allclose(model(X), expected, atol=1e-5)


def test_refused(tmp_path):
    model = with_qwix(Heads())
    for act in (
        lambda: nys.lora.merge(model),
        lambda: nys.lora.save_peft(model, tmp_path, base_model="mine"),
    ):
        with pytest.raises(ValueError, match=r"alpha is None, and the adapter of .* is qwix's"):
            act()
    both = Net(True)
    apply(both, targets="plain")
    with pytest.raises(ValueError, match=r"adapter is 'other'; the model has \['default'\]"):
        nys.lora.merge(both, "other")
    with pytest.raises(ValueError, match="first of modules_to_save has an adapter"):
        nys.lora.save_peft(both, tmp_path, base_model="mine", modules_to_save=["first"])
    with pytest.raises(ValueError, match="adapter is 'default'; the model has none"):
        nys.lora.merge(Net(False))
