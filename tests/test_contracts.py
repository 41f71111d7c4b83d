"""Contracts that every transform must meet."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal, one_each

import nyscaled as nys

TRANSFORMS = {
    "exact": lambda spec=None: nys.scale_by_gram(spec=spec),
    "pinv": lambda spec=None: nys.scale_by_gram_pinv(spec=spec),
    "damped_alias": lambda spec=None: nys.scaled_gd(0.5, damping=0.1, spec=spec),
    "nora_plus": lambda spec=None: nys.nora_plus(optax.sgd(0.5), spec=spec),
    "lora_p": lambda spec=None: nys.lora_p(optax.sgd(0.5), spec=spec),
    "lora_plus": lambda spec=None: nys.lora_plus(optax.sgd, 0.5, spec=spec),
    "lora_rite": lambda spec=None: nys.lora_rite(0.5, spec=spec),
    "reflora_s": lambda spec=None: nys.reflora_s(optax.sgd(0.5), warmup_steps=1, spec=spec),
    "reflora": lambda spec=None: nys.reflora(optax.sgd(0.5), warmup_steps=0, spec=spec),
    "precgd": lambda spec=None: nys.precgd(0.5, spec=spec),
}
REQUIRE_VALUE = ("precgd",)
HAVE_MOMENTS = ("lora_rite",)
LOSS = 1.7
PARAMS = {
    "single": lambda: normal(1, (9, 2)),
    "factors": lambda: nys.Factors(normal(1, (9, 2)), normal(2, (7, 2))),
    "lora": lambda: {"q": {"lora_a": normal(1, (9, 2)), "lora_b": normal(2, (2, 7))}},
    "stacked": lambda: {"lora_a": normal(1, (3, 9, 2)), "lora_b": normal(2, (3, 2, 7))},
    "bf16": lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS["factors"]()),
    "qwix": lambda: {"w_lora_a": normal(1, (9, 2)), "w_lora_b": normal(2, (2, 7, 3))},
    "gemma": lambda: {"lora": {"a": normal(1, (3, 3, 2)), "b": normal(2, (2, 7))}},
}
# One list of pairs for each wrapper: what compiles is most of the time of this file.
KINDS = {
    "exact": ("factors", "single", "lora", "stacked", "bf16", "qwix", "gemma"),
    "pinv": ("stacked", "single", "factors", "lora", "bf16"),
    "damped_alias": ("single", "factors", "lora", "stacked", "bf16"),
    "nora_plus": ("lora", "bf16"),
    "lora_p": ("qwix",),
    "lora_plus": ("gemma", "factors", "qwix"),
    "lora_rite": ("lora", "stacked", "bf16", "qwix"),
    "reflora_s": ("gemma",),
    "reflora": ("bf16", "qwix"),
    "precgd": ("single", "bf16"),
}
every_case = pytest.mark.parametrize(("name", "kind"), one_each(TRANSFORMS, KINDS))
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@functools.cache
def made(name):
    """One of each, so that the tests share what `one_update` compiles."""
    return TRANSFORMS[name]()


@pytest.fixture
def tx(name):
    return made(name)


@pytest.fixture
def params(kind):
    return PARAMS[kind]()


def gradients(params, seed=5):
    """A gradient for every leaf, and another for every seed."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [normal(seed + 10 * i, x.shape).astype(x.dtype) for i, x in enumerate(leaves)]
    )


def assert_close(actual, expected):
    bf16 = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (actual, expected)),
        rtol=2e-2 if bf16 else 1e-4,
        atol=1e-2 if bf16 else 1e-6,
    )


def update(tx, grads, state, params):
    """`tx.update` as the solvers call it, with the loss, which most transforms ignore."""
    return optax.with_extra_args_support(tx).update(grads, state, params, value=LOSS)


@functools.cache
def first_update(tx):
    return jax.jit(lambda grads, params: update(tx, grads, tx.init(params), params)[0])


def one_update(tx, params, grads=None):
    """The first update, compiled: a third of the time of compiling op by op."""
    return first_update(tx)(gradients(params) if grads is None else grads, params)


@pytest.mark.long_beyond(4)
@every_case
def test_shapes_and_dtypes_are_kept_and_gradients_are_changed(tx, params):
    state, grads = tx.init(params), gradients(params)
    updates, new_state = update(tx, grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert not np.allclose(u.astype(jnp.float32), g.astype(jnp.float32), rtol=0.05)


@pytest.mark.long_beyond(3)
@every_transform
def test_gradient_in_bfloat16_of_float32_factors_returns_in_bfloat16(tx):
    params = PARAMS["factors"]()
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(params))
    updates = one_update(tx, params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


@pytest.mark.long_beyond(3)
@every_case
def test_jit_vmap_and_scan_agree_with_the_plain_loop(tx, params):
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda x: (0.1 * x).astype(x.dtype), params)
        updates, state = update(tx, grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    def scanned(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=2)

    together = jax.jit(jax.vmap(scanned))(batch)
    for i in range(2):
        carry = jax.tree.map(lambda x, i=i: x[i], batch)
        carry, rows = (carry, tx.init(carry)), []
        for _ in range(2):
            carry, updates = step(carry, None)
            rows.append(updates)
        expected = carry[0], jax.tree.map(lambda *x: jnp.stack(x), *rows)
        (actual, _), history = jax.tree.map(lambda x, i=i: x[i], together)
        assert_close((actual, history), expected)


@pytest.mark.long_beyond(3)
@every_case
def test_second_update_of_equal_shapes_does_not_compile(tx, params):
    traces = []

    @jax.jit
    def counted(grads, state, params):
        traces.append(None)
        return update(tx, grads, state, params)

    state = tx.init(params)
    for seed in range(2):
        _, state = counted(gradients(params, seed), state, params)
    assert len(traces) == 1


@pytest.mark.long_beyond(2)
@every_case
def test_chain_applies_the_next_transform_to_the_preconditioned_gradient(tx, params):
    actual = one_update(optax.chain(tx, optax.scale(-0.25)), params)
    assert_close(actual, jax.tree.map(lambda u: -0.25 * u, one_update(tx, params)))


@pytest.mark.long_beyond(3)
@every_case
def test_multi_steps_applies_the_update_of_the_mean_gradient(tx, params):
    first, second = gradients(params, 1), gradients(params, 2)
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    state = multi.init(params)
    accumulate = jax.jit(functools.partial(multi.update, value=LOSS))
    waiting, state = accumulate(first, state, params)
    chex.assert_trees_all_equal(waiting, jax.tree.map(jnp.zeros_like, params))
    actual, _ = accumulate(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert_close(actual, one_update(tx, params, mean))


@pytest.mark.long_beyond(2)
@every_case
def test_partition_and_masked_leave_other_leaves_to_others(tx, params):
    tree = {"factor": params, "bias": jnp.ones(3)}
    grads = {"factor": gradients(params), "bias": jnp.full(3, 2.0)}
    labels = {"factor": "gram", "bias": "sgd"}
    split = optax.partition({"gram": tx, "sgd": optax.sgd(1.0)}, labels)
    mine = one_update(tx, params, grads["factor"])
    assert_close(one_update(split, tree, grads), {"factor": mine, "bias": -grads["bias"]})
    masked = optax.masked(tx, {"factor": True, "bias": False})
    assert_close(one_update(masked, tree, grads), {"factor": mine, "bias": grads["bias"]})


@every_case
def test_extra_arguments_are_ignored(name, tx, params):
    wide = optax.with_extra_args_support(optax.chain(tx, optax.scale(1.0)))
    state, grads = wide.init(params), gradients(params)
    values = [LOSS] if name in REQUIRE_VALUE else [None, 1.0]
    for value in values:
        extra = {} if value is None else {"value": value, "unknown": None}
        assert_close(wide.update(grads, state, params, **extra)[0], one_update(tx, params))


@every_case
def test_map_params_reaches_the_moments_of_an_inner_optimizer_and_only_them(name, tx, params):
    if name in HAVE_MOMENTS:
        return  # `test_transforms_rite` says which
    chained = optax.chain(tx, optax.trace(0.9))
    state = chained.init(params)
    mapped = optax.tree.map_params(chained, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[0], state[0])
    chex.assert_trees_all_equal(mapped[1].trace, jax.tree.map(jnp.ones_like, params))


@every_case
def test_update_without_params_raises(tx, params):
    with pytest.raises(ValueError, match=r"params is None; expected the current parameters"):
        update(tx, gradients(params), tx.init(params), None)


@pytest.mark.parametrize("lonely", ["lora_a", "lora_b", "left", "right"])
@every_transform
def test_orphan_leaf_is_named(tx, lonely):
    params = {"layer": {lonely: normal(0, (4, 4))}, "other": PARAMS["lora"]()}
    with pytest.raises(ValueError, match=rf"leaf \['layer'\]\['{lonely}'\].*expected exactly two"):
        tx.init(params)


@every_transform
def test_masking_the_partner_away_makes_an_orphan(tx):
    masked = optax.masked(tx, {"lora_a": True, "lora_b": False})
    with pytest.raises(ValueError, match=r"lora_a.*expected exactly two"):
        masked.init({"lora_a": normal(0, (9, 2)), "lora_b": normal(1, (2, 7))})


@pytest.mark.long_beyond(2)
@every_transform
def test_stacked_factors_are_preconditioned_layer_by_layer(tx):
    params = PARAMS["stacked"]()
    grads = gradients(params)
    layers = [
        one_update(tx, *(jax.tree.map(lambda x, i=i: x[i], t) for t in (params, grads)))
        for i in range(3)
    ]
    assert_close(one_update(tx, params, grads), jax.tree.map(lambda *x: jnp.stack(x), *layers))


@pytest.mark.long_beyond(2)
@every_transform
def test_groups_do_not_see_each_other(name, tx):
    params = {"one": PARAMS["lora"](), "two": PARAMS["factors"](), "three": PARAMS["single"]()}
    grads = gradients(params)
    together = one_update(tx, params, grads)
    names = params if "single" in KINDS[name] else ("one", "two")  # a tree must have a factor
    apart = {k: one_update(tx, params[k], grads[k]) for k in names}
    assert_close({k: together[k] for k in names}, apart)


@every_case
def test_tree_and_callable_specs_agree_with_the_default(name, params):
    tree = nys.default_spec(params)
    for spec in (tree, lambda _: tree):
        assert_close(one_update(TRANSFORMS[name](spec), params), one_update(made(name), params))


@pytest.mark.parametrize("kind", ["tree", "callable"])
def test_map_params_works_with_a_spec_of_ones_own(kind):
    params = PARAMS["lora"]()
    tree = nys.default_spec(params)
    spec = tree if kind == "tree" else lambda _: tree
    chained = optax.chain(nys.scale_by_gram(spec=spec), optax.trace(0.9))
    state = chained.init(params)
    mapped = optax.tree.map_params(chained, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[1].trace, jax.tree.map(jnp.ones_like, params))


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize("kind", PARAMS)
def test_injected_hyperparameters_act_and_can_be_changed(params):
    injected = optax.inject_hyperparams(nys.scaled_gd)(learning_rate=0.5, damping=0.1)
    grads, state = gradients(params), injected.init(params)
    update = jax.jit(injected.update)
    assert_close(update(grads, state, params)[0], one_update(nys.scaled_gd(0.5, 0.1), params))
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    state.hyperparams["damping"] = jnp.float32(0.0)
    assert_close(update(grads, state, params)[0], one_update(nys.scaled_gd(0.25), params))


def test_injected_schedule_acts():
    params = PARAMS["factors"]()
    injected = optax.inject_hyperparams(nys.scaled_gd)(
        learning_rate=nys.solvers.staircase(0.5, every=1), damping=0.1
    )
    state = injected.init(params)
    for rate in (0.5, 0.05):
        actual, state = injected.update(gradients(params), state, params)
        assert_close(actual, one_update(nys.scaled_gd(rate, 0.1), params))


@pytest.mark.long
@pytest.mark.parametrize("alias", [nys.nora_plus, nys.lora_p])
def test_injected_damping_of_an_alias_acts_as_a_constant_and_as_a_schedule(alias):
    params, inner = PARAMS["lora"](), optax.sgd(0.5)

    def two_updates(tx):
        update, state, actual = jax.jit(tx.update), tx.init(params), []
        for _ in range(2):
            updates, state = update(gradients(params), state, params)
            actual.append(updates)
        return actual

    injected = optax.inject_hyperparams(alias)
    schedule = optax.piecewise_constant_schedule(0.1, {1: 10.0})
    scheduled = two_updates(injected(inner, damping=schedule))
    constant = two_updates(injected(inner, damping=0.1))
    small, large = (two_updates(alias(inner, damping=d)) for d in (0.1, 1.0))
    assert_close(constant, small)
    assert_close(scheduled, [small[0], large[1]])
    assert not np.allclose(small[1]["q"]["lora_a"], large[1]["q"]["lora_a"], rtol=0.05)
