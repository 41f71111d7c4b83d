"""Adapters that serve from one base: activated, merged, taken out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_cases import KEY, ROWS, apply, assert_base_is, base_of, call, inputs, net, train

import nyscaled as nys


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(
    ("equation", "kernel", "x", "a", "b"),
    [
        ("btd,dnh->btnh", (6, 2, 4), (2, 3, 6), (6, 2), (2, 8)),
        ("btnh,nhd->btd", (2, 4, 6), (2, 3, 2, 4), (8, 2), (2, 6)),
        ("BTD,NDH->BTNH", (2, 6, 4), (2, 3, 6), (6, 2), (2, 8)),
        ("btd,kdnh->kbtnh", (3, 6, 2, 4), (2, 3, 6), (6, 2), (2, 24)),
        ("ebd,edf->ebf", (3, 6, 4), (3, 2, 6), (3, 6, 2), (3, 2, 4)),
        ("...d,df->...f", (6, 4), (2, 3, 6), (6, 2), (2, 4)),
        ("bdr,drf->bf", (6, 2, 4), (3, 6, 2), (12, 2), (2, 4)),
    ],
)
def test_any_split_of_an_einsums_axes(equation, kernel, x, a, b):
    model = nnx.Sequential(nnx.Einsum(equation, kernel, rngs=nnx.Rngs(0)))
    apply(model)
    adapter = model.layers[0].adapters["default"]
    chex.assert_shape([adapter.lora_a, adapter.lora_b], [a, b])
    _acts_as_its_merged_kernel(model, adapter, jax.random.normal(KEY, x))


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(
    ("sizes", "options", "x"),
    [
        ((6, (2, 4)), {}, (2, 3, 6)),
        (((2, 4), 6), {"axis": (-2, -1)}, (2, 3, 2, 4)),
        (((3, 6), 5), {"axis": (1, -1)}, (2, 3, 6)),
        ((6, 4), {"batch_axis": {0: 2}}, (2, 3, 6)),
    ],
)
def test_any_axes_of_a_linear_general(sizes, options, x):
    model = nnx.Sequential(nnx.LinearGeneral(*sizes, rngs=nnx.Rngs(0), **options))
    apply(model)
    _acts_as_its_merged_kernel(
        model, model.layers[0].adapters["default"], jax.random.normal(KEY, x)
    )


def _acts_as_its_merged_kernel(model, adapter, x):
    before = model(x)
    adapter.lora_b[...] = jax.random.normal(KEY, adapter.lora_b.shape)
    expected = model(x)
    assert not np.allclose(expected, before, atol=1e-2)
    nys.lora.merge(model)
    np.testing.assert_allclose(model(x), expected, atol=1e-5)
    nys.lora.unmerge(model)
    np.testing.assert_allclose(model(x), expected, atol=1e-5)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("init", ["nora", "olora"])
def test_merge_unmerge_and_remove(init):
    model, base = net(), base_of(net())
    at_start = call(model)
    apply(model, init, alpha=4)
    train(model)
    expected = call(model)
    nys.lora.merge(model)
    np.testing.assert_allclose(call(model), expected, atol=1e-5)
    nys.lora.unmerge(model)
    for path, value in base_of(model).items():
        np.testing.assert_allclose(value, base[path], atol=1e-6)
    nys.lora.merge(model)
    nys.lora.remove(model)
    np.testing.assert_allclose(call(model), expected, atol=1e-5)
    assert not nys.lora.adapted_layers(model)
    assert type(model.blocks[0].up) is nnx.Linear
    fresh = net()
    apply(fresh, init)
    nys.lora.remove(fresh)
    assert_base_is(fresh, base_of(net()))
    assert jnp.array_equal(call(fresh), at_start)


def served():
    """A base with a NoRA and a PiSSA adapter, trained, and the outputs of each by itself."""
    model, outputs = net(), {}
    outputs[None] = call(model)
    for name, init in (("english", "nora"), ("french", "pissa")):
        apply(model, init, name=name)
        nys.lora.activate(model, name)
        train(model, wrt=nnx.All(nnx.LoRAParam, nnx.PathContains(name)))
        outputs[name] = call(model)
    return model, outputs


def test_several_adapters_serve_from_one_base_together_and_row_by_row():
    """A.3: LoRA and NoRA adapters share W_0; each row of a batch uses its own."""
    model, outputs = served()
    assert_base_is(model, base_of(net()))
    for name in ("english", "french", ()):
        nys.lora.activate(model, name)
        np.testing.assert_allclose(call(model), outputs[name or None], atol=1e-6)
    nys.lora.activate(model)
    assert jnp.array_equal(call(model), outputs[None])
    rows = ["english", None, "french", "english"]
    nys.lora.activate(model, rows=rows)
    expected = jnp.stack([outputs[name][i] for i, name in enumerate(rows)])
    np.testing.assert_allclose(call(model), expected, atol=1e-6)
    assert not np.allclose(outputs["english"], outputs["french"], atol=1e-3)


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS + 1])
def test_rows_are_those_of_the_batch(rows):
    model = net()
    apply(model)
    nys.lora.activate(model, rows=["default"] * rows)
    with pytest.raises(ValueError, match=f"the input has {ROWS} rows; expected {rows}, as `rows`"):
        call(model)


def test_an_input_without_rows():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    apply(model)
    nys.lora.activate(model, rows=["default"] * 4)
    with pytest.raises(ValueError, match="the input has 0 rows; expected 4"):
        model(jnp.ones(4))


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        ("default", ["default"], "names is 'default' and rows is .'default'.; expected one of"),
        ((), [], r"names is \(\) and rows is \[\]; expected one of the two, and a row at least"),
        ((), "default", "rows is 'default'; expected a sequence of names"),
    ],
)
def test_rows_refused(names, rows, message):
    model = net()
    apply(model)
    with pytest.raises(ValueError, match=message):
        nys.lora.activate(model, names, rows=rows)


def test_switching_adapters_compiles_nothing():
    model, _ = served()
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(None)
        return model(x)

    for name in ("english", "french", ("english", "french"), ()):
        nys.lora.activate(model, name)
        run(model, inputs())
    assert len(traces) == 1
    for rows in (["english"] * ROWS, ["french", None] * (ROWS // 2)):
        nys.lora.activate(model, rows=rows)
        run(model, inputs())
    assert len(traces) == 2


def test_a_function_that_holds_the_model_sees_which_adapters_are_active():
    model, outputs = served()
    run = nnx.cached_partial(nnx.jit(lambda model, x: model(x)), model)
    for name in ("english", "french"):
        nys.lora.activate(model, name)
        np.testing.assert_allclose(run(inputs()), outputs[name], atol=1e-6)


def test_sums_with_a_narrow_kernel_are_rounded_once():
    """1 + 2⁻⁸ + 2⁻¹⁷ is nearer to 1 + 2⁻⁷ in bfloat16, and the update in bfloat16 is 2⁻⁸."""
    model = nnx.Sequential(nnx.Linear(1, 1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    layer = model.layers[0]
    layer.kernel[...] = jnp.ones((1, 1), jnp.bfloat16)
    adapter = apply(model, rank=1)["layers.0"].adapters["default"]
    adapter.lora_a[...] = jnp.ones((1, 1))
    adapter.lora_b[...] = jnp.full((1, 1), 2.0**-8 + 2.0**-17)
    nys.lora.merge(model)
    assert float(layer.kernel[0, 0]) == 1 + 2**-7


class Shared(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self, layer):
        self.first, self.second = (layer(8, 8, rngs=nnx.Rngs(0)) for _ in range(2))
        self.second.kernel = self.first.kernel


@pytest.mark.parametrize("layer", [nnx.Linear, functools.partial(nnx.LoRALinear, lora_rank=2)])
def test_a_kernel_of_two_layers_is_not_merged_into(layer):
    model = Shared(layer)
    if layer is nnx.Linear:
        nys.lora.apply(model, 2, targets="first", key=KEY)
    before = model.first.kernel[...]
    with pytest.raises(ValueError, match=r"the kernel of first.* is another layer's too"):
        nys.lora.merge(model)
    assert jnp.array_equal(model.second.kernel[...], before)


@pytest.mark.parametrize(
    "act", [nys.lora.merge, nys.lora.unmerge, nys.lora.remove, nys.lora.activate]
)
def test_unknown_names(act):
    model = net()
    apply(model)
    with pytest.raises(ValueError, match=r"adapter is 'other'; the model has \['default'\]"):
        act(model, "other")


def test_rows_require_the_batch_in_front():
    model = nnx.Sequential(nnx.Einsum("ebd,edf->ebf", (3, 6, 4), rngs=nnx.Rngs(0)))
    apply(model)
    with pytest.raises(ValueError, match=r"layers.0 has batch axes; expected layers whose input"):
        nys.lora.activate(model, rows=["default", None, None])
    assert model.layers[0].adapters["default"].gate.shape == ()


@pytest.mark.long
def test_merging_twice_and_unmerging_what_is_not_merged():
    model = net()
    apply(model)
    with pytest.raises(ValueError, match="'default' is not merged"):
        nys.lora.unmerge(model)
    nys.lora.merge(model)
    with pytest.raises(ValueError, match="'default' is merged"):
        nys.lora.merge(model)
    with pytest.raises(ValueError, match="'default' is merged into the kernel; expected it unm"):
        nys.lora.initialize(model, key=KEY)
