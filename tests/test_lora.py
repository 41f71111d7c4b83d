"""Adapters in NNX models: put in, trained, switched, merged, taken out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from lora_cases import (
    HEADS,
    KERNEL_INITS,
    KEY,
    LAYERS,
    ROWS,
    WIDTH,
    apply,
    base_of,
    call,
    inputs,
    net,
    square,
    train,
)

import nyscaled as nys


def identical(model, base):
    return all(np.array_equal(v, base[p]) for p, v in base_of(model).items())


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("init", KERNEL_INITS)
def test_output_at_step_0_is_the_bases_to_the_last_bit_and_no_init_touches_the_base(init):
    model, base = net(), base_of(net())
    wanted = call(model)
    apply(model, init)
    assert jnp.array_equal(call(model), wanted)
    assert identical(model, base)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("init", ["nora", "pissa"])
def test_training_moves_the_adapters_alone(init):
    model, base = net(), base_of(net())
    apply(model, init, rank_stabilized=True)
    before = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    losses = train(model, steps=4)
    assert losses[-1] < losses[0]
    assert identical(model, base)
    after = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    assert all(
        not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )


def test_it_returns_the_layers_that_it_touched_and_their_shapes():
    model = net()
    touched = apply(model, rank=3)
    head = WIDTH // HEADS
    assert set(touched) == {
        f"{p}.{n}" for p in ("blocks.0", "layers") for n in ("up", "query", "out")
    }
    adapter = touched["blocks.0.query"].adapters["default"]
    chex.assert_shape([adapter.lora_a, adapter.lora_b], [(WIDTH, 3), (3, HEADS * head)])
    stacked = touched["layers.out"].adapters["default"]
    chex.assert_shape([stacked.lora_a, stacked.lora_b], [(LAYERS, WIDTH, 3), (LAYERS, 3, WIDTH)])
    assert isinstance(adapter.lora_a, nnx.LoRAParam)
    assert isinstance(touched["blocks.0.query"], nnx.Einsum)
    assert list(nys.lora.adapted_layers(model)) == list(touched)


def test_the_start_is_the_papers_in_a_linear_layer():
    """X_0 = W_0Ω/s: in range(W_0), linear in ξ, divided by the scale s; Y_0 = 0."""
    layer = nnx.Linear(20, 12, rngs=nnx.Rngs(0))
    left = jnp.linalg.qr(jax.random.normal(KEY, (20, 3)))[0]
    layer.kernel[...] = left @ jax.random.normal(KEY, (3, 12))
    model = nnx.Sequential(layer)
    for name, alpha, scale in (("one", 2, 0.1), ("two", 8, 0.3)):
        nys.lora.apply(model, 2, alpha, targets="layers.0", key=KEY, scale=scale, name=name)
    one, two = (layer.adapters[n].lora_a[...] for n in ("one", "two"))
    assert jnp.linalg.norm(one - left @ (left.T @ one)) < 1e-6 * jnp.linalg.norm(one)
    np.testing.assert_allclose(two, one * 3 / 4, rtol=1e-4)
    assert not jnp.any(layer.adapters["one"].lora_b[...])


def test_a_layers_start_depends_on_its_path_and_not_on_the_other_layers():
    alone, together = net(), net()
    apply(alone, targets=r"blocks\.0\.up")
    apply(together)
    a, b = (m.blocks[0].up.adapters["default"].lora_a[...] for m in (alone, together))
    assert jnp.array_equal(a, b)
    twins = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)])
    apply(nnx.Sequential(*twins))
    a, b = (m.adapters["default"].lora_a[...] for m in twins)
    assert not jnp.allclose(a, b)


def test_layers_of_a_stack_start_apart():
    model = net()
    apply(model, "lora")
    a = model.layers.up.adapters["default"].lora_a[...]
    assert not jnp.allclose(a[0], a[1])


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
    wanted = model(x)
    assert not np.allclose(wanted, before, atol=1e-2)
    nys.lora.merge(model)
    np.testing.assert_allclose(model(x), wanted, atol=1e-5)
    nys.lora.unmerge(model)
    np.testing.assert_allclose(model(x), wanted, atol=1e-5)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("init", ["nora", "olora"])
def test_merge_unmerge_and_remove(init):
    model, base = net(), base_of(net())
    at_start = call(model)
    apply(model, init, alpha=4)
    train(model)
    wanted = call(model)
    nys.lora.merge(model)
    np.testing.assert_allclose(call(model), wanted, atol=1e-5)
    nys.lora.unmerge(model)
    for path, value in base_of(model).items():
        np.testing.assert_allclose(value, base[path], atol=1e-6)
    nys.lora.merge(model)
    nys.lora.remove(model)
    np.testing.assert_allclose(call(model), wanted, atol=1e-5)
    assert not nys.lora.adapted_layers(model)
    assert type(model.blocks[0].up) is nnx.Linear
    fresh = net()
    apply(fresh, init)
    nys.lora.remove(fresh)
    assert identical(fresh, base_of(net()))
    assert jnp.array_equal(call(fresh), at_start)


def served():
    """A base with a NoRA and a PiSSA adapter, trained, and the outputs of each alone."""
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
    assert identical(model, base_of(net()))
    for name in ("english", "french", ()):
        nys.lora.activate(model, name)
        np.testing.assert_allclose(call(model), outputs[name or None], atol=1e-6)
    nys.lora.activate(model)
    assert jnp.array_equal(call(model), outputs[None])
    rows = ["english", None, "french", "english"]
    nys.lora.activate(model, rows=rows)
    wanted = jnp.stack([outputs[name][i] for i, name in enumerate(rows)])
    np.testing.assert_allclose(call(model), wanted, atol=1e-6)
    assert not np.allclose(outputs["english"], outputs["french"], atol=1e-3)


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


def test_two_seeds_share_a_compilation():
    """The key is kept as data: models that differ in it alone are one program."""
    graphs = []
    for seed in range(2):
        model = net()
        apply(model, key=jax.random.key(seed))
        graphs.append(nnx.graphdef(model))
    assert graphs[0] == graphs[1]


def test_patterns_with_ranks_of_their_own_and_alpha():
    model = net()
    nys.lora.apply(
        model, alpha=8, targets={r".*\.query": 4, r"blocks\..*": 2}, key=KEY, rank_stabilized=True
    )
    ranks = {p: m.adapters["default"].rank for p, m in nys.lora.adapted_layers(model).items()}
    wanted = {"blocks.0.up": 2, "blocks.0.query": 4, "blocks.0.out": 2, "layers.query": 4}
    assert ranks == wanted
    assert model.layers.query.adapters["default"].scaling == 4
    model = net()
    apply(model, rank=4, alpha=8)
    assert model.layers.query.adapters["default"].scaling == 2


def test_dropout_acts_in_training_and_not_in_evaluation():
    model = net()
    apply(model, dropout=0.5)
    train(model)
    first, second = call(model), call(model)
    assert not jnp.allclose(first, second)
    model.eval()
    assert jnp.array_equal(call(model), call(model))
    keys = model.layers.up.adapters["default"].dropout.rngs.key[...]
    assert keys.shape == (LAYERS,)


@pytest.mark.parametrize("init", ["pissa", "olora", "nora"])
def test_dropout_is_of_the_trained_factors_input_and_not_of_the_subtracted_start(init):
    """base(x) + s·dropout(x)·a·b − s·x·a₀·b₀, as PEFT with a base from which the start was taken."""
    model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)))
    base = nnx.clone(model)
    apply(model, init, alpha=3.0, dropout=0.5)
    train(model, steps=1)
    adapter, x = model.layers[0].adapters["default"], inputs()
    dropped = nnx.clone(adapter.dropout)(x)  # with the mask that the next call draws
    assert 0 < jnp.mean(dropped == 0) < 1
    wanted = base(x) + 1.5 * dropped @ adapter.lora_a[...] @ adapter.lora_b[...]
    if adapter.start is not None:
        wanted -= 1.5 * x @ adapter.start["a"][...] @ adapter.start["b"][...]
    np.testing.assert_allclose(model(x), wanted, atol=1e-5)


@pytest.mark.long
def test_adapters_have_a_dtype_of_their_own_over_a_bfloat16_base():
    model = net(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    wanted = call(model)
    apply(model, "pissa")
    adapter = model.blocks[0].up.adapters["default"]
    assert adapter.lora_a.dtype == jnp.float32
    found = call(model)
    assert found.dtype == wanted.dtype
    assert jnp.array_equal(found, wanted)
    losses = train(model)
    assert losses[-1] < losses[0]
    narrow = net()
    apply(narrow, dtype=jnp.bfloat16)
    assert narrow.blocks[0].up.adapters["default"].lora_a.dtype == jnp.bfloat16
    assert call(narrow).dtype == jnp.float32


def test_apply_can_be_traced_so_that_large_models_need_not_exist():
    def build():
        model = net()
        apply(model, "pissa")
        return model

    shapes = nnx.state(nnx.eval_shape(build), nnx.LoRAParam)
    model = build()
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, nnx.state(model, nnx.LoRAParam))


@pytest.mark.long
def test_split_once_and_plain_jit_agree_with_nnx():
    model = net()
    apply(model)
    wanted = train(model, steps=3, tx=nys.nora_plus(optax.adam(1e-2)))
    model = net()
    apply(model)
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    tx = nys.nora_plus(optax.adam(1e-2))

    @jax.jit
    def step(params, state, x):
        loss, grads = jax.value_and_grad(
            lambda p: square(nnx.merge(graphdef, p, rest, copy=True), x)
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(3):
        params, state, loss = step(params, state, inputs())
        losses.append(float(loss))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


BAD = {
    "nothing matches": (lambda m: apply(m, targets=r".*v_proj"), r"'.\*v_proj' matches no module"),
    "not a layer": (lambda m: apply(m, targets=r"blocks\.0"), r"matches only blocks.0, a Block"),
    "one of two matches nothing": (
        lambda m: nys.lora.apply(m, targets={r".*\.up": 2, "down": 2}, key=KEY),
        "'down' matches no module",
    ),
    "rank above a side": (lambda m: apply(m, rank=9), r"blocks.0.out: rank is 9; expected 1 ≤ rank ≤ 8"),
    "rank 0": (lambda m: apply(m, rank=0), "rank is 0"),
    "odd rank": (lambda m: apply(m, "orthogonal", rank=3), "expected an even one"),
    "unknown init": (lambda m: nys.lora.apply(m, targets=".*", key=KEY, init="eva"), "init is 'eva'; expected"),
    "alpha": (lambda m: apply(m, alpha=0), r"alpha is 0; expected a number in \(0, inf\)"),
    "infinite alpha": (lambda m: apply(m, alpha=1e39), r"the scaling is 5e\+38 \(α is 1e\+39\); expected"),
    "alpha of 400 digits": (lambda m: apply(m, alpha=10**400), "alpha is an integer that no float holds"),
    "dropout": (lambda m: apply(m, dropout=1.5), "dropout is 1.5"),
    "all dropped": (lambda m: apply(m, dropout=1.0), r"dropout is 1, .* expected a rate in \[0, 1\)"),
    "no expression": (lambda m: apply(m, targets="("), r"'\(' is not a regular expression"),
    "name": (lambda m: apply(m, name="a.b"), r"name is 'a\.b'; expected letters"),
    "scale": (lambda m: apply(m, scale=0.0), "scale is 0; expected"),
    "distribution": (lambda m: apply(m, "lora", distribution="cauchy"), "distribution is 'cauchy'; expected"),
    "side": (lambda m: apply(m, side="left"), "side is 'left'; expected"),
    "twice": (lambda m: (apply(m), apply(m)), "has an adapter named 'default'; expected another"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case):
    act, message = BAD[case]
    model = net()
    with pytest.raises(ValueError, match=message):
        act(model)
    if case != "twice":
        assert nnx.graphdef(model) == nnx.graphdef(net())


def test_kernels_that_cannot_be_read_are_named():
    model = net()
    model.blocks[0].up.kernel[...] = model.blocks[0].up.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"start of blocks.0.up has NaN or Inf"):
        apply(model)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    model.layers[0].kernel = nnx.Param(jnp.ones((4, 4), jnp.int8))
    with pytest.raises(ValueError, match=r"kernel of layers.0 is int8; expected a floating"):
        apply(model)
    model.layers[0].kernel = nnx.Param(jnp.ones((4, 3, 4)))
    with pytest.raises(ValueError, match=r"shape \(4, 3, 4\), the layer declares \(4, 4\)"):
        apply(model)
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


@pytest.mark.parametrize(
    "act", [nys.lora.merge, nys.lora.unmerge, nys.lora.remove, nys.lora.activate]
)
def test_unknown_names(act):
    model = net()
    apply(model)
    with pytest.raises(ValueError, match=r"adapter is 'other'; the model has \['default'\]"):
        act(model, "other")


def test_rows_want_the_batch_in_front():
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
