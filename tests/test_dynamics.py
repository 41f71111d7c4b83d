"""dynamics: the reduced iterations follow the full ones and each other."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from cases import M, R, conditioned, normal, psd, rectangular
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

import nyscaled as nys
from nyscaled import dynamics

SPECTRUM = jnp.array([1.0, 0.8, 0.5, 0.2])
SIGMA = jnp.diag(SPECTRUM)
seeds = st.integers(0, 2**31 - 1)
rates = st.floats(0.125, 1.0, width=32)


def core(seed):
    """Φ (R, R) of condition 5."""
    return jnp.asarray(conditioned(seed, R, R, 5.0, np.float32))


@pytest.mark.long
@pytest.mark.parametrize("rank", [R - 2, R, R + 3])
def test_reduced_iterates_are_the_full_ones_in_the_basis(rank):
    a, basis = psd()
    x = nys.initializers.nystrom(jax.random.key(1), a, rank)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    full = nys.solvers.run(step, x, 3, record=lambda x: x).history
    advance = dynamics.phi_step if rank <= R else dynamics.phi_step_over
    phi = basis.T @ x
    for x in full[1:]:
        phi = advance(phi, SPECTRUM, 0.5)
        np.testing.assert_allclose(basis @ phi, x, rtol=1e-3, atol=1e-4)


@given(seeds, rates)
def test_core_step_is_the_phi_step_squared(seed, rate):
    phi = core(seed)
    new = dynamics.phi_step(phi, SPECTRUM, rate)
    found = dynamics.core_step(phi @ phi.T, SPECTRUM, rate)
    np.testing.assert_allclose(found, new @ new.T, rtol=1e-3, atol=1e-3)


@given(seeds, rates)
def test_core_step_is_the_over_parametrized_phi_step_squared(seed, rate):
    phi = jnp.asarray(conditioned(seed, R + 3, R, 5.0, np.float32)).T
    new = dynamics.phi_step_over(phi, SPECTRUM, rate)
    found = dynamics.core_step(phi @ phi.T, SPECTRUM, rate)
    np.testing.assert_allclose(found, new @ new.T, rtol=1e-3, atol=1e-3)


@given(seeds, rates)
def test_relative_core_step_is_the_core_step_in_units_of_the_spectrum(seed, rate):
    b = core(seed) @ core(seed).T
    expected = jnp.linalg.inv(SIGMA) @ dynamics.core_step(b, SPECTRUM, rate)
    found = dynamics.relative_core_step(jnp.linalg.inv(SIGMA) @ b, rate)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)


@given(seeds)
def test_relative_core_step_squares_the_error_at_one_half(seed):
    c = jnp.eye(R) + 0.1 * core(seed)
    error = c - jnp.eye(R)
    expected = 0.25 * jnp.linalg.solve(c, error @ error)  # Lemma 8
    np.testing.assert_allclose(
        dynamics.relative_core_step(c, 0.5) - jnp.eye(R), expected, atol=2e-6
    )


@given(seeds, rates)
def test_weak_gram_step_is_the_weak_gram_of_the_phi_step(seed, rate):
    phi = jnp.asarray(conditioned(seed, R, R - 2, 5.0, np.float32))
    gram = dynamics.weak_gram(phi, SPECTRUM)
    found = dynamics.weak_gram_step(gram, phi, SPECTRUM, rate)
    expected = dynamics.weak_gram(dynamics.phi_step(phi, SPECTRUM, rate), SPECTRUM)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@given(seeds, rates)
def test_product_of_a_pair_obeys_the_core_step(seed, rate):
    # From Φ_1 Ψ_1ᵀ symmetric positive definite, as Corollary 1 has it.
    phi = core(seed)
    b = core(seed // 2) @ core(seed // 2).T
    psi = jnp.linalg.solve(phi, b).T
    new = dynamics.pair_step(nys.Factors(phi, psi), SPECTRUM, rate)
    # (30) multiplied out is (31), which is symmetric only where Σ and B commute.
    expected = (
        (1 - rate) ** 2 * b
        + 2 * rate * (1 - rate) * SIGMA
        + rate**2 * SIGMA @ jnp.linalg.inv(b).T @ SIGMA
    )
    np.testing.assert_allclose(new.left @ new.right.T, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("step", [dynamics.phi_step, dynamics.phi_step_over])
def test_root_of_the_spectrum_is_a_fixed_point(step):
    phi = jnp.diag(jnp.sqrt(SPECTRUM))
    np.testing.assert_allclose(step(phi, SPECTRUM, 0.3), phi, atol=1e-6)


@pytest.mark.long
@given(seeds, st.sampled_from([0.1, 0.3, 0.5, 0.8]), st.sampled_from([R, R + 3]))
def test_error_curve_is_predicted_from_the_start(seed, rate, rank):
    a, basis = psd()
    x = nys.initializers.nystrom(jax.random.key(seed), a, rank)
    record = Partial(lambda q, s, x: nys.optimality.residual_in_basis(x, q, s), basis, SPECTRUM)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), rate)
    found = nys.solvers.run(step, x, 8, record).history
    expected = dynamics.symmetric_errors(basis.T @ x, SPECTRUM, rate, 8)
    # A small direction 1/d of the start comes with rounding eps·d², and grows to d.
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-5)


def test_error_curve_is_traceable_in_the_learning_rate():
    phi = core(0)
    rates = jnp.array([0.5, 0.3])
    found = jax.jit(jax.vmap(lambda eta: dynamics.symmetric_errors(phi, SPECTRUM, eta, 5)))(rates)
    expected = jnp.stack([dynamics.symmetric_errors(phi, SPECTRUM, e, 5) for e in (0.5, 0.3)])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_scalar_step_is_quadratic_at_one_half_and_linear_elsewhere():
    np.testing.assert_allclose(dynamics.scalar_step(1.01, 0.5) - 1, 0.01**2 / 2.02, rtol=1e-8)
    np.testing.assert_allclose(dynamics.scalar_step(1 + 1e-6, 0.3) - 1, 0.4e-6, rtol=1e-5)
    assert dynamics.scalar_step(4.0, 1.0) == 0.25  # a two-cycle


@pytest.mark.long
@given(seeds, rates)
def test_product_of_an_asymmetric_run_is_a_multiple_of_the_matrix(seed, rate):
    a, _, _ = rectangular()
    start = nys.initializers.nystrom_factors(jax.random.key(seed), a, R)
    step = nys.solvers.scaled_step(nys.problems.Asymmetric(a), jnp.float32(rate))
    products = nys.solvers.run(step, start, 4, record=lambda f: f.left @ f.right.T).history
    scale = 1 + dynamics.asymmetric_scale(rate, 4)
    np.testing.assert_allclose(products[1:], scale[:, None, None] * a, atol=1e-4)


def test_asymmetric_scale_does_not_cancel():
    expected = [-0.5, 0.125, 1 / 288, 3.0037e-06, 2.2556e-12]
    np.testing.assert_allclose(dynamics.asymmetric_scale(0.5, 5), expected, rtol=1e-3)
    chex.assert_trees_all_equal(dynamics.asymmetric_scale(1.0, 3)[0], jnp.float32(0))


def test_subspace_rate_does_not_need_a_sorted_spectrum():
    found = dynamics.subspace_rate(jnp.array([0.5, 2.0, 1.0]), 1, 0.4)
    np.testing.assert_allclose(found, 1 - 0.4 * (1 - 0.5), rtol=1e-6)


@pytest.mark.parametrize("step", [dynamics.phi_step, dynamics.core_step])
def test_reduced_steps_are_batched_by_vmap(step):
    phis = jnp.stack([core(0), core(1)])
    phis = phis @ jnp.swapaxes(phis, 1, 2)
    found = jax.jit(jax.vmap(lambda p: step(p, SPECTRUM, 0.5)))(phis)
    np.testing.assert_allclose(
        found, jnp.stack([step(p, SPECTRUM, 0.5) for p in phis]), rtol=1e-2, atol=1e-3
    )


@pytest.mark.long
def test_nystrom_iterates_never_leave_the_range():
    a, basis = psd()
    x = nys.initializers.nystrom(jax.random.key(1), a, R)
    step = nys.solvers.scaled_step(nys.problems.Symmetric(a), 0.5)
    history = nys.solvers.run(
        step, x, 20, Partial(lambda q, x: nys.optimality.residual_space(x, q), basis)
    ).history
    assert float(jnp.max(history)) < 1e-5
    generic = nys.solvers.run(step, normal(1000, (M, R)), 1).params
    assert nys.optimality.residual_space(generic, basis) > 1.0


def test_spectra_that_would_broadcast_and_starts_with_too_few_columns_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    phi = jnp.eye(R)
    for read in (
        lambda spectrum: dynamics.phi_step(phi, spectrum, 0.5),
        lambda spectrum: dynamics.phi_step_over(phi, spectrum, 0.5),
        lambda spectrum: dynamics.core_step(phi, spectrum, 0.5),
        lambda spectrum: dynamics.weak_gram(phi, spectrum),
        lambda spectrum: dynamics.symmetric_errors(phi, spectrum, 0.5, 2),
    ):
        for spectrum in (SIGMA, SPECTRUM[:1]):
            with pytest.raises(ValueError, match=r"spectrum has shape .*; expected \(4,\)"):
                read(spectrum)
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        dynamics.weak_gram_step(phi, phi, SIGMA, 0.5)
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        dynamics.pair_step(nys.Factors(phi, phi), SIGMA, 0.5)
    with pytest.raises(ValueError, match=r"phi0 has shape \(4, 3\); expected .* r ≥ r_A"):
        dynamics.symmetric_errors(phi[:, :3], SPECTRUM, 0.5, 2)


@pytest.mark.parametrize("num_steps", [4, 12])
def test_derivatives_of_errors_at_one_half_are_those_nearby(num_steps):
    phi0 = jax.random.normal(jax.random.key(0), (2, 2))

    def total(phi0, learning_rate):
        return dynamics.symmetric_errors(
            phi0, jnp.array([1.0, 0.1]), learning_rate, num_steps
        ).sum()

    at, nearby = (jax.grad(total, (0, 1))(phi0, eta) for eta in (0.5, 0.5 + 1e-4))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2), at, nearby)
