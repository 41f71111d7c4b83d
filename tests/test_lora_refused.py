"""What `nys.lora.apply` refuses."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx
from lora_cases import KEY, apply, net

import nyscaled as nys

BAD = {
    "nothing matches": (lambda m: apply(m, targets=r".*v_proj"), r"'.\*v_proj' matches no module"),
    "not a layer": (lambda m: apply(m, targets=r"blocks\.0"), r"matches only blocks.0, a Block"),
    "rounds": (lambda m: apply(m, "pissa", niter=-1), "niter is -1; expected an integer ≥ 0"),
    "one of two matches nothing": (
        lambda m: nys.lora.apply(m, targets={r".*\.up": 2, "down": 2}, key=KEY),
        "'down' matches no module",
    ),
    "rank above a side": (
        lambda m: apply(m, rank=9),
        r"blocks.0.out: rank is 9; expected 1 ≤ rank ≤ 8",
    ),
    "rank 0": (lambda m: apply(m, rank=0), "rank is 0"),
    "no targets": (lambda m: apply(m, targets={}), r"targets is \{\}; expected a regular"),
    "odd rank": (lambda m: apply(m, "orthogonal", rank=3), "expected an even one"),
    "unknown init": (
        lambda m: nys.lora.apply(m, targets=".*", key=KEY, init="eva"),
        "init is 'eva'; expected",
    ),
    "alpha": (lambda m: apply(m, alpha=0), r"alpha is 0; expected a number in \(0, inf\)"),
    "infinite alpha": (
        lambda m: apply(m, alpha=1e39),
        r"the scaling is 5e\+38 \(α is 1e\+39\); expected",
    ),
    "alpha of 400 digits": (
        lambda m: apply(m, alpha=10**400),
        "alpha is an integer that no float holds",
    ),
    "dropout": (lambda m: apply(m, dropout=1.5), "dropout is 1.5"),
    "all dropped": (
        lambda m: apply(m, dropout=1.0),
        r"dropout is 1, .* expected a rate in \[0, 1\)",
    ),
    "no expression": (lambda m: apply(m, targets="("), r"'\(' is not a regular expression"),
    "name": (lambda m: apply(m, name="a.b"), r"name is 'a\.b'; expected letters"),
    "name of a method": (lambda m: apply(m, name="values"), "name is 'values', which nnx.Dict has"),
    "scale": (lambda m: apply(m, scale=0.0), "scale is 0; expected"),
    "distribution": (
        lambda m: apply(m, "lora", distribution="cauchy"),
        "distribution is 'cauchy'; expected",
    ),
    "side": (lambda m: apply(m, side="left"), "side is 'left'; expected"),
    "twice": (lambda m: (apply(m), apply(m)), "has an adapter named 'default'; expected another"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case):
    act, message = BAD[case]
    model = net()
    with pytest.raises(ValueError, match=message):
        act(model)
    if case != "twice":
        assert nnx.graphdef(model) == nnx.graphdef(net())


@pytest.mark.long
def test_kernels_that_cannot_be_read_are_named():
    model = net()
    model.blocks[0].up.kernel[...] = model.blocks[0].up.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"start of blocks.0.up has NaN or Inf"):
        apply(model)
    model = net()
    model.layers.up.kernel[...] = model.layers.up.kernel[...].at[1].set(0)
    with pytest.raises(ValueError, match=r"start of layers.up has two zero factors, which no grad"):
        apply(model)
    apply(model, "lora")
    with pytest.raises(ValueError, match=r"start of layers.up has two zero factors, which no grad"):
        nys.lora.initialize(model, key=KEY)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    model.layers[0].kernel = nnx.Param(jnp.ones((4, 4), jnp.int8))
    with pytest.raises(ValueError, match=r"kernel of layers.0 is int8; expected a floating"):
        apply(model)
    model.layers[0].kernel = nnx.Param(jnp.ones((4, 3, 4)))
    with pytest.raises(ValueError, match=r"shape \(4, 3, 4\), the layer declares \(4, 4\)"):
        apply(model)
    shapes = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"kernel of layers.0 has a shape and no values; expected"):
        apply(shapes)
    lazy = nnx.Sequential(nnx.Einsum("ab,bc->ac", (4, 4), rngs=nnx.Rngs(0)))
    lazy.layers[0].einsum_str = None
    with pytest.raises(ValueError, match="without einsum_str"):
        apply(lazy)
    summed = nnx.Sequential(nnx.Einsum("ab,bcd->ac", (4, 4, 4), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="expected kernel axes that are distinct"):
        apply(summed)


def test_layers_with_adapters_of_flax_are_refused():
    model = nnx.Sequential(nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"has adapters of flax or qwix; expected a plain layer"):
        apply(model, targets=r"layers\.0")


def test_values_of_other_types_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match=r"targets is \['up'\]; expected a regular expression"):
        nys.lora.apply(net(), targets=["up"], key=KEY)
    for key in (0, jax.random.split(KEY)):
        with pytest.raises(ValueError, match="; expected one key, as from"):
            nys.lora.apply(net(), targets=".*", key=key)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    nys.lora.apply(model, jnp.int32(2), targets=".*", key=KEY)
    assert model.layers[0].adapters["default"].rank == 2
