"""optimality: measures agree with their definitions and do not cancel."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cases import M, N, R, exact_residual, normal, psd, rectangular
from hypothesis import given
from hypothesis import strategies as st

import nyscaled as nys
from nyscaled import optimality

SPECTRUM = jnp.array([1.0, 0.8, 0.5, 0.2])
seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("rank", [R - 1, R, R + 2])
def test_residual_in_basis_is_the_residual(rank):
    a, basis = psd()
    x = normal(1, (M, rank))
    found = optimality.residual_in_basis(x, basis, SPECTRUM)
    np.testing.assert_allclose(found, exact_residual(x, a), rtol=1e-5)


def test_residual_in_basis_sees_what_the_expansion_cannot():
    basis = jnp.eye(M)[:, :R]
    x = (basis * jnp.sqrt(SPECTRUM)).at[M - 1, 0].set(1e-6)
    # XXᵀ − A has two entries 1e-6 (and one of 1e-12): far below √eps·‖A‖.
    found = optimality.residual_in_basis(x, basis, jnp.sqrt(SPECTRUM) ** 2)
    np.testing.assert_allclose(found, np.sqrt(2) * 1e-6, rtol=0.05)


@pytest.mark.parametrize("rank", [R - 1, R])
def test_global_optima_are_weakly_optimal_and_weak_ones_need_not_be_global(rank):
    a, basis = psd()
    problem = nys.problems.Symmetric(a)
    assert optimality.weak_optimality(problem.optimum(rank), basis, SPECTRUM) < 1e-5
    worst = (basis * jnp.sqrt(SPECTRUM))[:, -1:]
    assert optimality.weak_optimality(worst, basis, SPECTRUM) < 1e-5
    assert problem.loss(worst) > 2 * problem.loss(problem.optimum(1))


def test_weak_optimality_is_its_definition():
    a, basis = psd()
    x = normal(1, (M, 3))
    gram = x.T @ np.linalg.pinv(np.asarray(a, np.float64), rcond=1e-4) @ x
    np.testing.assert_allclose(optimality.weak_gram(x, basis, SPECTRUM), gram, rtol=1e-3, atol=1e-3)
    expected = np.linalg.norm(gram - np.eye(3))
    np.testing.assert_allclose(optimality.weak_optimality(x, basis, SPECTRUM), expected, rtol=1e-4)


def test_generalized_weak_optimality_is_its_definition():
    a, left, right = rectangular()
    x, y = normal(1, (M, 3)), normal(2, (N, 3))
    gram = y.T @ np.linalg.pinv(np.asarray(a, np.float64), rcond=1e-4) @ x
    found = optimality.generalized_weak_optimality(nys.Factors(x, y), left, right, SPECTRUM)
    np.testing.assert_allclose(found, np.linalg.norm(gram - np.eye(3)), rtol=1e-4)
    best = nys.problems.Asymmetric(a).optimum(3)
    assert optimality.generalized_weak_optimality(best, left, right, SPECTRUM) < 1e-5


def test_one_full_step_on_a_pair_is_weakly_optimal():
    a, left, right = rectangular()
    start = nys.initializers.nystrom_factors(jax.random.key(0), a, R - 2)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), 1.0)
    factors = nys.solvers.run(step, start, 1).params
    assert optimality.generalized_weak_optimality(factors, left, right, SPECTRUM) < 1e-4


def test_residual_space_is_what_lies_outside_of_the_basis():
    _, basis = psd()
    inside, outside = basis @ normal(1, (R, R)), normal(2, (M, R))
    assert optimality.residual_space(inside, basis) < 1e-5
    complement = outside - basis @ (basis.T @ outside)
    found = optimality.residual_space(inside + 1e-4 * complement, basis)
    np.testing.assert_allclose(found, 1e-4 * jnp.linalg.norm(complement), rtol=0.01)


@pytest.mark.parametrize(("size", "expected"), [(1e-25, 1.0), (1e15, 2e30)])
def test_residual_in_basis_of_a_factor_far_from_the_size_of_the_matrix(size, expected):
    basis = jnp.eye(M)[:, :R]
    found = optimality.residual_in_basis(size * basis, basis, jnp.full(R, 0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.long
@given(seeds, st.permutations([1e-5, 1e-2, 0.7, 1.5]))
def test_principal_angles_small_and_large_are_found(seed, angles):
    frame = jax.random.orthogonal(jax.random.key(seed), M)[:, : 2 * R]
    angles = jnp.array(angles)
    x = frame[:, :R]
    y = x * jnp.cos(angles) + frame[:, R:] * jnp.sin(angles)
    mixed = y @ normal(seed // 2, (R, R))
    np.testing.assert_allclose(
        optimality.principal_angles(x, y), jnp.sort(angles), rtol=1e-4, atol=2e-6
    )
    np.testing.assert_allclose(
        optimality.principal_angles(x[:, :2], y), optimality.principal_angles(y, x[:, :2])
    )
    assert optimality.principal_angles(mixed, y).max() < 1e-3


@given(seeds)
def test_distance_does_not_see_rotations_and_sees_the_rest(seed):
    a, _ = psd()
    best = nys.problems.Symmetric(a).optimum(R)
    u = jax.random.orthogonal(jax.random.key(seed), R)
    assert optimality.distance(best @ u, best) < 1e-5
    outside = normal(1000 + seed, (M, R))  # not the key of the basis
    outside = outside - best @ jnp.linalg.solve(best.T @ best, best.T @ outside)
    found = optimality.distance(best @ u + 1e-2 * outside, best)
    np.testing.assert_allclose(found, 1e-2 * jnp.linalg.norm(outside), rtol=1e-3)
    x = normal(seed // 2, (M, R))
    assert optimality.distance(x, best) <= jnp.linalg.norm(x - best @ u) * (1 + 1e-6)


@pytest.mark.parametrize("fn", [optimality.residual_in_basis, optimality.weak_optimality])
def test_measures_are_batched_by_vmap(fn):
    _, basis = psd()
    xs = normal(1, (2, M, R))
    found = jax.jit(jax.vmap(lambda x: fn(x, basis, SPECTRUM)))(xs)
    chex.assert_trees_all_close(found, jnp.stack([fn(x, basis, SPECTRUM) for x in xs]), rtol=1e-5)


@pytest.mark.long
def test_gradients_of_angles_are_finite_where_spaces_are_equal():
    x = normal(0, (M, R))
    gradient = jax.jit(
        jax.grad(lambda x: jnp.sum(optimality.principal_angles(x, normal(0, (M, R)))))
    )
    assert bool(jnp.all(jnp.isfinite(gradient(x))))


@pytest.mark.parametrize("spectrum", [jnp.diag(SPECTRUM), SPECTRUM[:, None], SPECTRUM[:1], 1.0])
def test_a_spectrum_that_is_no_vector_of_one_value_per_column_is_refused(monkeypatch, spectrum):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    basis = jnp.eye(M)[:, :R]
    pair = nys.Factors(basis, basis)
    for measure in (
        lambda: optimality.residual_in_basis(basis, basis, spectrum),
        lambda: optimality.weak_optimality(basis, basis, spectrum),
        lambda: optimality.generalized_weak_optimality(pair, basis, basis, spectrum),
    ):
        with pytest.raises(ValueError, match=r"spectrum has shape .*; expected \(4,\)"):
            measure()


def test_angles_between_more_columns_than_rows_are_refused():
    with pytest.raises(ValueError, match="the number of columns of Y is 3; expected"):
        optimality.principal_angles(jnp.eye(2), jnp.ones((2, 3)))
