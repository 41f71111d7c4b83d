"""Contracts that every initializer and every step must meet."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import M, N, R, normal, psd, rectangular

import nyscaled as nys

# --- Initializers --------------------------------------------------------------------------------


def _problems():
    return nys.problems.Symmetric(psd()[0]), nys.problems.Asymmetric(rectangular()[0])


def _entries():
    """Every third entry of the matrix."""
    rows, columns = jnp.divmod(jnp.arange(0, M * M, 3), M)
    return nys.problems.completion.observed(rows, columns, psd()[0][rows, columns], (M, M))


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
    "sensing_from_gradient": lambda key, s: nys.initializers.nystrom_from_gradient(
        key, _entries().gradient, M, R, s
    ),
    "perturbed": lambda key, s: nys.initializers.perturbed(key, psd()[0], R, s, noise=s),
    "small": lambda key, s: nys.initializers.small(key, M, R, s),
    "small_factors": lambda key, s: nys.initializers.small_factors(key, (M, N), R, s),
}


@pytest.mark.long_beyond(4)
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
    expected = jax.tree.map(lambda x: 0.01 * x, start(jax.random.key(1), 1.0))
    chex.assert_trees_all_close(start(jax.random.key(1), 0.01), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.long_beyond(2)
@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializer_under_jit_and_vmap_agrees_with_itself(name):
    start = INITIALIZERS[name]
    keys = jax.random.split(jax.random.key(3), 2)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(start(k, 0.5) for k in keys))
    found = jax.jit(jax.vmap(lambda k: start(k, 0.5)))(keys)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


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
    "modified": lambda p: nys.solvers.modified_step(p, optax.sgd(0.01), at=1, beta=2.0),
}
SYMMETRIC_STEPS |= {
    "newton": nys.solvers.scaled_newton_step,
    "qdwh": nys.solvers.qdwh_step,
}
STEPS = [("symmetric", k) for k in SYMMETRIC_STEPS] + [("asymmetric", k) for k in ASYMMETRIC_STEPS]


def instance(kind, seed):
    """A matrix, what makes a problem of it, and a generic start."""
    if kind == "symmetric":
        return psd(seed)[0], nys.problems.Symmetric, normal(seed + 7, (M, R))
    start = nys.Factors(normal(seed + 7, (M, R)), normal(seed + 8, (N, R)))
    return rectangular(seed)[0], nys.problems.Asymmetric, start


@pytest.mark.long_beyond(3)
@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_step_is_a_triple_of_pure_functions_that_run_agrees_with(kind, name):
    a, problem, start = instance(kind, 0)
    step = (SYMMETRIC_STEPS if kind == "symmetric" else ASYMMETRIC_STEPS)[name](problem(a))
    state = step.init(start)
    chex.assert_trees_all_close(step.params(state), start, atol=1e-5)
    rows = [step.params(state)]
    for _ in range(2):
        new = step.update(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
        rows.append(step.params(state))
    assert step.status(state) == nys.solvers.Status.MAX_STEPS
    solution = nys.solvers.run(step, start, 2, record=lambda x: x)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    chex.assert_trees_all_close(solution.history, expected, rtol=1e-3, atol=1e-4)
    assert jax.tree.leaves(solution.history)[0].shape[0] == 3
    assert not np.allclose(jax.tree.leaves(rows[0])[0], jax.tree.leaves(rows[-1])[0])


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if name == "scaled" else [pytest.mark.long])
        for kind, name in STEPS
    ],
)
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
    expected = jax.tree.map(lambda *x: jnp.stack(x), *map(final, matrices, starts))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def large_constants_are_errors():
    """Raises where a compiled program contains an array of 1000 bytes or more."""
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 1000)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="A large amount of constants were captured")
        yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize(("kind", "name"), STEPS)
@pytest.mark.usefixtures("large_constants_are_errors")
def test_no_compiled_program_contains_the_matrix(kind, name):
    a, problem, start = instance(kind, 0)
    problem = problem(a)
    step = (SYMMETRIC_STEPS if kind == "symmetric" else ASYMMETRIC_STEPS)[name](problem)
    step.update(step.init(start))
    nys.solvers.run(step, start, 3, problem.loss)
    nys.solvers.run_until(step, start, problem.loss, tol=0.0, max_steps=3)


@pytest.mark.usefixtures("large_constants_are_errors")
def test_a_matrix_that_is_a_constant_of_a_program_is_seen():
    a, problem, start = instance("symmetric", 0)
    step = nys.solvers.scaled_step(problem(a))
    with pytest.raises(UserWarning, match="constants were captured"):
        jax.jit(lambda state: step.update(state))(step.init(start))


def test_an_update_on_another_matrix_does_not_compile_again():
    sizes = []
    for seed in range(2):
        a, problem, start = instance("symmetric", seed)
        step = nys.solvers.scaled_step(problem(a), 0.5 - 0.1 * seed)
        step.update(step.init(start))
        sizes.append(nys.solvers.ScaledStep.update._cache_size())
    assert sizes[0] == sizes[1]
