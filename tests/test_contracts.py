"""Contracts that every transform, every initializer and every step must meet."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, N, R, normal, psd, rectangular

import nyscaled as nys

# --- Transforms ----------------------------------------------------------------------------------

TRANSFORMS = {
    "exact": lambda: nys.scale_by_gram(),
    "pseudo_inverse": lambda: nys.scale_by_gram(pseudo_inverse=True),
    "damped_alias": lambda: nys.scaled_gd(0.5, damping=0.1),
}
PARAMS = {
    "single": lambda: normal(1, (9, 2)),
    "factors": lambda: nys.Factors(normal(1, (9, 2)), normal(2, (7, 2))),
    "lora": lambda: {"q": {"lora_a": normal(1, (9, 2)), "lora_b": normal(2, (2, 7))}},
    "stacked": lambda: {"lora_a": normal(1, (3, 9, 2)), "lora_b": normal(2, (3, 2, 7))},
    "bf16": lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS["factors"]()),
}


@pytest.fixture(params=TRANSFORMS)
def tx(request):
    return TRANSFORMS[request.param]()


@pytest.fixture(params=PARAMS)
def params(request):
    return PARAMS[request.param]()


def gradients(params, seed=5):
    """A gradient for every leaf, and another for every seed."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [normal(seed + 10 * i, x.shape).astype(x.dtype) for i, x in enumerate(leaves)]
    )


def assert_close(found, wanted):
    bf16 = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (found, wanted)),
        rtol=2e-2 if bf16 else 1e-4,
        atol=1e-2 if bf16 else 1e-6,
    )


def one_update(tx, params, grads=None):
    """The first update, compiled: a third of the time of compiling op by op."""
    grads = gradients(params) if grads is None else grads
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


def test_updates_and_state_keep_their_shapes_and_dtypes_and_updates_are_not_the_gradients(
    tx, params
):
    state, grads = tx.init(params), gradients(params)
    updates, new_state = tx.update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert not np.allclose(u.astype(jnp.float32), g.astype(jnp.float32), rtol=0.05)


def test_gradient_in_bfloat16_of_float32_factors_returns_in_bfloat16(tx):
    params = PARAMS["factors"]()
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(params))
    updates = one_update(tx, params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


def test_jit_vmap_and_scan_agree_with_the_plain_loop(tx, params):
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda x: (0.1 * x).astype(x.dtype), params)
        updates, state = tx.update(grads, state, params)
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
        wanted = carry[0], jax.tree.map(lambda *x: jnp.stack(x), *rows)
        (found, _), history = jax.tree.map(lambda x, i=i: x[i], together)
        assert_close((found, history), wanted)


def test_second_update_of_equal_shapes_does_not_compile(tx, params):
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for seed in range(2):
        _, state = update(gradients(params, seed), state, params)
    assert len(traces) == 1


def test_chain_applies_the_next_transform_to_the_preconditioned_gradient(tx, params):
    found = one_update(optax.chain(tx, optax.scale(-0.25)), params)
    assert_close(found, jax.tree.map(lambda u: -0.25 * u, one_update(tx, params)))


def test_multi_steps_applies_the_update_of_the_mean_gradient(tx, params):
    first, second = gradients(params, 1), gradients(params, 2)
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    state = multi.init(params)
    waiting, state = multi.update(first, state, params)
    chex.assert_trees_all_equal(waiting, jax.tree.map(jnp.zeros_like, params))
    found, _ = multi.update(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert_close(found, one_update(tx, params, mean))


def test_partition_and_masked_leave_other_leaves_to_others(tx, params):
    tree = {"factor": params, "bias": jnp.ones(3)}
    grads = {"factor": gradients(params), "bias": jnp.full(3, 2.0)}
    labels = {"factor": "gram", "bias": "sgd"}
    split = optax.partition({"gram": tx, "sgd": optax.sgd(1.0)}, labels)
    mine = one_update(tx, params, grads["factor"])
    assert_close(one_update(split, tree, grads), {"factor": mine, "bias": -grads["bias"]})
    masked = optax.masked(tx, {"factor": True, "bias": False})
    assert_close(one_update(masked, tree, grads), {"factor": mine, "bias": grads["bias"]})


def test_extra_arguments_pass_by(tx, params):
    wide = optax.with_extra_args_support(optax.chain(tx, optax.scale(1.0)))
    state = wide.init(params)
    found, _ = wide.update(gradients(params), state, params, value=1.0, unknown=None)
    assert_close(found, one_update(tx, params))


def test_map_params_reaches_the_moments_of_an_inner_optimizer_and_only_them(tx, params):
    chained = optax.chain(tx, optax.trace(0.9))
    state = chained.init(params)
    mapped = optax.tree.map_params(chained, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[0], state[0])
    chex.assert_trees_all_equal(mapped[1].trace, jax.tree.map(jnp.ones_like, params))


def test_update_without_params_raises(tx, params):
    with pytest.raises(ValueError, match=r"params is None; wanted the current parameters"):
        tx.update(gradients(params), tx.init(params))


@pytest.mark.parametrize("lonely", ["lora_a", "lora_b", "left", "right"])
def test_orphan_leaf_is_named(tx, lonely):
    params = {"layer": {lonely: normal(0, (4, 4))}, "other": PARAMS["lora"]()}
    with pytest.raises(ValueError, match=rf"leaf \['layer'\]\['{lonely}'\].*wanted exactly two"):
        tx.init(params)


def test_masking_the_partner_away_makes_an_orphan(tx):
    masked = optax.masked(tx, {"lora_a": True, "lora_b": False})
    with pytest.raises(ValueError, match=r"lora_a.*wanted exactly two"):
        masked.init({"lora_a": normal(0, (9, 2)), "lora_b": normal(1, (2, 7))})


def test_stacked_factors_are_preconditioned_layer_by_layer(tx):
    params = PARAMS["stacked"]()
    grads = gradients(params)
    layers = [
        one_update(tx, *(jax.tree.map(lambda x, i=i: x[i], t) for t in (params, grads)))
        for i in range(3)
    ]
    assert_close(one_update(tx, params, grads), jax.tree.map(lambda *x: jnp.stack(x), *layers))


def test_groups_do_not_see_each_other(tx):
    params = {"one": PARAMS["lora"](), "two": PARAMS["factors"](), "three": PARAMS["single"]()}
    grads = gradients(params)
    alone = {k: one_update(tx, params[k], grads[k]) for k in params}
    assert_close(one_update(tx, params, grads), alone)


def test_tree_and_callable_specs_agree_with_the_default(tx, params, request):
    name = request.node.callspec.params["tx"]
    tree = nys.default_spec(params)
    make = {
        "exact": lambda spec: nys.scale_by_gram(spec=spec),
        "pseudo_inverse": lambda spec: nys.scale_by_gram(pseudo_inverse=True, spec=spec),
        "damped_alias": lambda spec: nys.scaled_gd(0.5, damping=0.1, spec=spec),
    }[name]
    for spec in (tree, lambda _: tree):
        assert_close(one_update(make(spec), params), one_update(tx, params))


@pytest.mark.parametrize("kind", ["tree", "callable"])
def test_map_params_works_with_a_spec_of_ones_own(kind):
    params = PARAMS["lora"]()
    tree = nys.default_spec(params)
    spec = tree if kind == "tree" else lambda _: tree
    chained = optax.chain(nys.scale_by_gram(spec=spec), optax.trace(0.9))
    state = chained.init(params)
    mapped = optax.tree.map_params(chained, lambda x: x + 1, state)
    chex.assert_trees_all_equal(mapped[1].trace, jax.tree.map(jnp.ones_like, params))


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
        found, state = injected.update(gradients(params), state, params)
        assert_close(found, one_update(nys.scaled_gd(rate, 0.1), params))


# --- Initializers --------------------------------------------------------------------------------


def _problems():
    return nys.problems.Symmetric(psd()[0]), nys.problems.Asymmetric(rectangular()[0])


INITIALIZERS = {
    "nystrom": lambda key, s: nys.initializers.nystrom(key, psd()[0], R, s),
    "nystrom_stiefel": lambda key, s: nys.initializers.nystrom(
        key, psd()[0], R, s, sketch="stiefel"
    ),
    "nystrom_factors": lambda key, s: nys.initializers.nystrom_factors(key, rectangular()[0], R, s),
    "nystrom_factors_stiefel": lambda key, s: nys.initializers.nystrom_factors(
        key, rectangular()[0], R, s, sketch="stiefel"
    ),
    "nystrom_factors_from_gradient": lambda key, s: nys.initializers.nystrom_factors_from_gradient(
        key, _problems()[1].gradient, (M, N), R, s
    ),
    "nystrom_from_gradient": lambda key, s: nys.initializers.nystrom_from_gradient(
        key, _problems()[0].gradient, M, R, s
    ),
    "perturbed": lambda key, s: nys.initializers.perturbed(key, psd()[0], R, s, noise=s),
    "small": lambda key, s: nys.initializers.small(key, M, R, s),
    "small_factors": lambda key, s: nys.initializers.small_factors(key, (M, N), R, s),
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializer_has_its_shape_and_dtype_and_is_a_function_of_the_key(name):
    start = INITIALIZERS[name]
    first = start(jax.random.key(1), 1.0)
    for leaf, side in zip(jax.tree.leaves(first), (M, N), strict=False):
        chex.assert_shape(leaf, (side, R))
        chex.assert_type(leaf, jnp.float32)
    chex.assert_tree_all_finite(first)
    chex.assert_trees_all_equal(start(jax.random.key(1), 1.0), first)
    left, other = (jax.tree.leaves(start(jax.random.key(k), 1.0))[0] for k in (1, 2))
    assert jnp.linalg.norm(left - other) > 0.1 * jnp.linalg.norm(left)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializer_is_linear_in_its_scale(name):
    start = INITIALIZERS[name]
    wanted = jax.tree.map(lambda x: 0.01 * x, start(jax.random.key(1), 1.0))
    chex.assert_trees_all_close(start(jax.random.key(1), 0.01), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializer_under_jit_and_vmap_agrees_with_itself(name):
    start = INITIALIZERS[name]
    keys = jax.random.split(jax.random.key(3), 2)
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *(start(k, 0.5) for k in keys))
    found = jax.jit(jax.vmap(lambda k: start(k, 0.5)))(keys)
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)


# --- Steps ---------------------------------------------------------------------------------------

SYMMETRIC_STEPS = {
    "scaled": lambda p: nys.solvers.scaled_step(p, 0.5),
    "scaled_damped": lambda p: nys.solvers.scaled_step(p, 0.5, damping=0.1),
    "scaled_schedule": lambda p: nys.solvers.scaled_step(p, nys.solvers.staircase(0.5)),
    "gd": lambda p: nys.solvers.gradient_step(p, optax.sgd(0.01)),
    "gradient_scaled": lambda p: nys.solvers.gradient_step(p, nys.scaled_gd(0.5)),
    "gradient_damped": lambda p: nys.solvers.gradient_step(p, nys.scaled_gd(0.5, 0.1)),
}
ASYMMETRIC_STEPS = SYMMETRIC_STEPS | {
    "alternating": lambda p: nys.solvers.alternating_step(p, optax.sgd(0.01)),
    "alternating_scaled": lambda p: nys.solvers.alternating_step(p, nys.scaled_gd(0.5)),
}
STEPS = [("symmetric", k) for k in SYMMETRIC_STEPS] + [("asymmetric", k) for k in ASYMMETRIC_STEPS]


def instance(kind, seed):
    """A matrix, what makes a problem of it, and a generic start."""
    if kind == "symmetric":
        return psd(seed)[0], nys.problems.Symmetric, normal(seed + 7, (M, R))
    start = nys.Factors(normal(seed + 7, (M, R)), normal(seed + 8, (N, R)))
    return rectangular(seed)[0], nys.problems.Asymmetric, start


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_step_is_a_triple_of_pure_functions_that_run_agrees_with(kind, name):
    a, problem, start = instance(kind, 0)
    step = (SYMMETRIC_STEPS if kind == "symmetric" else ASYMMETRIC_STEPS)[name](problem(a))
    init, update, params = jax.jit(step.init), jax.jit(step.update), jax.jit(step.params)
    state = init(start)
    chex.assert_trees_all_close(params(state), start, atol=1e-5)
    rows = [params(state)]
    for _ in range(2):
        new = update(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
        rows.append(params(state))
    solution = nys.solvers.run(step, start, 2, record=lambda x: x)
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    chex.assert_trees_all_close(solution.history, wanted, rtol=1e-3, atol=1e-4)
    assert jax.tree.leaves(solution.history)[0].shape[0] == 3
    assert not np.allclose(jax.tree.leaves(rows[0])[0], jax.tree.leaves(rows[-1])[0])


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_steps_are_batched_over_matrices_and_starts_by_vmap(kind, name):
    build = (SYMMETRIC_STEPS if kind == "symmetric" else ASYMMETRIC_STEPS)[name]
    problem = instance(kind, 0)[1]
    matrices, starts = zip(
        *((a, x) for a, _, x in (instance(kind, s) for s in (0, 1))), strict=True
    )

    def final(a, start):
        return nys.solvers.run(build(problem(a)), start, 2).params

    stack = [jax.tree.map(lambda *x: jnp.stack(x), *t) for t in (matrices, starts)]
    found = jax.jit(jax.vmap(final))(*stack)
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *map(final, matrices, starts))
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-4)
