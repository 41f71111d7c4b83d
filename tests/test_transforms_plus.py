"""LoRA+: learning rates of the two factors."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import normal

import nyscaled as nys

PARAMS = {
    "ours": {"adapters": {"default": {"lora_a": normal(0, (6, 2)), "lora_b": normal(1, (2, 5))}}},
    "flax": {"lora_a": normal(2, (6, 2)), "lora_b": normal(3, (2, 5))},
    "qwix": {"w_lora_a": normal(4, (6, 2)), "w_lora_b": normal(5, (2, 5))},
    "gemma": {"lora": {"a": normal(6, (6, 2)), "b": normal(7, (2, 5))}},
    "head": {"kernel": normal(8, (4, 3)), "bias": normal(9, (3,))},
}
LABELS = {
    "ours": {"adapters": {"default": {"lora_a": "slow", "lora_b": "fast"}}},
    "flax": {"lora_a": "slow", "lora_b": "fast"},
    "qwix": {"w_lora_a": "slow", "w_lora_b": "fast"},
    "gemma": {"lora": {"a": "slow", "b": "fast"}},
    "head": {"kernel": "slow", "bias": "slow"},
}
RATE, RATIO = 1e-2, 3.0


def steps(tx, params=PARAMS, count=3):
    """The parameters after some steps on sums of cubes."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(count):
        updates, state = update(jax.tree.map(lambda x: 3 * x**2, params), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd, lambda rate: optax.adamw(rate, weight_decay=0.1)],
    ids=["sgd", "adamw"],
)
def test_factors_have_the_learning_rates_of_two_optimizers(optimizer):
    two = optax.partition({"slow": optimizer(RATE), "fast": optimizer(RATE * RATIO)}, LABELS)
    actual = steps(nys.lora_plus(optimizer, RATE, RATIO))
    chex.assert_trees_all_close(actual, steps(two), rtol=1e-5)


def test_schedules_and_injected_numbers_act():
    schedule = optax.linear_schedule(RATE, 0.0, 4)
    two = optax.partition(
        {"slow": optax.sgd(schedule), "fast": optax.sgd(lambda count: RATIO * schedule(count))},
        LABELS,
    )
    chex.assert_trees_all_close(
        steps(nys.lora_plus(optax.sgd, schedule, RATIO)), steps(two), rtol=1e-5
    )
    injected = optax.inject_hyperparams(nys.lora_plus, static_args="optimizer")
    tx = injected(optax.sgd, learning_rate=schedule, ratio=RATIO)
    chex.assert_trees_all_close(steps(tx), steps(two), rtol=1e-5)


def test_defaults_are_the_documented_ones():
    actual = steps(nys.lora_plus(optax.sgd))
    chex.assert_trees_all_equal(actual, steps(nys.lora_plus(optax.sgd, 2e-4, 16.0)))


def test_rates_that_go_uphill_are_refused():
    with pytest.raises(ValueError, match=r"ratio is 0; expected a number in \(0, inf\)"):
        nys.lora_plus(optax.sgd, RATE, 0.0)
    with pytest.raises(ValueError, match=r"learning_rate is -1; expected a number in \[0, inf\)"):
        nys.lora_plus(optax.sgd, -1.0)


def test_a_preconditioner_may_be_inside():
    params = {"lora_a": normal(0, (6, 2)), "lora_b": normal(1, (2, 5))}
    inside = nys.lora_plus(lambda rate: nys.nora_plus(optax.sgd(rate)), RATE, RATIO)
    alone = nys.nora_plus(optax.sgd(RATE))
    a, b = (tx.update(params, tx.init(params), params)[0] for tx in (inside, alone))
    chex.assert_trees_all_close(a, {**b, "lora_b": RATIO * b["lora_b"]})
    assert jnp.any(b["lora_b"])
