"""linalg: identities of the dual and its solves, accuracy, rank handling, residuals, operators."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMS, KEY, M, N, R, conditioned, exact_residual, normal, operator
from hypothesis import given
from hypothesis import strategies as st

import nyscaled as nys
from nyscaled import linalg

EPS = float(np.finfo(np.float32).eps)
seeds = st.integers(0, 2**31 - 1)
conditions = st.sampled_from([1.0, 1e1, 1e2, 1e3, 1e4])

# Compiled once for each shape; what the functions do eagerly is the same.
dual, gram_solve, orthonormalize, pinv = (
    jax.jit(f) for f in (linalg.dual, linalg.gram_solve, linalg.orthonormalize, linalg.pinv)
)


@given(seeds, conditions)
def test_dual_transposed_times_factor_is_the_identity(seed, kappa):
    x = conditioned(seed, M, R, kappa, np.float32)
    product = np.asarray(dual(jnp.asarray(x)), np.float64).T @ x
    np.testing.assert_allclose(product, np.eye(R), atol=10 * EPS * kappa)


@given(seeds, conditions)
def test_dual_is_as_accurate_as_householder_qr(seed, kappa):
    x = conditioned(seed, M, R, kappa, np.float32)
    reference = np.linalg.pinv(x.astype(np.float64)).T
    q, r = np.linalg.qr(x)
    peer = np.linalg.norm(np.linalg.solve(r, q.T).T - reference)
    error = np.linalg.norm(dual(jnp.asarray(x)) - reference)
    assert error <= 10 * peer + (10 + kappa) * EPS * np.linalg.norm(reference)


def test_dual_keeps_the_digits_that_the_inverse_gram_matrix_loses():
    x = conditioned(0, M, R, 1e4, np.float32)
    reference = np.linalg.pinv(x.astype(np.float64)).T

    def error(d):
        return np.linalg.norm(np.asarray(d, np.float64) - reference) / np.linalg.norm(reference)

    assert error(dual(jnp.asarray(x))) < 1e-2
    assert error(x @ np.linalg.inv(x.T @ x)) > 1e-1


@given(seeds, st.sampled_from([0.0, 1e-3, 1.0]))
def test_gram_solve_undoes_the_damped_gram_matrix(seed, damping):
    x, reference = normal(seed, (M, R)), normal(seed // 2, (N, R))
    g = reference @ (x.T @ x + damping * jnp.eye(R))
    np.testing.assert_allclose(gram_solve(x, g, damping), reference, atol=1e-4)


@given(seeds, st.sampled_from([0.0, 1e-2]))
def test_gram_solve_of_the_factor_is_its_dual(seed, damping):
    x = normal(seed, (M, R))
    np.testing.assert_allclose(gram_solve(x, x, damping), dual(x, damping), rtol=1e-4, atol=1e-6)


@given(seeds)
def test_dual_is_equivariant_under_the_general_linear_group(seed):
    x, g = normal(seed, (M, R)), jnp.asarray(conditioned(seed, R, R, 10.0, np.float32))
    reference = dual(x) @ jnp.linalg.inv(g).T
    np.testing.assert_allclose(dual(x @ g), reference, rtol=1e-3, atol=1e-5)


def test_zero_columns_have_zero_duals_and_the_others_are_not_disturbed():
    x = normal(0, (M, R))
    padded = jnp.zeros((M, R + 3)).at[:, jnp.array([0, 2, 3, 5])].set(x)
    d = dual(padded)
    np.testing.assert_allclose(d[:, jnp.array([0, 2, 3, 5])], dual(x), atol=1e-6)
    chex.assert_trees_all_equal(d[:, jnp.array([1, 4, 6])], jnp.zeros((M, 3)))
    solved = gram_solve(padded, normal(1, (N, R + 3)))
    chex.assert_trees_all_equal(solved[:, jnp.array([1, 4, 6])], jnp.zeros((N, 3)))


def test_dual_of_zero_is_zero_and_of_nan_is_nan():
    chex.assert_trees_all_equal(dual(jnp.zeros((M, R))), jnp.zeros((M, R)))
    assert jnp.all(jnp.isnan(dual(jnp.full((M, R), jnp.nan))))


@given(seeds, conditions)
def test_orthonormal_basis_spans_the_columns_in_their_order(seed, kappa):
    x = conditioned(seed, M, R, kappa, np.float32)
    z = np.asarray(orthonormalize(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(z.T @ z, np.eye(R), atol=2e-6)
    np.testing.assert_allclose(z @ (z.T @ x), x, atol=20 * EPS)
    np.testing.assert_allclose(np.tril(z.T @ x, -1), 0, atol=20 * EPS)


def test_orthonormalize_holds_up_to_the_inverse_of_eps():
    z = orthonormalize(jnp.asarray(conditioned(0, 300, 20, 5e6, np.float32)))
    np.testing.assert_allclose(z.T @ z, np.eye(20), atol=5e-6)


def test_scale_of_the_columns_does_not_matter():
    x = normal(0, (M, R))
    scales = jnp.array([1e-12, 1e12, 1.0, 1e-3])
    np.testing.assert_allclose(dual(x * scales) * scales, dual(x), rtol=1e-4, atol=1e-6)


@given(seeds, st.integers(1, R))
def test_pinv_meets_the_moore_penrose_conditions(seed, rank):
    x = normal(seed, (M, rank)) @ normal(seed // 3, (rank, R))
    p = pinv(x)
    chex.assert_shape(p, (R, M))
    size = float(jnp.linalg.norm(x) * jnp.linalg.norm(p)) ** 2
    np.testing.assert_allclose(x @ p @ x, x, atol=1e-5 * size)
    np.testing.assert_allclose(p @ x @ p, p, atol=1e-5 * size * float(jnp.linalg.norm(p)))
    np.testing.assert_allclose((x @ p).T, x @ p, atol=1e-5 * size)
    np.testing.assert_allclose((p @ x).T, p @ x, atol=1e-5 * size)
    assert round(float(jnp.trace(p @ x))) == rank


@given(seeds, st.integers(1, R))
def test_compress_finds_the_rank_and_reproduces_the_factor(seed, rank):
    x = normal(seed, (M, rank)) @ normal(seed // 3, (rank, R))
    cut = linalg.compress(x, rcond=1e-5)
    assert int(cut.rank) == rank
    chex.assert_trees_all_equal(cut.factor[:, rank:], jnp.zeros((M, R - rank)))
    np.testing.assert_allclose(cut.rotation.T @ cut.rotation, np.eye(R), atol=1e-5)
    np.testing.assert_allclose(cut.factor @ cut.rotation.T, x, atol=1e-4)


def test_the_cut_is_relative_to_the_largest_singular_value():
    x = normal(0, (M, R)) * 1e-20
    assert int(linalg.compress(x).rank) == R
    assert int(linalg.compress(x * jnp.array([1.0, 1.0, 1.0, 1e-4]), rcond=1e-2).rank) == R - 1


@pytest.mark.long_beyond(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), [(M, N), (512, 30), (513, 30), (30, 1100)])
def test_squared_residual_counts_every_entry_once(form, m, n):
    left, right, a = normal(0, (m, R)), normal(1, (n, R)), normal(2, (m, n))
    found = linalg.squared_residual(FORMS[form](a), left, right)
    np.testing.assert_allclose(found, exact_residual(left, a, right) ** 2, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_residuals_refuse_factors_of_another_matrix(form):
    # Rows beyond those of A would not be read.
    a = FORMS[form](normal(2, (M, N)))
    with pytest.raises(ValueError, match=r"expected .*, r.* for A"):
        linalg.residual(a, normal(0, (M + 1, R)), normal(1, (N, R)))


@pytest.mark.parametrize("rank", [0, N + 1])
def test_leading_factors_refuse_a_rank_out_of_range(rank):
    with pytest.raises(ValueError, match="rank is"):
        linalg.leading_factors(KEY, normal(2, (M, N)), rank)


def test_squared_residual_does_not_cancel():
    x = normal(0, (M, R))
    a = (np.asarray(x, np.float64) @ np.asarray(x, np.float64).T).astype(np.float32)
    found = float(jnp.sqrt(linalg.squared_residual(jnp.asarray(a), x, x)))
    size = np.linalg.norm(a)
    assert found < 10 * EPS * size
    expanded = np.sum(a * a) - 2 * np.sum((a @ x) * x) + np.sum(np.asarray(x.T @ x) ** 2)
    assert abs(expanded) > (10 * EPS * size) ** 2  # what the expansion would have said


def test_spectral_norm_is_a_tight_lower_bound():
    a = normal(0, (M, N))
    exact = np.linalg.norm(np.asarray(a, np.float64), 2)
    found = float(linalg.spectral_norm(a))
    assert 0.99 * exact <= found <= exact * (1 + 1e-5)
    assert float(linalg.spectral_norm(a, KEY, num_steps=1)) < found * (1 - 1e-3)


def test_spectral_norm_of_close_singular_values_is_within_a_percent():
    singular = 0.97 ** np.arange(40)
    a = nys.spectra.rectangular(jax.random.key(0), M, 40, singular)[0]
    for seed in range(3):
        assert 0.99 <= float(linalg.spectral_norm(a, jax.random.key(seed))) <= 1 + 1e-5


def test_operator_multiplies_from_both_sides_and_transposes_back():
    a = normal(0, (M, N))
    op = operator(a)
    assert (op.shape, op.T.shape, op.dtype) == ((M, N), (N, M), jnp.float32)
    x, y = normal(1, (N, R)), normal(2, (M, R))
    chex.assert_trees_all_close(op @ x, a @ x)
    chex.assert_trees_all_close(op.T @ y, a.T @ y)
    chex.assert_trees_all_close(op.T.T @ x, a @ x)


def test_operators_of_equal_shape_share_a_compilation():
    traces = []

    @jax.jit
    def apply(op, x):
        traces.append(None)
        return op @ x

    x = normal(1, (N, R))
    for seed in range(2):
        a = normal(seed, (M, N))
        chex.assert_trees_all_close(apply(operator(a), x), a @ x, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("fn", [linalg.dual, linalg.orthonormalize, linalg.pinv])
def test_thin_functions_work_under_jit_and_vmap(fn):
    xs = normal(0, (3, M, R))
    each = jnp.stack([fn(x) for x in xs])
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(xs), each, rtol=1e-3, atol=1e-5)


def test_products_ask_for_full_precision():
    text = str(jax.make_jaxpr(linalg.dual)(normal(0, (M, R))))
    assert text.count("dot_general") > 0
    assert text.count("Precision.DEFAULT") == 0
    assert "HIGHEST" in text


def test_derivatives_at_zero_columns_are_finite():
    x = normal(0, (M, R)).at[:, 1].set(0)
    weights = normal(1, (M, R))

    def both(x):
        return jnp.sum(weights * (linalg.orthonormalize(x) + linalg.dual(x)))

    assert bool(jnp.all(jnp.isfinite(jax.jit(jax.grad(both))(x))))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_derivative_in_the_damping_is_that_of_the_formula_at_zero_too(damping):
    x, g = normal(0, (M, R)), normal(1, (N, R))

    def found(damping):
        return jnp.sum(g * linalg.gram_solve(x, g, damping)) + linalg.factor(x, damping).kept(
            damping
        )

    def expected(damping):
        inverse = jnp.linalg.inv(x.T @ x + damping * jnp.eye(R))
        return jnp.sum(g * (g @ inverse)) + x.T @ x @ inverse

    one = (jnp.float32(damping),), (jnp.float32(1.0),)
    values, reference = (jax.jit(functools.partial(jax.jvp, f))(*one) for f in (found, expected))
    chex.assert_trees_all_close(values, reference, rtol=1e-3, atol=1e-4)


def test_second_derivative_of_the_loss_is_that_of_the_gradient_at_a_solution_too():
    x = jnp.zeros((4, 2)).at[0, 0].set(2.0).at[1, 1].set(1.0)
    problem = nys.problems.Symmetric(jnp.diag(jnp.array([4.0, 1.0, 0.0, 0.0])))
    direction = normal(0, (4, 2))
    along = jax.jit(lambda x, d: jax.jvp(jax.grad(problem.loss), (x,), (d,))[1])
    reference = jax.jvp(problem.gradient, (x,), (direction,))[1]
    assert problem.loss(x) == 0
    chex.assert_trees_all_close(along(x, direction), reference, atol=1e-4)
