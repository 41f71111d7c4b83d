"""initializers: each start is what its formula says."""

import functools

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cases import FORMS, KEY, M, N, R, exact_residual, normal, psd, rectangular

import nyscaled as nys
from nyscaled import initializers


@pytest.mark.parametrize("sketch", ["gaussian", "stiefel"])
def test_nystrom_start_is_the_matrix_times_the_sketch(sketch):
    # From A = I, the start is Ω itself.
    omega = initializers.nystrom(KEY, jnp.eye(M), R, 0.3, sketch=sketch)
    a, b = psd()[0], normal(0, (N, M))
    chex.assert_trees_all_close(
        initializers.nystrom(KEY, a, R, 0.3, sketch=sketch), a @ omega, atol=1e-5
    )
    x, y = initializers.nystrom_factors(KEY, b, R, 0.3, sketch=sketch)
    chex.assert_trees_all_close(x, b @ omega, atol=1e-4)
    chex.assert_trees_all_equal(y, jnp.zeros((M, R)))


def test_stiefel_sketch_has_orthogonal_columns_of_the_length_asked_for():
    omega = initializers.nystrom(KEY, jnp.eye(M), R, 0.3, sketch="stiefel")
    np.testing.assert_allclose(omega.T @ omega, 0.09 * np.eye(R), atol=1e-6)


@pytest.mark.long
def test_gaussian_sketch_has_the_standard_deviation_asked_for():
    omega = initializers.nystrom(KEY, jnp.eye(400), 50, 0.3)
    np.testing.assert_allclose(jnp.std(omega), 0.3, rtol=0.02)
    assert abs(float(jnp.mean(omega))) < 0.01


def test_unknown_sketch_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match="sketch is 'hadamard'; expected 'gaussian' or"):
        initializers.nystrom(KEY, psd()[0], R, sketch="hadamard")


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("form", FORMS)
def test_nystrom_takes_every_form_of_the_matrix(form):
    a, b = psd()[0], rectangular()[0]
    chex.assert_trees_all_close(
        initializers.nystrom(KEY, FORMS[form](a), R), initializers.nystrom(KEY, a, R), atol=1e-5
    )
    chex.assert_trees_all_close(
        initializers.nystrom_factors(KEY, FORMS[form](b), R),
        initializers.nystrom_factors(KEY, b, R),
        atol=1e-5,
    )


def test_start_stays_in_the_range_of_the_matrix_and_a_perturbed_one_leaves_it():
    a, basis = psd()
    start = initializers.nystrom(KEY, a, R)
    assert nys.optimality.residual_space(start, basis) < 1e-5
    noisy = initializers.perturbed(KEY, a, R, noise=1e-2)
    outside = float(nys.optimality.residual_space(noisy, basis))
    np.testing.assert_allclose(outside, 1e-2 * np.sqrt((M - R) * R), rtol=0.2)
    np.testing.assert_allclose(jnp.std(noisy - start), 1e-2, rtol=0.2)


def test_gradient_oracle_gives_the_same_start():
    a, b = psd()[0], rectangular()[0]
    chex.assert_trees_all_close(
        initializers.nystrom_from_gradient(KEY, nys.problems.Symmetric(a).gradient, M, R, 0.5),
        initializers.nystrom(KEY, a, R, 0.5),
        atol=1e-4,
    )
    chex.assert_trees_all_close(
        initializers.nystrom_factors_from_gradient(
            KEY, nys.problems.Asymmetric(b).gradient, (M, N), R, 0.5
        ),
        initializers.nystrom_factors(KEY, b, R, 0.5),
        atol=1e-5,
    )


def test_rescaled_start_is_nearest_to_the_matrix_and_forgets_the_scale():
    a, _ = psd()
    starts = [initializers.nystrom(KEY, a, R, scale) for scale in (1e-3, 1.0, 1e6)]
    found = [initializers.rescaled(x, a) for x in starts]
    for x in found:
        chex.assert_trees_all_close(x, found[0], rtol=1e-5, atol=1e-6)
    x = np.asarray(found[0], np.float64)
    errors = [np.linalg.norm(c * x @ x.T - a) for c in (0.999, 1.0, 1.001)]
    assert errors[1] < min(errors[0], errors[2])
    found_form = initializers.rescaled(starts[0], FORMS["operator"](a))
    chex.assert_trees_all_close(found_form, found[0], rtol=1e-4, atol=1e-5)


def test_rescaling_refuses_what_has_no_best_scale():
    a = psd()[0]
    for x, matrix in ((normal(0, (M, R)), -a), (jnp.zeros((M, R)), a)):
        with pytest.raises(ValueError, match="expected it positive"):
            initializers.rescaled(x, matrix)
    with pytest.raises(ValueError, match="expected"):
        initializers.rescaled(normal(0, (N, R)), a)


@pytest.mark.long
@pytest.mark.parametrize(("rank", "form"), [(R, "bcoo"), (R + 3, "operator")])
def test_nystrom_approximation_is_the_matrix_itself(rank, form):
    a, _ = psd()
    x = initializers.nystrom_approximation(KEY, FORMS[form](a), rank)
    assert x.shape == (M, rank)
    assert exact_residual(x, a) < 2e-6
    assert int(jnp.sum(jnp.any(x != 0, axis=0))) == R
    batch = jax.vmap(lambda k: initializers.nystrom_approximation(k, a, rank))(KEY[None])
    chex.assert_trees_all_close(batch[0] @ batch[0].T, a, atol=2e-6)


def test_nystrom_approximation_of_lower_rank_is_near_the_best():
    a, _ = psd()
    x = np.asarray(initializers.nystrom_approximation(KEY, a, R - 1), np.float64)
    assert 0.2 * (1 - 1e-5) < exact_residual(x, a) < 1.5 * 0.2
    # AQ(QᵀAQ)⁻¹QᵀA never exceeds A.
    assert np.linalg.eigvalsh(np.asarray(a, np.float64) - x @ x.T)[0] > -1e-6


def test_small_starts_have_the_standard_deviation_asked_for():
    np.testing.assert_allclose(jnp.std(initializers.small(KEY, 400, 50)), 1e-3, rtol=0.02)
    x, y = initializers.small_factors(KEY, (400, 400), 50, 1e-2)
    np.testing.assert_allclose([jnp.std(x), jnp.std(y)], 1e-2, rtol=0.02)
    assert abs(float(jnp.corrcoef(x.ravel(), y.ravel())[0, 1])) < 0.03


def test_spectral_start_is_the_optimum():
    problem = nys.problems.Asymmetric(rectangular()[0])
    assert problem.residual(initializers.spectral(problem, R)) < 5e-6


@pytest.mark.parametrize("rank", [2, R + 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_derivatives_of_the_spectral_start_by_products_are_those_of_the_factorization(
    symmetric, rank
):
    b, c, weights = normal(0, (12, R)), normal(1, (12, R)), normal(2, (12, 12))

    def loss(form, b):
        a = b @ b.T if symmetric else b @ c.T
        problem = (nys.problems.Symmetric if symmetric else nys.problems.Asymmetric)(form(a))
        x = initializers.spectral(problem, rank)
        return jnp.sum(weights * (x @ x.T if symmetric else x.left @ x.right.T))

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, FORMS[f])))(b) for f in ("operator", "dense")
    )
    np.testing.assert_allclose(found, expected, atol=1e-2 * float(jnp.max(jnp.abs(expected))))


def test_start_of_altgd_has_the_sizes_of_ward_and_kolda():
    a = 3.0 * jnp.eye(400)
    norm, c, nu = 3.0, 8.0, 0.5
    eta = nys.solvers.altgd_learning_rate(norm)
    np.testing.assert_allclose(eta, 9 / (4 * c * nu * norm))
    x, y = initializers.altgd(KEY, a, 50, norm)
    np.testing.assert_allclose(jnp.std(x), 3 / 50**0.5 / (eta**0.5 * c * norm), rtol=0.02)
    np.testing.assert_allclose(jnp.std(y), eta**0.5 * c * nu / 9 * norm / 400**0.5, rtol=0.02)


def test_smallest_singular_value_meets_lemma_1():
    a, _ = psd()
    keys = jax.random.split(KEY, 200)
    starts = jax.vmap(lambda k: initializers.nystrom(k, a, R - 1, 0.5))(keys)
    smallest = np.linalg.svd(np.asarray(starts), compute_uv=False)[:, -1]
    tau = 0.1
    bound = 0.5 * tau * (np.sqrt(R) - np.sqrt(R - 2)) * 0.2
    assert np.mean(smallest >= bound) > 0.95


def test_columns_of_the_nystrom_approximation_fall_in_its_basis():
    a, _ = psd()
    basis, _ = np.linalg.qr(initializers.nystrom(KEY, a, R))
    lengths = np.linalg.norm(basis.T @ initializers.nystrom_approximation(KEY, a, R), axis=0)
    assert np.all(lengths[1:] < lengths[:-1])
