"""float64: counts and floors of the polar steps up to κ = 1e13, and rates where r < r_A."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import M, exact_residual, psd

import nyscaled as nys

METHODS = {"newton": nys.solvers.scaled_newton_step, "qdwh": nys.solvers.qdwh_step}


@functools.partial(jax.jit, static_argnums=0)
def curves(method, keys, spectra):
    """Relative errors of a run of 12 steps from Nyström, (spectrum, start, t)."""

    def one(key, spectrum):
        a, basis = nys.spectra.psd(key, 100, spectrum)
        start = nys.initializers.nystrom(jax.random.fold_in(key, 1), a, 10, 0.1)

        def record(x):
            return nys.optimality.residual_in_basis(x, basis, spectrum) / jnp.linalg.norm(spectrum)

        step = METHODS[method](nys.problems.Symmetric(a))
        return nys.solvers.run(step, start, 12, record).history

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, spectra)


@pytest.mark.parametrize(("method", "few"), [("newton", 9), ("qdwh", 6)])
def test_errors_reach_rounding_and_stay_for_every_condition(method, few):
    spectra = jnp.asarray([np.geomspace(1, 1 / k, 10) for k in (1e1, 1e4, 1e8, 1e13)])
    errors = np.asarray(curves(method, jax.random.split(jax.random.key(0), 4), spectra))
    assert errors[..., few:].max() < 1e-14


@pytest.mark.parametrize(("method", "like"), [("newton", 1 / 2), ("qdwh", 2 / 3)])
def test_under_parametrized_subspace_turns_at_the_rate_of_its_step_size(method, like):
    spectrum = jnp.array([1.0, 0.9, 0.8, 0.6, 0.5])
    a, basis = psd(0, spectrum)
    x0 = nys.initializers.nystrom(jax.random.key(1), a, 3)

    def sine(x):
        return jnp.sin(nys.optimality.principal_angles(x, basis[:, :3])[-1])

    step = METHODS[method](nys.problems.Symmetric(a))
    angle = nys.solvers.run(step, x0, 90, sine).history
    rate = float(nys.dynamics.subspace_rate(spectrum, 3, like))
    np.testing.assert_allclose((angle[90] / angle[60]) ** (1 / 30), rate, rtol=1e-3)


def test_nystrom_approximation_through_a_basis_keeps_the_digits_that_the_textbook_form_loses():
    a, _ = psd(3, np.geomspace(1, 1e-8, 10))
    keys = jax.random.split(jax.random.key(0), 10)

    @jax.jit
    def both(keys, a):
        def one(key):
            robust = nys.initializers.nystrom_approximation(key, a, 10)
            omega = jax.random.normal(key, (M, 10))
            lower = jnp.linalg.cholesky(omega.T @ a @ omega)
            return robust, jax.scipy.linalg.solve_triangular(lower, (a @ omega).T, lower=True).T

        return jax.vmap(one)(keys)

    robust, textbook = (max(exact_residual(x, a) for x in xs) for xs in both(keys, a))
    assert robust < 2e-15
    assert textbook > 30 * robust
