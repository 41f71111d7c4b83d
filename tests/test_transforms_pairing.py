"""Pairs are found by name in the trees of JAX's LoRA libraries, and preconditioned together."""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import linen, nnx
from flax.core import FrozenDict
from test_transforms_gram import updates

import nyscaled as nys
from nyscaled import FactorSpec
from nyscaled.transforms._pairwise import map_gradients


@pytest.mark.parametrize(
    ("a", "b", "rank_axis", "batch"),
    [
        ((6, 2), (2, 5), 0, 0),
        ((6, 2), (2, 3, 4), 0, 0),  # btd,dnh->btnh
        ((3, 4, 2), (2, 6), 0, 0),  # btnh,nhd->btd
        ((5, 6, 2), (5, 2, 3, 4), 1, 1),  # the same two under a scan of five layers
        ((5, 3, 4, 2), (5, 2, 6), 1, 1),
        ((5, 8, 6, 2), (5, 8, 2, 3), 2, 2),  # experts in each layer
        ((8, 6, 2), (2, 3), 0, 0),  # gemma: only a has the batch letter
        ((2, 6, 2), (2, 2, 3), 1, 1),  # two layers of rank two
    ],
)
@pytest.mark.parametrize("names", ["kernel_lora_a kernel_lora_b", "lora/a lora/b"])
def test_axes_of_qwix_and_gemma_are_read_off_both_shapes(names, a, b, rank_axis, batch):
    params = {}
    for name, shape in zip(names.split(), (a, b), strict=True):
        *above, last = name.split("/")
        at = params.setdefault(above[0], {}) if above else params
        at[last] = jnp.zeros(shape)
    batch_axes = tuple(range(batch))
    assert [(s.rank_axis, s.batch_axes) for s in jax.tree.leaves(nys.pair_spec(params))] == [
        (-1, batch_axes),
        (rank_axis, batch_axes),
    ]
    assert len({s.pair for s in jax.tree.leaves(nys.pair_spec(params))}) == 1


def test_shapes_that_fit_no_reading_are_named():
    params = {"q": {"w_lora_a": jnp.ones((3, 6, 2)), "w_lora_b": jnp.ones((4, 2, 5))}}
    with pytest.raises(ValueError, match=r"w_lora_a.*\(3, 6, 2\).*w_lora_b.*\(4, 2, 5\).*a spec"):
        nys.pair_spec(params)


def test_several_pairs_of_one_layer_are_distinguished_and_other_leaves_are_none():
    a, b = jnp.ones((6, 2)), jnp.ones((2, 5))
    params = {
        "mlp": {"up_lora_a": a, "up_lora_b": b, "down_lora_a": a, "down_lora_b": b, "up": a},
        "a": a,
        "lora": {"a": a, "b": b, "lora_a": a, "lora_b": b},
    }
    spec = nys.pair_spec(params)
    assert spec["mlp"]["up"] is spec["a"] is None
    assert spec["mlp"]["up_lora_a"].pair == spec["mlp"]["up_lora_b"].pair
    assert len({s.pair for s in jax.tree.leaves(spec)}) == 4
    assert nys.default_spec(params)["a"] == FactorSpec()


@pytest.mark.parametrize("lonely", ["kernel_lora_a", "kernel_lora_b", "a", "b"])
def test_an_orphan_is_named(lonely):
    params = {"lora": {lonely: jnp.ones((6, 2)), "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=rf"leaf \['lora'\]\['{lonely}'\].*expected exactly two"):
        nys.nora_plus(optax.sgd(1.0)).init(params)


@pytest.mark.long
def test_kept_kernel_axes_are_the_flattened_matrix():
    x, y, gx, gy = (normal(i, s) for i, s in enumerate([(12, 2), (2, 20), (12, 2), (2, 20)]))
    tx = nys.scale_by_gram()
    flat = {"lora_a": x, "lora_b": y}, {"lora_a": gx, "lora_b": gy}
    kept = [
        {"w_lora_a": t["lora_a"].reshape(3, 4, 2), "w_lora_b": t["lora_b"].reshape(2, 4, 5)}
        for t in flat
    ]
    actual, _ = tx.update(kept[1], tx.init(kept[0]), kept[0])
    expected, _ = tx.update(flat[1], tx.init(flat[0]), flat[0])
    for f, w in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(f.reshape(w.shape), w)


def layers(shapes, seed=0):
    return {
        f"{i}": {"lora_a": normal(seed + i, (m, 2)), "lora_b": normal(seed + 50 + i, (2, n))}
        for i, (m, n) in enumerate(shapes)
    }


def test_pairs_of_equal_shapes_share_one_call_and_agree_with_single_ones():
    shapes = [(9, 7), (6, 9), (9, 7), (9, 7)]
    params, grads, calls = layers(shapes), layers(shapes, 100), []

    def count(position, g, factor, partner):
        calls.append(position)
        return nys.linalg.gram_solve(partner, g)

    actual = jax.jit(lambda g, p: map_gradients(count, nys.pair_spec, g, p))(grads, params)
    assert calls == [0, 1, 0, 1]
    tx = nys.scale_by_gram()
    alone = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
    for k in params:
        chex.assert_trees_all_close(actual[k], alone(grads[k], params[k]), rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_pairs_of_equal_shapes_and_other_layouts_or_dtypes_do_not_mix():
    a, b = normal(1, (4, 4)), normal(2, (4, 4))
    params = {"f": nys.Factors(a, b), "l": {"lora_a": a, "lora_b": b}}
    params["half"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["f"])
    tx = nys.scale_by_gram(0.1)
    actual, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, params)
    for k in params:
        alone, _ = tx.update(params[k], tx.init(params[k]), params[k])
        chex.assert_trees_all_close(actual[k], alone)
    same = {"full": params["f"], "half": params["f"]}
    grads = {"full": params["f"], "half": params["half"]}
    chex.assert_trees_all_equal_dtypes(updates(tx, grads, same), grads)


def test_equal_leaves_share_one_call_where_batch_axes_are_counted_from_the_end():
    params, grads = normal(1, (2, 3, 9, 2)), normal(2, (2, 3, 9, 2))
    of_one = FactorSpec(batch_axes=(-3,))
    actual = updates(
        nys.scale_by_gram(spec={"a": of_one, "b": of_one}),
        *({"a": x[0], "b": x[1]} for x in (grads, params)),
    )
    for i, k in enumerate("ab"):
        single = updates(nys.scale_by_gram(), grads[i], params[i])
        chex.assert_trees_all_close(actual[k], single, rtol=1e-4)


@pytest.mark.long
def test_sharded_pairs_of_equal_shapes_are_solved_together():
    """Sharded over rows, over columns, and not: one stack has leaves of all."""
    code = """
import jax, jax.numpy as jnp, numpy as np, optax, nyscaled as nys
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
normal = lambda i, s: jax.random.normal(jax.random.key(i), s)
pair = lambda i: {"lora_a": normal(i, (8, 2)), "lora_b": normal(i + 9, (2, 8))}
params = {k: pair(i) for i, k in enumerate("pqr")}
spec = {"p": (P("x"), P(None, "y")), "q": (P("y", "x"), P()), "r": (P(), P("x", "y"))}
named = lambda a, b: {"lora_a": NamedSharding(mesh, a), "lora_b": NamedSharding(mesh, b)}
sharding = {k: named(*v) for k, v in spec.items()}
tx = nys.nora_plus(optax.sgd(1.0))
update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
expected = update(params, params)
split = jax.device_put(params, sharding)
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
jax.tree.map(close, update(split, split), expected)
"""
    flags = "--xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "XLA_FLAGS": flags})


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.LoRALinear(9, 7, lora_rank=2, rngs=rngs)
        self.rest = nnx.List([nnx.LoRALinear(7, 7, lora_rank=2, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.rest[1](self.rest[0](self.first(x)))


@pytest.mark.long
def test_nnx_optimizer_finds_the_pairs_of_a_model():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, nys.nora_plus(optax.sgd(0.5)), wrt=nnx.LoRAParam)
    before = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    gradient = nnx.grad(
        lambda m: jnp.sum(m(jnp.ones((3, 9))) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(model)
    optimizer.update(model, gradient)
    after = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    tx = nys.nora_plus(optax.sgd(0.5))
    updates, _ = tx.update(nnx.to_pure_dict(gradient), tx.init(before), before)
    chex.assert_trees_all_close(after, optax.apply_updates(before, updates), rtol=1e-5)
    assert jnp.any(after["rest"][1]["lora"]["lora_b"])


def test_an_orphan_of_a_model_is_named():
    model = Model(nnx.Rngs(0))
    del model.rest[1].lora.lora_b
    with pytest.raises(ValueError, match=r"\['rest'\]\[1\]\['lora'\]\['lora_a'\].*exactly two"):
        nnx.Optimizer(model, nys.nora_plus(optax.sgd(0.5)), wrt=nnx.LoRAParam)


def test_boxes_and_frozen_dicts_of_linen_are_looked_into():
    pair = {"w_lora_a": normal(1, (6, 2)), "w_lora_b": normal(2, (2, 3, 4))}
    boxed = jax.tree.map(
        lambda x: linen.Partitioned(x, names=("data",) + (None,) * (x.ndim - 1)), pair
    )
    tx = nys.lora_p(optax.sgd(1.0))
    expected, _ = tx.update(pair, tx.init(pair), pair)
    for tree in (boxed, FrozenDict(pair)):
        actual, _ = tx.update(tree, tx.init(tree), tree)
        assert jax.tree.structure(actual) == jax.tree.structure(tree)
        chex.assert_trees_all_equal(jax.tree.leaves(actual), jax.tree.leaves(expected))


@pytest.mark.parametrize(
    "spec",
    [FactorSpec(rank_axis=2), FactorSpec(rank_axis=-3), FactorSpec(batch_axes=(1,))],
)
def test_axes_that_a_leaf_does_not_have_are_named(spec):
    with pytest.raises(ValueError, match=r"leaf params has 2 axes, .* expected different axes"):
        nys.scale_by_gram(spec=spec).init(jnp.ones((6, 2)))


@pytest.mark.parametrize(
    "make", [nys.nora_plus, nys.lora_p, nys.reflora, lambda tx: nys.lora_rite()]
)
def test_a_tree_without_pairs_is_refused(make):  # the names are those of torch
    params = {"q": {"lora_A": jnp.ones((2, 6)), "lora_B": jnp.ones((5, 2))}}
    with pytest.raises(ValueError, match=r"no leaf is a factor among \['q'\]\['lora_A'\]"):
        make(optax.sgd(1.0)).init(params)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (
            {"bias": jnp.ones(3), "w": jnp.ones((4, 2))},
            r"leaf \['bias'\] has shape \(3,\).*expected a factor",
        ),
        (
            {"w": jnp.ones((4, 2), jnp.int32)},
            r"leaf \['w'\] has dtype int32.*expected a floating one",
        ),
        (
            {"lora_a": jnp.ones((9, 2)), "lora_b": jnp.ones((3, 7))},
            "lora_a.* and .*lora_b.* do not go together.*same rank",
        ),
        (
            {"lora_a": jnp.ones((3, 9, 2)), "lora_b": jnp.ones((2, 2, 7))},
            "lora_a.* and .*lora_b.* do not go together.*same batch axes",
        ),
        (
            {"lora_a": jnp.ones((9, 0)), "lora_b": jnp.ones((0, 7))},
            "lora_a.* and .*lora_b.* do not go together.*same rank ≥ 1",
        ),
    ],
)
def test_leaves_that_are_no_factors_or_no_pair_are_named(leaves, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        nys.scale_by_gram().init(leaves)


def test_three_leaves_of_one_pair_are_named():
    spec = {k: FactorSpec(pair="p") for k in "abc"}
    named = r"(?s)\['a'\], \['b'\], \['c'\].*3 member\(s\); expected exactly two"
    with pytest.raises(ValueError, match=named):
        nys.scale_by_gram(spec=spec).init({k: jnp.ones((4, 2)) for k in "abc"})
