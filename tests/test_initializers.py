"""initializers: each start is what its formula says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMS, KEY, M, N, R, normal, psd, rectangular

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


def test_gaussian_sketch_has_the_standard_deviation_asked_for():
    omega = initializers.nystrom(KEY, jnp.eye(400), 50, 0.3)
    np.testing.assert_allclose(jnp.std(omega), 0.3, rtol=0.02)
    assert abs(float(jnp.mean(omega))) < 0.01


def test_unknown_sketch_is_refused():
    with pytest.raises((ValueError, TypeError), match="sketch"):
        initializers.nystrom(KEY, psd()[0], R, sketch="hadamard")


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


def test_small_starts_have_the_standard_deviation_asked_for():
    np.testing.assert_allclose(jnp.std(initializers.small(KEY, 400, 50)), 1e-3, rtol=0.02)
    x, y = initializers.small_factors(KEY, (400, 400), 50, 1e-2)
    np.testing.assert_allclose([jnp.std(x), jnp.std(y)], 1e-2, rtol=0.02)
    assert abs(float(jnp.corrcoef(x.ravel(), y.ravel())[0, 1])) < 0.03


def test_spectral_start_is_the_optimum():
    problem = nys.problems.Asymmetric(rectangular()[0])
    assert problem.residual(initializers.spectral(problem, R)) < 5e-6


def test_start_of_altgd_has_the_sizes_of_ward_and_kolda():
    a = 3.0 * jnp.eye(400)
    norm, c, nu = 3.0, 8.0, 0.5
    eta = initializers.altgd_learning_rate(norm)
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
