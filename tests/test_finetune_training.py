"""The compiled step: micro-batches, dropout, dtypes, and what shares a program."""

import jax
import jax.numpy as jnp
import model_cases
import numpy as np
import pytest
from flax import nnx
from training_cases import PHRASES, adapted, made, model_of, one_step, program

import nyscaled as nys
from nyscaled.finetune import schedules, training

ROWS = np.arange(8)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("objective", "answers"), [("tokens", PHRASES), ("choice", ((7,), (8,)))])
def test_micro_batches_are_one_batch(objective, answers):
    """Although they hold different numbers of tokens, and one has only two examples."""
    parts, _ = adapted()
    step = program(parts, objective)
    rows = np.where(ROWS < 6, ROWS, -1)
    batch = made(objective, answers).batch(rows)
    _, whole = one_step(parts, step, batch)
    _, split = one_step(parts, step, batch, count=4)
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    assert float(split.gradient_norm) == pytest.approx(float(whole.gradient_norm), rel=1e-5)
    read = sum(len(row.tokens) for i in rows[:6] for row in made(objective, answers).rows[i])
    assert int(split.tokens) == int(whole.tokens) == read


@pytest.mark.long
def test_a_step_is_adam_on_the_mean_of_the_losses():
    parts, _ = adapted()
    step, batch = program(parts), made("tokens", PHRASES).batch(ROWS)
    state, measured = one_step(parts, step, batch)

    def mean(params):
        whole = nnx.merge(parts.training, params, parts.counts, parts.frozen, copy=True)
        logits = jax.nn.log_softmax(whole(batch.tokens, batch.mask))
        at = jnp.take_along_axis(logits, jnp.asarray(batch.positions)[..., None], 1)
        losses = -jnp.take_along_axis(at, jnp.asarray(batch.targets)[..., None], 2)[..., 0]
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

    loss, gradient = jax.value_and_grad(mean)(parts.params)
    assert float(measured.loss) == pytest.approx(float(loss), rel=1e-5)
    # The first step of Adam is the sign of the gradient.
    for new, old, g in zip(
        leaves(state.params), leaves(parts.params), leaves(gradient), strict=True
    ):
        large = np.abs(g) > 1e-5
        np.testing.assert_allclose((new - old)[large], -1e-2 * np.sign(g)[large], rtol=1e-2)
    assert int(state.step) == 1


def test_the_gradient_is_clipped():
    parts, _ = adapted()
    batch = made("tokens", PHRASES).batch(ROWS)
    moments = []
    for clip in (None, 1e-3):
        state, measured = one_step(parts, program(parts, clip=clip), batch)
        adam = next(x for x in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(x))
        moments.append(float(nys.numerics.tree_norm(adam.mu)))
    assert moments[1] == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert moments[0] == pytest.approx(0.1 * float(measured.gradient_norm), rel=1e-3)


def _is_adam(x):
    return hasattr(x, "mu")


def test_starts_and_learning_rates_share_a_program():
    step = training.train_step
    batch = made().batch(ROWS)
    parts, _ = adapted("nora", scale=0.1)
    one_step(parts, program(parts), batch)
    size = step._cache_size()
    for method, options in (("nora", {"scale": 0.5}), ("nora", {"key": 3}), ("lora", {})):
        other, _ = adapted(method, **options)
        one_step(other, program(other, method=method), batch, rate=1e-3)
    assert step._cache_size() == size


def test_the_model_has_its_inits_after_the_split():
    _, model = adapted("nora", scale=0.5)
    layer = next(iter(nys.lora.adapted_layers(model).values()))
    assert layer.adapters["default"].init == ("nora", (("scale", 0.5),))


def test_a_step_that_is_not_finite_changes_nothing():
    parts, _ = adapted()
    step, batch = program(parts), made("tokens", PHRASES).batch(ROWS)
    state, _ = one_step(parts, step, batch)
    before = leaves(state)
    broken = batch._replace(weights=np.where(batch.weights > 0, np.nan, 0).astype(np.float32))
    state, measured = one_step(parts, step, broken, state=state)
    assert not bool(measured.finite)
    state, measured = one_step(parts, step, batch, state=state)
    assert not bool(measured.finite)  # nothing follows it
    for new, old in zip(leaves(state._replace(finite=jnp.ones((), bool))), before, strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.long
def test_dropout_is_a_function_of_the_step_and_off_in_validation():
    parts, _ = adapted("pissa", dropout=0.5)
    step, batch = program(parts, method="pissa"), made("tokens", PHRASES).batch(ROWS)
    runs = []
    for _ in range(2):
        losses, state = [], None
        for _ in range(3):
            state, measured = one_step(parts, step, batch, state=state, rate=0.0)
            losses.append(float(measured.loss))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3
    losses = [training.validate(parts.params, parts, [batch], step) for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.long
def test_a_narrow_base_has_wide_adapters_and_moments():
    model, _ = nys.models.load(model_cases.MODELS / "llama", dtype=jnp.bfloat16)
    method = nys.finetune.method("full")
    parts = training.split(model, method.prepare(model, targets=".*", key=jax.random.key(0)))
    batch = made("tokens", PHRASES).batch(ROWS)
    state, _ = one_step(parts, program(parts, method="full"), batch, rate=1e-5)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moved = [
        np.any(x != y) for x, y in zip(leaves(state.params), leaves(parts.params), strict=True)
    ]
    assert all(moved)  # in bfloat16, 1 + 1e-5 is 1
    training.update(model, state.params)
    assert model.layers.self_attn.q_proj.kernel.dtype == jnp.bfloat16


def test_update_writes_what_was_trained():
    parts, model = adapted("nora", key=7)
    batch = made("tokens", PHRASES).batch(ROWS)
    state, _ = one_step(parts, program(parts), batch)
    training.update(model, state.params)
    trained = model_of(parts._replace(params=state.params))
    model.eval()
    np.testing.assert_array_equal(model(batch.tokens), trained(batch.tokens))


def test_schedules():
    rates = [schedules.schedule(name, 2.0, 10, 2) for name in ("constant", "linear", "cosine")]
    for rate in rates:
        assert [float(rate(step)) for step in (0, 1, 2)] == [1.0, 2.0, 2.0]
    assert [float(rate(6)) for rate in rates] == pytest.approx([2.0, 1.0, 1.0])
    assert [float(rate(10)) for rate in rates] == pytest.approx([2.0, 0.0, 0.0])
    rising = schedules.schedule("linear", 2.0, 4, 4)
    assert [float(rising(step)) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
